"""Tensors of PyTorch and arrays of numpy alike: copied, hashed and stored. Imports torch only where a tensor is given."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import numpy as np

__all__ = ["is_numpy", "is_tensor", "own_copy", "pack", "raw_bytes", "unpack"]


def is_tensor(value: Any) -> bool:
    torch = sys.modules.get("torch")  # whoever holds a tensor has imported it
    return torch is not None and isinstance(value, torch.Tensor)


def is_numpy(value: Any) -> bool:
    return isinstance(value, np.ndarray)


def own_copy(value: Any) -> Any:
    """A contiguous copy on the CPU that shares memory with nothing."""
    return np.array(value, order="C") if isinstance(value, np.ndarray) else value.detach().cpu().clone().contiguous()


def raw_bytes(value: Any) -> bytes:
    """The values as they lie in memory, row by row."""
    if isinstance(value, np.ndarray):
        return value.tobytes()
    import torch

    return bytes(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())


def pack(arrays: Mapping[str, Any]) -> bytes:
    """All of them, of one kind, as safetensors."""
    if any(is_tensor(value) for value in arrays.values()):
        from safetensors.torch import save

        return bytes(save(dict(arrays)))
    from safetensors.numpy import save as save_numpy

    return bytes(save_numpy(dict(arrays)))


def unpack(data: bytes, tensors: bool) -> dict[str, Any]:
    """What `pack` stored, as torch's tensors or as numpy's arrays."""
    if tensors:
        from safetensors.torch import load

        return dict(load(data))
    from safetensors.numpy import load as load_numpy

    return dict(load_numpy(data))
