"""Random examples of operators' inputs, for the tests that compare our rules and decompositions with torch's operators."""

from __future__ import annotations

import torch
from torch import Tensor

D = torch.float64


class Draw:
    """Shapes, numbers and layouts of one example, all from one seed."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def whole(self, low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=self.generator))

    def ints(self, low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high + 1, shape, generator=self.generator)

    def floats(self, *shape: int) -> Tensor:
        """Dense, or of permuted strides, or every second entry of a larger tensor: the same distribution."""
        kind = self.whole(0, 2)
        if kind == 0 or len(shape) < 2:
            return torch.randn(shape, generator=self.generator, dtype=D)
        if kind == 1:
            return torch.randn(shape[::-1], generator=self.generator, dtype=D).permute(*range(len(shape))[::-1])
        return torch.randn(*shape[:-1], 2 * shape[-1], generator=self.generator, dtype=D)[..., ::2]
