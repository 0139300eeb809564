"""Several processes that run the same function as the ranks of one gloo group, forked from this one with all its patches."""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
import pickle
import signal
import tempfile
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import dp_accounting  # noqa: F401 - with what compiling imports: once here, and in no fork
import torch
import torch._dynamo
import torch.distributed as dist
import torch.export._trace
from fit_cases import RECORDS, points

PATIENCE = 60.0
READ_BEFORE = RECORDS + 2 * 16  # check_rows reads all, and compare some of them twice


@dataclasses.dataclass(frozen=True)
class Ended:
    """How one rank ended: with a value, with an error (its class and text), or neither: its exit code says how."""

    value: Any = None
    error: tuple[str, str] | None = None
    exitcode: int | None = 0


def _rank(rank: int, count: int, file: str, patience: float, work: Callable[[int], Any], report: Connection) -> None:
    wait = timedelta(seconds=patience)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=count, timeout=wait)
    try:
        ended = Ended(work(rank))
    except BaseException as error:
        ended = Ended(error=(type(error).__name__, str(error)))
    report.send_bytes(pickle.dumps(ended))
    if dist.is_initialized():
        dist.destroy_process_group()


def together(count: int, work: Callable[[int], Any], patience: float = PATIENCE) -> list[Ended]:
    """`work(rank)` in `count` processes at once, of a group with that timeout; how each of them ended."""
    assert torch.get_num_threads() == 1, "what is forked from a process with OpenMP threads hangs"
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        running = []
        for rank in range(count):
            ours, theirs = context.Pipe(duplex=False)
            file = str(Path(folder) / "store")
            process = context.Process(target=_rank, args=(rank, count, file, patience, work, theirs))
            process.start()
            theirs.close()
            running.append((process, ours))
        found = []
        for process, report in running:
            ended = Ended()
            if not report.poll(2 * PATIENCE):
                process.kill()
            with contextlib.suppress(EOFError):  # it died
                ended = pickle.loads(report.recv_bytes())
            process.join()
            found.append(dataclasses.replace(ended, exitcode=process.exitcode))
    return found


def of_rank_0(count: int, work: Callable[[], Any]) -> Any:
    """What rank 0 makes of `work`, which all ranks do."""
    first, *others = together(count, lambda rank: work())
    problems = [ended for ended in (first, *others) if ended.error or ended.exitcode]
    assert not problems, problems
    return first.value


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


# -- what stops a rank -------------------------------------------------------------------------------------------------


class Failing(torch.utils.data.Dataset[Any]):
    """Does something bad in the middle of training; where that gives something, it is the record."""

    def __init__(self, bad: Callable[[], Any], good: int = 60) -> None:
        self.records, self.bad, self.left = points(), bad, READ_BEFORE + good

    def __len__(self) -> int:
        return RECORDS

    def __getitem__(self, row: int) -> Any:
        self.left -= 1
        given = self.bad() if self.left == 0 else None
        return self.records[row] if given is None else given


def quoting() -> None:
    raise ValueError("the record itself")


def interrupted() -> None:
    raise KeyboardInterrupt
