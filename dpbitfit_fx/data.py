"""Labelled text from the user's own files: CSV, TSV and JSON Lines. Importable without torch and transformers.

Errors about records give row numbers, never contents: whoever reads a log need not be allowed to read the data.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpbitfit_fx.errors import DataError
from dpbitfit_fx.files import read_bytes

if TYPE_CHECKING:
    import torch

__all__ = ["PADDED_LENGTHS", "TextTable", "TokenizedText", "parse_lengths", "read_table", "tokenize"]

PADDED_LENGTHS = (32, 64, 128)
_FORMATS = {".csv": "csv", ".tsv": "tsv", ".tab": "tsv", ".jsonl": "jsonl", ".ndjson": "jsonl"}
_COLUMN_NAME = re.compile(r"[A-Za-z_][\w .:-]{0,39}")


@dataclass(frozen=True)
class TextTable:
    """Records read from a file, in its order.

    texts, labels: one per record; `labels` are indices into `label_set`. labels_from_data: the label set was collected
    from the records instead of being declared, so the set itself is assumed public.
    """

    texts: tuple[str, ...]
    labels: tuple[int, ...]
    label_set: tuple[str, ...]
    labels_from_data: bool

    def __len__(self) -> int:
        return len(self.texts)

    def public_declarations(self) -> dict[str, Any]:
        """What privacy.json says of the label set."""
        source = "taken from the data and declared public by the user" if self.labels_from_data else "declared"
        return {"label_set": list(self.label_set), "label_set_source": source}


class TokenizedText:
    """A map-style dataset of tokenised records, not padded: `fit` pads each to a public length of its own.

    An item is ``{"input_ids": int64[T], "attention_mask": int64[T], "labels": int}``.
    """

    def __init__(self, token_ids: Sequence[Sequence[int]], labels: Sequence[int]) -> None:
        import torch

        self._ids = [torch.tensor(ids, dtype=torch.int64) for ids in token_ids]
        self._labels = [int(label) for label in labels]

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        import torch

        ids = self._ids[index]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": self._labels[index]}

    @property
    def labels(self) -> tuple[int, ...]:
        return tuple(self._labels)

    def batches(self, rows: int, pad_id: int = 0) -> Iterator[tuple[list[int], dict[str, torch.Tensor]]]:
        """For public evaluation only: `(row indices, batch)` of similar lengths, padded to the longest of each batch.

        Never for private training, where a record must not change another's padding.
        """
        import torch

        order = sorted(range(len(self)), key=lambda row: len(self._ids[row]))
        for start in range(0, len(order), rows):
            chosen = order[start : start + rows]
            longest = max(len(self._ids[row]) for row in chosen)
            ids = torch.full((len(chosen), longest), pad_id, dtype=torch.int64)
            mask = torch.zeros_like(ids)
            for place, row in enumerate(chosen):
                ids[place, : len(self._ids[row])] = self._ids[row]
                mask[place, : len(self._ids[row])] = 1
            labels = torch.tensor([self._labels[row] for row in chosen])
            yield chosen, {"input_ids": ids, "attention_mask": mask, "labels": labels}


def parse_lengths(lengths: str | Sequence[int]) -> tuple[int, ...]:
    """Public padded lengths, increasing, from "32,64,128" or numbers. Raises DataError."""
    try:
        numbers = tuple(int(part) for part in (lengths.split(",") if isinstance(lengths, str) else lengths))
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) < 1 or list(numbers) != sorted(set(numbers)):
        raise DataError(
            f"The padded lengths must be increasing positive whole numbers separated by commas, such as 32,64,128; got "
            f"{lengths!r}."
        )
    return numbers


def read_table(
    path: str | os.PathLike[str],
    text_column: str = "text",
    label_column: str = "label",
    labels: Sequence[str] | None = None,
) -> TextTable:
    """Read labelled texts from a .csv, .tsv or .jsonl file in UTF-8.

    Args:
        text_column, label_column: names in the header row, or keys of every JSON object.
        labels: the declared label set; its order gives the class numbers. None: taken from the data (sorted), which
            makes the set itself public; recorded in `public_declarations`.

    Raises:
        DataError: a column is missing, the file is empty, a row is not well formed, a text is blank, or a label is of
            the wrong type or not declared. ArtifactError: the file cannot be read. Rows are counted from 1, without
            the header.
    """
    where = f"'{os.fspath(path)}'"
    kind = _FORMATS.get(Path(path).suffix.lower())
    if kind is None:
        known = ", ".join(sorted(_FORMATS))
        raise DataError(f"{where}: the format is told by the ending, which must be one of {known}.")
    if text_column == label_column:
        raise DataError(f"The text column and the label column are both called '{text_column}'.")
    declared = None if labels is None else _declared(labels)
    content = _decode(read_bytes(path), where)
    if not content.strip():
        raise DataError(f"{where} is empty: there is nothing to train on.")
    read = _json_rows if kind == "jsonl" else _delimited_rows(kind)
    texts: list[str] = []
    raw: list[str] = []
    for row, text, label in read(content, where, text_column, label_column):
        texts.append(_text(text, f"{where}, row {row}", text_column))
        raw.append(_label(label, f"{where}, row {row}", label_column))
        if declared is not None and raw[-1] not in declared:
            raise DataError(
                f"{where}, row {row}: the label in column '{label_column}' is not one of the {len(declared)} declared "
                "labels. Correct the row, or the label set."
            )
    if not texts:
        raise DataError(f"{where} is empty: it has a header and no rows.")
    label_set = tuple(sorted(set(raw))) if declared is None else declared
    if len(label_set) < 2:
        raise DataError(f"{where}: every row has the same label in column '{label_column}'; there is nothing to learn.")
    index = {label: number for number, label in enumerate(label_set)}
    return TextTable(tuple(texts), tuple(index[label] for label in raw), label_set, declared is None)


def tokenize(
    table: TextTable,
    tokenizer: Any,
    max_length: int,
    advance: Callable[[int], None] | None = None,
) -> TokenizedText:
    """Token ids of every text, cut to `max_length`: a public rule of each record alone.

    Args:
        tokenizer: a Hugging Face tokenizer. advance: called with the number of texts done since the last call.

    Raises:
        DataError: a text has no token at all (the row number is given).
    """
    ids: list[list[int]] = []
    for start in range(0, len(table), 512):
        part = list(table.texts[start : start + 512])
        found = tokenizer(part, truncation=True, max_length=max_length, padding=False, return_attention_mask=False)
        for offset, one in enumerate(found["input_ids"]):
            if not one:
                raise DataError(f"Row {start + offset + 1}: the tokenizer finds no token in the text.")
            ids.append(list(one))
        if advance is not None:
            advance(len(part))
    return TokenizedText(ids, table.labels)


def _declared(labels: Sequence[str]) -> tuple[str, ...]:
    cleaned = tuple(label.strip() for label in labels)
    if len(cleaned) < 2 or not all(cleaned) or len(set(cleaned)) != len(cleaned):
        raise DataError("The label set must hold at least two different labels, none of them blank.")
    return cleaned


def _decode(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
    # Outside the handler: the decoding error quotes the bytes, which are somebody's record.
    raise DataError(f"{where}, line {line}: this is not UTF-8 text. Save the file as UTF-8.")


def _missing(where: str, column: str, columns: Sequence[str]) -> DataError:
    # A file without a header shows its first record here: such "names" are not repeated.
    if all(_COLUMN_NAME.fullmatch(name) for name in columns):
        found = "it has " + ", ".join(f"'{name}'" for name in columns)
    else:
        found = f"its first row has {len(columns)} field(s) that do not look like column names (is the header missing?)"
    return DataError(
        f"{where} has no column '{column}': {found}. Name the columns with --text-column and --label-column."
    )


def _delimited_rows(kind: str) -> Callable[[str, str, str, str], Iterator[tuple[int, str, str]]]:
    def rows(content: str, where: str, text_column: str, label_column: str) -> Iterator[tuple[int, str, str]]:
        reader = csv.reader(io.StringIO(content, newline=""), delimiter="," if kind == "csv" else "\t", strict=True)
        row = 0
        problem = ""
        try:
            header = [name.strip() for name in next(reader)]
            if len(set(header)) != len(header):
                raise DataError(f"{where}: two columns of the header have the same name.")
            for column in (text_column, label_column):
                if column not in header:
                    raise _missing(where, column, header)
            text_at, label_at = header.index(text_column), header.index(label_column)
            for fields in reader:
                if not fields:
                    continue  # a blank line
                row += 1
                if len(fields) != len(header):
                    raise DataError(
                        f"{where}, row {row}: {len(fields)} fields where the header has {len(header)}. A field that "
                        "holds the separator or a line break must stand in double quotes."
                    )
                yield row, fields[text_at], fields[label_at]
            return
        except csv.Error as error:
            problem = "a field is too long" if "field larger" in str(error) else "the quotation marks do not match"
        raise DataError(f"{where}, row {row + 1}: {problem}.")

    return rows


def _json_rows(content: str, where: str, text_column: str, label_column: str) -> Iterator[tuple[int, Any, Any]]:
    # Not splitlines(): JSON strings may hold U+2028 and friends.
    row = 0
    for line in content.split("\n"):
        if not line.strip():
            continue
        row += 1
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if not isinstance(record, dict):
            raise DataError(f"{where}, row {row}: not a JSON object on one line.")
        for column in (text_column, label_column):
            if column not in record:
                if row == 1:
                    raise _missing(where, column, list(record))
                raise DataError(f"{where}, row {row}: the object has no key '{column}'.")
        yield row, record[text_column], record[label_column]


def _text(value: Any, where: str, column: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where}: column '{column}' must hold text, and holds {_type(value)}.")
    if not value.strip():
        raise DataError(f"{where}: the text in column '{column}' is blank.")
    return value


def _label(value: Any, where: str, column: str) -> str:
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise DataError(
            f"{where}: column '{column}' must hold a label (text or a whole number), and holds {_type(value)}."
        )
    label = str(value).strip()
    if not label:
        raise DataError(f"{where}: the label in column '{column}' is blank.")
    return label


def _type(value: Any) -> str:
    names = {
        dict: "an object",
        list: "a list",
        bool: "true or false",
        float: "a number with a fraction",
        int: "a number",
    }
    return "nothing (null)" if value is None else names.get(type(value), type(value).__name__)
