"""Labelled text for an export whose batch is input_ids, attention_mask and labels. Needs `tokenizers`, never torch.

An export carries its tokenizer and label set beside its graphs (`attach_text`), so that texts meet the token ids and the
class numbers that the model was trained with.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from dpbitfit_fx.data import TextTable
from dpbitfit_fx.errors import ArtifactError, DataError, DPBitFitError
from dpbitfit_fx.files import read_text
from dpbitfit_fx.ort_artifacts import attach, read_manifest
from dpbitfit_fx.ort_records import public_lengths

__all__ = ["TextInput", "attach_text", "labels_of"]

TOKENIZER: Final = "tokenizer.json"
_PARTS: Final = ("input_ids", "attention_mask", "labels")


def attach_text(
    folder: str | os.PathLike[str],
    tokenizer: str,
    labels: Sequence[str],
    pad_id: int = 0,
    padded_lengths: Sequence[int] | None = None,
) -> None:
    """Puts `tokenizer` (the contents of a tokenizer.json) beside an export, and the label set into its manifest; where the
    export has a free length, also the public lengths that texts are padded to.

    Raises:
        ArtifactError: the folder is no export or cannot be written; then its manifest is as it was.
    """
    manifest, more = read_manifest(folder), dict[str, Any]()
    if padded_lengths is not None:
        lengths = public_lengths(manifest, padded_lengths)
        more["padded_lengths"] = {path: list(numbers) for path, numbers in lengths.items()}
    text = {"tokenizer": TOKENIZER, "labels": list(labels), "pad_id": int(pad_id)}
    attach(Path(folder), manifest, TOKENIZER, tokenizer, text=text, **more)


def labels_of(manifest: Mapping[str, Any], declared: Sequence[str] | None) -> list[str] | None:
    """The label set in the order of the class numbers: the export's, else what was `declared`, else None.

    Raises:
        DataError: both are there and differ.
    """
    known: list[str] | None = manifest.get("text", {}).get("labels")
    if known is not None and declared is not None and list(declared) != known:
        raise DataError(
            f"The export was made for the labels {', '.join(known)}, in this order; others were declared. Leave them "
            "out, or export again."
        )
    return known if known is not None else None if declared is None else list(declared)


class TextInput:
    """Turns texts into records for the export: cut to its (longest) public length, each by itself.

    Args:
        tokenizer: a tokenizer.json, in place of the export's own. padded_lengths: as ``Records`` is given them.

    Raises:
        DataError: the export's batch is not made of text. ArtifactError: there is no tokenizer, or it cannot be read.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        manifest: Mapping[str, Any],
        tokenizer: str | os.PathLike[str] | None = None,
        padded_lengths: Sequence[int] | None = None,
    ) -> None:
        entries = {entry["path"].strip("/").split("/")[-1]: entry for entry in manifest["batch_inputs"]}
        shapes = {name: len(entry["shape"]) for name, entry in entries.items()}
        if not {"input_ids", "labels"} <= shapes.keys() <= set(_PARTS) or shapes["labels"] or shapes["input_ids"] != 1:
            raise DataError(
                f"The artifacts take {', '.join(sorted(shapes))}: not token ids with one label per record. Give the "
                "records as a .npz file with one array per entry."
            )
        self.paths = {name: entry["path"] for name, entry in entries.items()}
        lengths = public_lengths(manifest, padded_lengths).get(self.paths["input_ids"])
        self.length = int(entries["input_ids"]["shape"][0]) if lengths is None else lengths[-1]
        about = manifest.get("text", {})
        if tokenizer is None and not about:
            raise ArtifactError(
                f"The export {os.fspath(folder)!r} carries no tokenizer. Give one with --tokenizer tokenizer.json, or "
                "export again with `dpbitfit export`."
            )
        path = Path(folder) / about["tokenizer"] if tokenizer is None else Path(tokenizer)
        self._tokenizer = _load(path)
        pad = about["pad_id"] if tokenizer is None else (self._tokenizer.padding or {}).get("pad_id")
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(self.length)
        self.pad_values = {self.paths["input_ids"]: float(pad or 0)}

    def records(self, table: TextTable) -> list[dict[str, Any]]:
        """One mapping per text, for ``Records``.

        Raises:
            DataError: a text has no token at all; the row number is given.
        """
        made = []
        for start in range(0, len(table), 512):
            for offset, found in enumerate(self._tokenizer.encode_batch(list(table.texts[start : start + 512]))):
                row, ids = start + offset, np.asarray(found.ids, np.int64)
                if not len(ids):
                    raise DataError(f"Row {row + 1}: the tokenizer finds no token in the text.")
                values = {"input_ids": ids, "attention_mask": np.ones_like(ids), "labels": table.labels[row]}
                made.append({path: values[name] for name, path in self.paths.items()})
        return made


def _load(path: Path) -> Any:
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise DPBitFitError("Texts need the library tokenizers: pip install tokenizers.") from error
    text = read_text(path)
    try:
        return Tokenizer.from_str(text)
    except Exception as error:
        raise ArtifactError(f"'{path}' is not a tokenizer.json that this version of tokenizers can read.") from error
