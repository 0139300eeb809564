"""A damaged file is read as what it was, or refused by an error of ours; nothing that is read is ever executed."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

from corrupted_files import Case, build, judge
from test_architecture import LIBRARY, PASSES, ROOT, dotted

VARIANTS = 930


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> list[Case]:
    return build(tmp_path_factory.mktemp("files"))


def test_a_damaged_file_gives_the_state_it_had_or_a_clear_error(cases: list[Case]) -> None:
    found = judge(cases, VARIANTS, seed=1)
    assert {name: tally.wrong for name, tally in found.items() if tally.wrong} == {}
    for name, tally in found.items():
        assert sum(tally.counts.values()) >= 30, (name, len(found))
        if not any(word in name for word in ("hash made right", "records:", "run.json")):
            assert tally.counts["refused"] > 20, (name, tally.counts)  # a fuzz that damages nothing proves nothing


def test_the_judge_sees_a_raw_error_and_another_state(tmp_path: Path) -> None:
    path = tmp_path / "numbers.json"
    path.write_text('{"steps": 12, "rate": 0.5}')

    def read() -> Any:
        import json

        return json.loads(path.read_text())["steps"] + 1

    tally = judge([Case("naive", path, read, True)], 60, seed=0)["naive"]
    assert tally.counts["raw"] > 5 and tally.counts["other"] > 0 and len(tally.wrong) > 5


def calls(path: Path) -> list[tuple[str, ast.Call]]:
    return [(dotted(n.func), n) for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]


SOURCES = [*PASSES, *LIBRARY, *sorted((ROOT / "tools").rglob("*.py"))]
EXECUTES = ("eval", "exec", "compile", "__import__", "marshal.loads", "marshal.load", "yaml.load", "yaml.unsafe_load")
UNPICKLES = ("torch.load", "torch.jit.load", "torch.package.PackageImporter", "pandas.read_pickle", "joblib.load")


MUST = {"trust_remote_code": False, "use_safetensors": True}


def options(path: Path) -> list[tuple[str, ast.expr, int]]:
    """Keywords of calls and string keys of dictionaries, with their values."""
    found: list[tuple[str, ast.expr, int]] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.keyword) and node.arg is not None:
            found.append((node.arg, node.value, node.lineno))
        elif isinstance(node, ast.Dict):
            pairs = zip(node.keys, node.values, strict=True)
            found += [
                (k.value, v, v.lineno) for k, v in pairs if isinstance(k, ast.Constant) and isinstance(k.value, str)
            ]
    return found


def test_nothing_that_is_read_can_execute_code() -> None:
    bad = []
    for path in SOURCES:
        for name, call in calls(path):
            where = f"{path.relative_to(ROOT)}:{call.lineno} {name}"
            if name in EXECUTES or name in UNPICKLES or "pickle" in name.lower():
                bad.append(where)
            if name in ("np.load", "numpy.load"):
                allowed = [k.value for k in call.keywords if k.arg == "allow_pickle"]
                if not (len(allowed) == 1 and isinstance(allowed[0], ast.Constant) and allowed[0].value is False):
                    bad.append(where)
        for option, value, line in options(path):
            if option in MUST and not (isinstance(value, ast.Constant) and value.value is MUST[option]):
                bad.append(f"{path.relative_to(ROOT)}:{line} {option}")
    assert bad == []
    given = {name for path in SOURCES for name, _, _ in options(path)}
    assert MUST.keys() <= given  # Hugging Face models are read with both
