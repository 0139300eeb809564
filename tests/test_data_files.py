"""Labelled text files: what is read, and what is refused by row number and never by content."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dpbitfit_fx.data import TextTable, parse_lengths, read_table, tokenize
from dpbitfit_fx.errors import ArtifactError, DataError

SECRET = "xyzzy-secret"


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def refused(path: Path, labels: list[str] | None = None, text: str = "text", label: str = "label") -> str:
    with pytest.raises(DataError) as caught:
        read_table(path, text, label, labels)
    assert SECRET not in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_csv_file_keeps_quoted_separators_and_line_breaks(tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", 'id,text,label\n1,"one, two\nthree ""x""",pos\n2,four,neg\n')
    table = read_table(path, labels=["neg", "pos"])
    assert table.texts == ('one, two\nthree "x"', "four")
    assert table.labels == (1, 0)
    assert not table.labels_from_data


def test_csv_tsv_and_jsonl_give_the_same_records(tmp_path: Path) -> None:
    rows = [("good", "1"), ("bad", "0"), ("caf\u00e9 \u2028 line", "1")]
    csv = write(tmp_path, "a.csv", "text,label\n" + "".join(f"{t},{y}\n" for t, y in rows))
    tsv = write(tmp_path, "a.tsv", "text\tlabel\n" + "".join(f"{t}\t{y}\n" for t, y in rows))
    lines = [json.dumps({"text": t, "label": int(y)}, ensure_ascii=False) + "\n" for t, y in rows]
    jsonl = write(tmp_path, "a.jsonl", "".join(lines))
    assert read_table(csv) == read_table(tsv) == read_table(jsonl)


def test_a_byte_order_mark_is_no_part_of_the_first_column(tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", b"\xef\xbb\xbftext,label\na,x\nb,y\n")
    assert len(read_table(path)) == 2


def test_labels_taken_from_the_data_are_recorded_so(tmp_path: Path) -> None:
    table = read_table(write(tmp_path, "a.csv", "text,label\na,x\nb,y\n"))
    assert table.labels_from_data
    assert "taken from the data" in table.public_declarations()["label_set_source"]


def test_a_missing_column_is_named_and_the_found_ones_are_listed(tmp_path: Path) -> None:
    message = refused(write(tmp_path, "a.csv", "sentence,label\na,x\n"))
    assert "no column 'text'" in message
    assert "'sentence', 'label'" in message


def test_a_file_without_a_header_does_not_show_its_first_record(tmp_path: Path) -> None:
    assert "do not look like column names" in refused(write(tmp_path, "a.csv", f"{SECRET} is here!,1\nb,0\n"))


@pytest.mark.parametrize("content", ["", "\n\n", "text,label\n"])
def test_an_empty_file_is_said_to_be_empty(tmp_path: Path, content: str) -> None:
    assert "empty" in refused(write(tmp_path, "a.csv", content))


def test_an_undeclared_label_is_told_by_its_row_only(tmp_path: Path) -> None:
    message = refused(write(tmp_path, "a.csv", f"text,label\na,x\nb,{SECRET}\n"), ["x", "y"])
    assert "row 2" in message


@pytest.mark.parametrize("value", [None, 1.5, True, [SECRET], {"a": SECRET}])
def test_a_label_of_the_wrong_type_is_told_by_its_row_and_type(tmp_path: Path, value: object) -> None:
    lines = json.dumps({"text": "a", "label": "x"}) + "\n" + json.dumps({"text": "b", "label": value}) + "\n"
    assert "row 2" in refused(write(tmp_path, "a.jsonl", lines))


@pytest.mark.parametrize(
    ("content", "row"),
    [
        (f"text,label\na,x\n{SECRET},b,c\n", 2),
        (f'text,label\na,x\nb,"{SECRET}" y\n', 2),
        (f'text,label\na,x\nb,"{SECRET}\n', 2),
        (f"text,label\na,x\n   ,{SECRET}\n", 2),
        (f"text,label\n{SECRET},\nb,x\n", 1),
    ],
    ids=["too many fields", "quotes in the middle", "open quote", "blank text", "blank label"],
)
def test_a_malformed_row_is_told_by_its_number(tmp_path: Path, content: str, row: int) -> None:
    assert f"row {row}" in refused(write(tmp_path, "a.csv", content))


@pytest.mark.parametrize(
    "line", [f'{{"text": "{SECRET}', f'"{SECRET}"', f'{{"label": "{SECRET}"}}', '{"text": 3, "label": 1}']
)
def test_a_malformed_json_line_is_told_by_its_number(tmp_path: Path, line: str) -> None:
    assert "row 2" in refused(write(tmp_path, "a.jsonl", '{"text": "a", "label": "x"}\n' + line + "\n"))


def test_bytes_that_are_not_utf8_are_told_by_their_line(tmp_path: Path) -> None:
    assert "line 3" in refused(write(tmp_path, "a.csv", b"text,label\na,x\n" + SECRET.encode() + b"\xff,y\n"))


def test_one_label_only_an_unknown_ending_and_an_absent_file_are_refused(tmp_path: Path) -> None:
    assert "same label" in refused(write(tmp_path, "a.csv", "text,label\na,x\nb,x\n"))
    assert ".csv" in refused(write(tmp_path, "a.xlsx", "text,label\n"))
    with pytest.raises(ArtifactError):
        read_table(tmp_path / "absent.csv")


@pytest.mark.parametrize("lengths", ["", "a", "0,3", "4,2", "2,2", "-1"])
def test_padded_lengths_must_increase_from_one(lengths: str) -> None:
    with pytest.raises(DataError):
        parse_lengths(lengths)


def test_a_long_text_is_cut_whatever_its_neighbours_are() -> None:
    class Words:
        def __call__(self, texts: list[str], max_length: int, **_: object) -> dict[str, list[list[int]]]:
            return {"input_ids": [[len(word) for word in text.split()][:max_length] for text in texts]}

    data = tokenize(TextTable(("a bb ccc dddd", "a"), (1, 0), ("x", "y"), False), Words(), 3)
    assert data[0]["input_ids"].tolist() == [1, 2, 3]
    assert data[1]["attention_mask"].tolist() == [1]
    assert data[0]["labels"] == 1
