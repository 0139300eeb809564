"""The most memory that one call takes, by the profiler's record of torch's allocator."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def peak_bytes(run: Callable[[], Any]) -> int:
    """Largest sum of live bytes that torch's CPU allocator hands out in the call; what was alive before does not count."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    memory = [e for e in events if e.get("name") == "[memory]" and e["args"].get("Device Type") == 0]
    live = peak = 0
    for event in sorted(memory, key=lambda e: float(e["ts"])):
        live += int(event["args"]["Bytes"])
        peak = max(peak, live)
    return peak
