"""The layout of design section 1 stays true: passes/ installs as dpbitfit_fx.passes, from wheel, sdist and editable."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
WHERE = "import dpbitfit_fx.passes.errors as e, dpbitfit_fx as d; print(d.__file__); print(e.__file__)"
LEAK = "import importlib.util as u; print(u.find_spec('passes'))"


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run([str(c) for c in command], cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources without git, caches or environments, the symlink kept."""
    copy = tmp_path_factory.mktemp("tree") / "source"
    copy.mkdir()
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("dpbitfit_fx", "passes"):
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy2(ROOT / name, copy / name)
    return copy


@pytest.fixture(scope="module")
def built(tree: Path) -> tuple[Path, Path]:
    """(wheel, sdist); the wheel is built from the sdist, as the package index would see it."""
    pytest.importorskip("build")
    out = tree.parent / "dist"
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, tree, cwd=tree.parent)
    return next(out.glob("*.whl")), next(out.glob("*.tar.gz"))


def modules(folder: str) -> set[str]:
    return {p.name for p in (ROOT / folder).glob("*.py")}


def test_the_link_for_type_checkers_is_a_relative_symlink() -> None:
    link = ROOT / "dpbitfit_fx" / "passes"
    assert link.is_symlink() and str(link.readlink()) == "../passes"


def test_the_wheel_holds_every_module_once_and_no_top_level_passes(built: tuple[Path, Path]) -> None:
    names = zipfile.ZipFile(built[0]).namelist()
    assert len(names) == len(set(names))
    in_wheel = [n for n in names if not n.startswith("dpbitfit_fx-")]
    expected = {f"dpbitfit_fx/{n}" for n in modules("dpbitfit_fx")} | {
        f"dpbitfit_fx/passes/{n}" for n in modules("passes")
    }
    assert set(in_wheel) == expected | {"dpbitfit_fx/py.typed", "dpbitfit_fx/cuda_kernels.json"}


def test_the_sdist_holds_the_compiler_once(built: tuple[Path, Path]) -> None:
    with tarfile.open(built[1]) as sdist:
        names = sdist.getnames()
    assert sum(n.endswith("passes/errors.py") for n in names) == 1
    assert not [n for n in names if "/dpbitfit_fx/passes" in n]


def test_an_installed_wheel_imports_from_where_it_was_installed(built: tuple[Path, Path], tmp_path: Path) -> None:
    site = tmp_path / "site"
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index")
    run(*pip, "--target", site, built[0], cwd=tmp_path)
    # -I -S: nothing of this environment, the editable install included, can answer the import instead.
    start = f"import sys; sys.path.insert(0, {str(site)!r}); "
    found = run(sys.executable, "-I", "-S", "-c", start + WHERE, cwd=tmp_path).split()
    assert [Path(f).relative_to(site).as_posix() for f in found] == [
        "dpbitfit_fx/__init__.py",
        "dpbitfit_fx/passes/errors.py",
    ]
    assert run(sys.executable, "-I", "-S", "-c", start + LEAK, cwd=tmp_path).strip() == "None"
    assert (site / "bin" / "dpbitfit").exists()


def test_an_editable_install_imports_from_the_working_tree(tree: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-build-isolation")
    run(*pip, "--target", site, "--editable", tree, cwd=tmp_path)
    start = f"import site; site.addsitedir({str(site)!r}); "
    found = run(sys.executable, "-I", "-S", "-c", start + WHERE, cwd=tmp_path).split()
    assert [Path(f).resolve() for f in found] == [tree / "dpbitfit_fx" / "__init__.py", tree / "passes" / "errors.py"]
    assert run(sys.executable, "-I", "-S", "-c", start + LEAK, cwd=tmp_path).strip() == "None"
