"""The example in the README runs as it stands, and is as short as it says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[0]


def test_the_example_runs_and_spends_no_more_than_it_asked_for(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", EXAMPLE], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    spent = re.search(r"ε = ([\d.]+) at δ = 1e-05", done.stdout)
    assert spent is not None and 0 < float(spent.group(1)) <= 8


def test_the_example_has_about_twenty_lines_of_code() -> None:
    assert len([line for line in EXAMPLE.splitlines() if line.strip()]) <= 20
