"""Rules of the house that a reader would otherwise have to check by eye, read off the sources."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest

from dpbitfit_fx.passes.pipeline import CAPTURE, LOWERING, PIPELINE, RELEASE

ROOT = Path(__file__).resolve().parents[1]
PASSES = sorted((ROOT / "passes").glob("*.py"))
LIBRARY = sorted((ROOT / "dpbitfit_fx").glob("*.py"))
# The modules that hold a Pass: none may import another. The rest of passes/ is what they share.
PASS_MODULES = {item.run.__module__.rsplit(".", 1)[-1] for item in (CAPTURE, *PIPELINE, *RELEASE, *LOWERING)}


def imports(path: Path) -> list[tuple[str, int]]:
    """Absolute dotted names a file imports, `from a import b` as a.b; relative ones in passes/ start with a dot."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = "." * node.level + (node.module or "")
            join = "" if start.endswith(".") else "."
            found += [(f"{start}{join}{alias.name}", node.lineno) for alias in node.names]
    return found


def dotted(node: ast.AST) -> str:
    """`torch._ops.OpOverload` for the attribute chain that spells it, '' for anything else."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(parts)]) if isinstance(node, ast.Name) else ""


def names_used(path: Path) -> list[tuple[str, int]]:
    tree = ast.parse(path.read_text())
    return imports(path) + [(dotted(n), n.lineno) for n in ast.walk(tree) if isinstance(n, ast.Attribute)]


def offenders(paths: list[Path], pattern: str, found: str = "names_used") -> list[str]:
    look = imports if found == "imports" else names_used
    return [f"{p.relative_to(ROOT)}:{line} {name}" for p in paths for name, line in look(p) if re.match(pattern, name)]


def tracked() -> list[Path]:
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip("not a git checkout")
    return [p for name in done.stdout.split("\n") if name and (p := ROOT / name).is_file() and not p.is_symlink()]


def test_the_compiler_never_imports_the_library() -> None:
    assert offenders(PASSES, r"dpbitfit_fx", "imports") == []


def test_the_compiler_knows_nothing_of_trainers_files_or_onnx_runtime() -> None:
    outside = r"(onnx|onnxscript|onnxruntime|transformers|safetensors|typer|rich|pathlib|dp_accounting)\b"
    assert offenders(PASSES, outside, "imports") == []


def test_no_pass_imports_another_pass() -> None:
    others = "|".join(sorted(PASS_MODULES))
    passes = [p for p in PASSES if p.stem in PASS_MODULES]
    assert passes and offenders(passes, rf"\.({others})(\.|$)", "imports") == []


def test_no_module_is_imported_as_top_level_passes() -> None:
    assert offenders(PASSES + LIBRARY + sorted((ROOT / "tests").glob("*.py")), r"passes(\.|$)", "imports") == []


def test_private_torch_names_stay_in_one_file() -> None:
    private = r"torch(\.\w+)*\._[a-z]|torch\.fx\.experimental|functorch"
    rest = [p for p in PASSES + LIBRARY if p != ROOT / "passes" / "torch_private.py"]
    # Private *operators* (torch.ops.aten._to_copy) are part of the graph we read, not an API of torch.
    found = [o for o in offenders(rest, private) if not re.search(r" torch\.ops\.", o)]
    assert found == []


def test_nothing_is_pickled() -> None:
    assert offenders(PASSES + LIBRARY, r"(pickle|cloudpickle|dill|joblib|shelve)\b|torch\.(save|load)$") == []


def test_the_library_does_not_print() -> None:
    calls = [
        f"{p.relative_to(ROOT)}:{n.lineno}"
        for p in PASSES + LIBRARY
        for n in ast.walk(ast.parse(p.read_text()))
        if isinstance(n, ast.Call) and isinstance(n.func, ast.Name) and n.func.id == "print"
    ]
    assert calls == []


def test_noise_and_draws_never_come_from_a_general_purpose_generator() -> None:
    weak = r"torch\.(randn|rand|normal|bernoulli|randperm|randint)(_like)?$|(np|numpy)\.random\.(normal|rand)"
    private = [
        ROOT / "dpbitfit_fx" / f"{n}.py"
        for n in ("randomness", "sampling", "fit", "engine", "training_run", "ort_runner", "ort_run", "ort_backends", "compile")
    ]
    assert offenders([p for p in private if p.exists()], weak) == []


def test_a_file_of_the_compiler_can_be_read_in_one_sitting() -> None:
    long = {str(p.relative_to(ROOT)): n for p in PASSES if (n := len(p.read_text().splitlines())) > 350}
    assert long == {}


def test_no_package_index_is_named_in_a_tracked_file() -> None:
    # Split, so that this file does not name one itself.
    hosts = ["pypi" + r"\.org", "pythonhosted" + r"\.org", "download" + r"\.pytorch"]
    index = re.compile("|".join([*hosts, "--find-" + "links", "/opt/" + "(wheels|pypi)"]))
    named = []
    for path in tracked():
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue
        named += [f"{path.relative_to(ROOT)}: {m.group()}" for m in index.finditer(text)]
    assert named == []


def test_no_weights_or_data_are_tracked() -> None:
    heavy = [str(p.relative_to(ROOT)) for p in tracked() if p.stat().st_size > 300_000]
    binary = [str(p) for p in tracked() if p.suffix in {".safetensors", ".onnx", ".pt", ".bin", ".whl", ".gz", ".npz"}]
    assert heavy == [] and binary == []
