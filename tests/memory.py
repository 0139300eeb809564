"""The most memory that one call takes, by the profiler's record of torch's allocator."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def peak_bytes(run: Callable[[], Any], folder: Path) -> int:
    """The most that torch's allocator had handed out at once, beyond what was there before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    profile.export_chrome_trace(str(folder / "trace.json"))
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    live = most = 0
    for event in sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: float(e["ts"])):
        live += int(event["args"]["Bytes"])
        most = max(most, live)
    return most
