"""Frozen weights in 8 or 4 bits. ONNX Runtime's own quantizer chooses the numbers; plain ONNX operators read them
(``onnx_dequantize``).

One copy is on disk, for all graphs. A product dequantizes its weight just before it reads it, the forward and the backward
pass each for itself, so that one weight at a time is there in float32; of a table, only the rows that were looked up are.
Everything else stays float32: biases, whatever is trained, activations, gradients, the clipped sum. No activation is
quantized: a scale taken over a batch would let one record move the others' gradients (the seal refuses such operators).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt
import torch

from dpbitfit_fx.errors import ExportError
from dpbitfit_fx.onnx_dequantize import BLOCK, Quantized, read_quantized
from dpbitfit_fx.onnx_weights import INLINE_LIMIT

if TYPE_CHECKING:
    import onnx_ir as ir

SHORTEST_ROW: Final = 32
SCHEMES: Final = {
    8: "int8, symmetric, one scale per row",
    4: f"uint4, a scale and a zero point per block of {BLOCK}; rows that blocks do not divide: as in 8 bits",
}
Array = npt.NDArray[Any]


def check_bits(weight_bits: int | None) -> None:
    """Raises ExportError unless it is None, 8 or 4."""
    if weight_bits is not None and weight_bits not in SCHEMES:
        raise ExportError(f"weight_bits must be 8 or 4, or None for float32; got {weight_bits!r}.")


def quantized(weight: Array, bits: int) -> Quantized:
    """float32 of two axes or more -> the same in 8 or 4 bits, by onnxruntime.quantization.

    A row is the shortest run of last axes that has SHORTEST_ROW numbers; of a smaller weight, what lies along axis 0.

    Raises:
        ExportError: the installed onnxruntime has no such quantizer, or the weight is not finite.
    """
    onnx, tools = _quantizer()
    kinds = onnx.TensorProto
    if not np.isfinite(weight).all():
        raise ExportError("A frozen weight holds values that are not finite; it has no form in 8 or 4 bits.")
    width = next((k for k in (math.prod(weight.shape[i:]) for i in range(weight.ndim - 1, 0, -1)) if k >= SHORTEST_ROW), 0)
    matrix = weight.reshape(-1, width or math.prod(weight.shape[1:]))
    if bits == 8 or matrix.shape[1] % BLOCK:
        low, high = tools.get_qmin_qmax_for_qType(kinds.INT8, symmetric=True)
        scale, zero = _scales(tools, matrix, low, high, True)
        codes = tools.quantize_nparray(kinds.INT8, matrix, scale[:, None], zero[:, None].astype(np.int8))
        return Quantized(weight.shape, codes.astype(np.int8)[:, None], scale[:, None])
    blocks = matrix.reshape(-1, BLOCK)
    scale, zero = _scales(tools, blocks, np.array(0, np.uint8), np.array(15, np.uint8), False)
    numbers = tools.quantize_nparray(kinds.UINT8, blocks, scale[:, None], zero[:, None].astype(np.uint8), 0, 15)
    numbers = numbers.astype(np.uint8).reshape(len(matrix), -1, BLOCK)
    codes = numbers[..., : BLOCK // 2] | (numbers[..., BLOCK // 2 :] << 4)
    places = codes.shape[:2]
    return Quantized(weight.shape, codes, scale.reshape(places), zero.astype(np.uint8).reshape(places))


def _scales(tools: Any, rows: Array, low: Any, high: Any, symmetric: bool) -> tuple[npt.NDArray[np.float32], Array]:
    """Scale and zero point of every row."""
    each = [
        tools.compute_scale_zp(least, most, low, high, symmetric)
        for least, most in zip(rows.min(1), rows.max(1), strict=True)
    ]
    return np.array([s for _, s in each], np.float32), np.array([z for z, _ in each])


def _quantizer() -> tuple[Any, Any]:
    try:
        import onnx
        from onnxruntime.quantization import quant_utils
    except ImportError as error:
        raise ExportError(
            "weight_bits needs the quantizer of onnxruntime (onnxruntime.quantization, in every release since 1.19), and it "
            "cannot be imported here: pip install onnx onnxruntime. Without weight_bits, weights are exported in float32."
        ) from error
    return onnx, quant_utils


class FrozenWeights:
    """The frozen weights of a model that an export holds in ``bits`` bits, each quantized once for all graphs.

    They are its float32 parameters of two axes or more and over INLINE_LIMIT bytes that no phase trains and that are no
    biases by name. Buffers stay.
    """

    def __init__(self, steps: Sequence[Any], bits: int) -> None:
        self.bits = bits
        trained = {id(p) for step in steps for p in step.parameters().values()}
        named = dict(steps[-1].model.named_parameters())
        self.parameters = {
            _key(p): p
            for name, p in named.items()
            if id(p) not in trained and p.dtype == torch.float32 and p.dim() > 1 and p.is_contiguous()
            and p.numel() * p.element_size() > INLINE_LIMIT and "bias" not in name.rpartition(".")[2]
        }  # fmt: skip
        if not self.parameters:
            raise ExportError(f"weight_bits={bits}: the model has no frozen weight of more than {INLINE_LIMIT} bytes.")
        self._done: dict[Any, Quantized] = {}

    def quantized(self, tensor: torch.Tensor) -> Quantized:
        key = _key(tensor)
        if key not in self._done:
            self._done[key] = quantized(tensor.detach().cpu().numpy(), self.bits)
        return self._done[key]

    def rewrite(self, model: ir.Model, frozen: Mapping[str, torch.Tensor]) -> None:
        """Let the graph read the quantized weights in place of its initializers ``frozen``, in place."""
        for name, tensor in frozen.items():
            weight = model.graph.initializers.get(name)
            if weight is not None and _key(tensor) in self.parameters:
                read_quantized(model, weight, self.quantized(tensor))

    def described(self, steps: Sequence[Any]) -> dict[str, Any]:
        """For the manifest: how, by which version, how much, and how far the gradients of the example batch moved.

        gradient_distance: of each step, ‖clipped sum - float32 model's‖ / ‖float32 model's‖.
        """
        import onnxruntime

        wanted = [_clipped_sum(step) for step in steps]
        with in_torch(self):
            found = [_clipped_sum(step) for step in steps]
        parts = [self.quantized(p) for p in self.parameters.values()]
        return {
            "bits": self.bits,
            "scheme": SCHEMES[self.bits],
            "quantizer": f"onnxruntime.quantization {onnxruntime.__version__}",
            "values": {str(bits): sum(math.prod(p.shape) for p in parts if p.bits == bits) for bits in (8, 4)},
            "bytes": sum(part.nbytes for part in parts),
            "gradient_distance": [
                float((a - b).norm() / b.norm().clamp(min=1e-30)) for a, b in zip(found, wanted, strict=True)
            ],
        }


@contextmanager
def in_torch(weights: FrozenWeights | None) -> Iterator[None]:
    """The model holds the dequantized weights inside, and its own again afterwards, bit for bit. With None, nothing."""
    parameters = {} if weights is None else weights.parameters
    kept = {key: p.detach().clone() for key, p in parameters.items()}
    try:
        with torch.no_grad():
            for p in parameters.values():
                assert weights is not None
                p.copy_(torch.from_numpy(weights.quantized(p).values()))
        yield
    finally:
        with torch.no_grad():
            for key, value in kept.items():
                parameters[key].copy_(value)


def _key(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride()


def _clipped_sum(step: Any) -> torch.Tensor:
    return torch.cat([x.flatten() for x in step.clipped_sum(step.example_batch).values()])
