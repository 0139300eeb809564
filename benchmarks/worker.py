"""One system in one process: builds its step, then takes one whenever a line asks for it. Speaks JSON, a line an answer."""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any, TextIO

os.environ.setdefault("HF_HUB_OFFLINE", "1")


def resident() -> tuple[int, int]:
    """Bytes in memory now, once what was freed is given back, and their peak since the last :func:`forget_peak`."""
    ctypes.CDLL(None).malloc_trim(0)
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmRSS"].split()[0]) * 1024, int(fields["VmHWM"].split()[0]) * 1024


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def own_output() -> TextIO:
    """The output that our parent reads, for us alone: what libraries print goes to the error output and answers nothing."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return answers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("--system", "--model", "--device"):
        parser.add_argument(name, required=True)
    for name in ("--rows", "--size", "--threads", "--memory-limit"):
        parser.add_argument(name, type=int, required=True)
    parser.add_argument("--layers", type=int)
    options = parser.parse_args()
    answers = own_output()
    resource.setrlimit(resource.RLIMIT_DATA, (options.memory_limit, options.memory_limit))
    try:
        serve(options, answers)
    except Exception as error:
        said = " ".join(str(error).split())
        answer(answers, error=f"{type(error).__name__}: {said[:300]}")


def answer(answers: TextIO, **values: Any) -> None:
    print(json.dumps(values), file=answers, flush=True)


def serve(options: argparse.Namespace, answers: TextIO) -> None:
    import torch

    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
    from memory import peak_bytes

    from .floor import work
    from .models import build_case
    from .systems import SYSTEMS

    cuda = options.device == "cuda"
    if options.threads:
        torch.set_num_threads(options.threads)
    case = build_case(options.model, options.rows, options.size, options.layers)
    if options.system == "floor":
        answer(answers, **work(case))
        return
    if cuda and not SYSTEMS[options.system].cuda:
        raise RuntimeError("runs on the CPU alone")
    case = case.to(options.device)
    before, _ = resident()
    begin = time.perf_counter()
    step = SYSTEMS[options.system].build(case)
    step()
    if cuda:
        torch.cuda.synchronize()
    started = time.perf_counter() - begin
    step()
    answer(answers, started=started, kept=resident()[0] - before)
    forget_peak()
    for line in sys.stdin:
        if line.strip() == "step":
            cpu, wall = time.process_time(), time.perf_counter()
            step()
            if cuda:
                torch.cuda.synchronize()
            answer(answers, cpu=time.process_time() - cpu, wall=time.perf_counter() - wall)
        elif line.strip() == "memory":
            _, peak = resident()
            if cuda:
                torch.cuda.reset_peak_memory_stats()
                held = torch.cuda.memory_allocated()
                step()
                answer(answers, peak=torch.cuda.max_memory_allocated() - held, rss=peak)
            else:
                answer(answers, peak=peak_bytes(step) or None, rss=peak)  # ONNX Runtime asks its own allocator, not torch's


if __name__ == "__main__":
    main()
