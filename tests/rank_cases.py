"""Several processes that run the same function as the ranks of one gloo group, forked from this one with all its patches."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch.distributed as dist

PATIENCE = timedelta(seconds=60)


@dataclass(frozen=True)
class Ended:
    """How one rank ended: with a value, with an error (its class and text), or neither: its exit code says how."""

    value: Any = None
    error: tuple[str, str] | None = None
    exitcode: int | None = 0


def _rank(rank: int, count: int, file: str, work: Callable[[int], Any], report: Connection) -> None:
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=count, timeout=PATIENCE)
    try:
        ended = Ended(work(rank))
    except BaseException as error:
        ended = Ended(error=(type(error).__name__, str(error)))
    report.send_bytes(pickle.dumps(ended))
    dist.destroy_process_group()


def together(count: int, work: Callable[[int], Any]) -> list[Ended]:
    """`work(rank)` in `count` processes at once; how each of them ended."""
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        running = []
        for rank in range(count):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_rank, args=(rank, count, str(Path(folder) / "store"), work, theirs))
            process.start()
            theirs.close()
            running.append((process, ours))
        found = []
        for process, report in running:
            try:
                ended = pickle.loads(report.recv_bytes()) if report.poll(2 * PATIENCE.total_seconds()) else None
            except EOFError:
                ended = None
            if ended is None and process.exitcode is None:
                process.join(1)
            process.kill() if ended is None else process.join()
            process.join()
            found.append(ended or Ended(exitcode=process.exitcode))
    return found


def of_rank_0(count: int, work: Callable[[], Any]) -> Any:
    """What rank 0 makes of `work`, which all ranks do."""
    first, *others = together(count, lambda rank: work())
    problems = [ended for ended in (first, *others) if ended.error or ended.exitcode]
    assert not problems, problems
    return first.value


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
