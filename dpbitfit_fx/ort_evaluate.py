"""How good the trained biases are on PUBLIC records, by the export's eval_model.onnx. Importable without torch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dpbitfit_fx.errors import ArtifactError, DataError
from dpbitfit_fx.ort_backends import Array, pieces
from dpbitfit_fx.ort_device import open_session
from dpbitfit_fx.ort_records import Records

__all__ = ["Evaluator"]


class Evaluator:
    """``eval_model.onnx``: batch and parameters -> what ``eval_output`` returned at export, or the mean loss.

    Never for private records: nothing that comes out is protected by noise.

    Raises:
        ArtifactError: the export has no evaluation model.
    """

    def __init__(self, folder: str | os.PathLike[str], manifest: Mapping[str, Any], device: str = "cpu") -> None:
        if "eval_model.onnx" not in manifest["files"]:
            raise ArtifactError(
                f"{os.fspath(folder)!r} has no evaluation model. Leave the evaluation out, load biases.safetensors onto "
                "the PyTorch model, or export with export_ort_training(..., eval_output=...)."
            )
        self.session = open_session(Path(folder) / "eval_model.onnx", device)
        self.wanted = {i.name for i in self.session.get_inputs()}
        self.parameters, self.inputs = manifest["parameters"], manifest["batch_inputs"]
        self.gives_loss = bool(manifest.get("eval_takes_mask"))
        self.one_length = "dynamic_length" not in manifest

    def _run(self, batch: Mapping[str, Array], mask: Array, flat: Array) -> list[Array]:
        given = {**batch, "sample_mask": mask, **pieces(self.parameters, flat, "onnx_name")}
        return [np.asarray(r) for r in self.session.run(None, {k: v for k, v in given.items() if k in self.wanted})]

    def scores(self, records: Records, flat: Array, label: str, rows: int = 64) -> dict[str, float]:
        """``{"accuracy": ...}`` where the model gives scores ``[B, classes]``, else ``{"loss": ...}``.

        Args:
            flat: the trained parameters, ``float32[D]``. label: path or name of the entry with the class numbers.

        Raises:
            DataError: there is no such entry, or it holds no class numbers. ArtifactError: the model gives neither.
        """
        entry = next((e for e in self.inputs if label in (e["path"], e["name"])), None)
        if not self.gives_loss and (entry is None or entry["shape"] or np.dtype(entry["dtype"]).kind not in "iu"):
            raise DataError(f"{label!r} is not an entry of the batch with one class number per record.")
        total = 0.0
        for batch, mask in records.micro_batches(np.arange(len(records)), rows, self.one_length):
            real = int(mask.sum())
            first = self._run(batch, mask, flat)[0]
            if self.gives_loss:
                total += float(first) * real
                continue
            if first.ndim != 2 or len(first) != rows or entry is None:
                raise ArtifactError("The evaluation model does not give one row of class scores per record.")
            total += float((first.argmax(1) == batch[entry["name"]])[:real].sum())
        return {"loss" if self.gives_loss else "accuracy": total / len(records)}
