"""docs/threat-model.md names the tests that hold its claims, and the files it speaks of are there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "threat-model.md").read_text()
TESTS = {
    node.name
    for path in (ROOT / "tests").glob("test_*.py")
    for node in ast.parse(path.read_text()).body
    if isinstance(node, ast.FunctionDef)
}


def test_every_test_that_the_threat_model_names_exists() -> None:
    named = set(re.findall(r"`(test_\w+)`", PAGE))
    assert len(named) > 30 and named - TESTS == set()


def test_every_pitfall_has_a_severity_and_a_test() -> None:
    rows = [
        line for line in PAGE.split("## Pitfalls")[1].split("\n## ")[0].splitlines() if line.startswith("|")
    ]
    for row in rows[2:]:
        _, pitfall, severity, how, held, _ = (cell.strip() for cell in row.split("|"))
        assert pitfall and how and severity.split(",")[0] in ("fatal", "high", "medium", "low"), row
        assert re.search(r"`test_\w+`", held), row
    assert len(rows) > 25


def test_every_path_and_link_on_the_page_exists() -> None:
    paths = [p for p in re.findall(r"`((?:tests|tools|docs)/[\w./-]+)`", PAGE)]
    links = [f"docs/{p}" for p in re.findall(r"\]\(([\w.-]+)\)", PAGE)]
    assert paths and links and [p for p in paths + links if not (ROOT / p).exists()] == []
