"""Processes that spend from one ledger: several at once, and some that kill themselves.

`python ledger_cases.py race LEDGER COUNT STEPS`: COUNT processes, forked at one moment, each reserve STEPS steps; prints how
many were granted. `python ledger_cases.py kill FOLDER MOMENT...`: a run of 5 steps with FOLDER/MOMENT/ledger as its ledger,
killed with SIGKILL at each of the moments, each in a process of its own, forked when one step was compiled; prints their exit
codes.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

RECORDS, RATE, DELTA = 120, 20 / 120, 1e-3


def race(path: str, count: int, steps: int) -> None:
    import dpbitfit_fx.ledger as module
    from dpbitfit_fx.accounting import PriorRun, epsilon_of_runs
    from dpbitfit_fx.errors import PrivacyError
    from dpbitfit_fx.ledger import Ledger

    module._refusal = lambda *_: "no"  # what would fit takes the accountant a while
    for many in range(1, count + 1):  # cached for the children
        epsilon_of_runs([PriorRun("a", RATE, 1.0, many * steps)], DELTA)
    read, write = os.pipe()
    children = []
    for number in range(count):
        child = os.fork()
        if child == 0:
            os.close(write)
            os.read(read, 1)  # until the parent lets all of them go
            try:
                run = [PriorRun(f"run{number}", RATE, 1.0, steps)]
                Ledger(path).reserve(run, dataset_size=RECORDS, run_delta=DELTA)
            except PrivacyError:
                os._exit(3)
            except BaseException:
                os._exit(1)
            os._exit(0)
        children.append(child)
    os.close(write)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert set(codes) <= {0, 3}, codes
    print(codes.count(0))


def die_at(moment: str) -> None:
    from fit_cases import _kill_on_call

    from dpbitfit_fx.checkpoint import CheckpointStore
    from dpbitfit_fx.ledger import Ledger

    reserve: Any = Ledger.reserve
    append: Any = Ledger._append
    settle: Any = Ledger.settle
    if moment == "before-reserve":
        Ledger.reserve = _kill_on_call(reserve, 1, after=False)  # type: ignore[method-assign]
    elif moment == "half-reserved":

        def half(self: Ledger, descriptor: int, lines: list[bytes]) -> None:
            os.write(descriptor, lines[0][: len(lines[0]) // 2])
            os.kill(os.getpid(), 9)

        Ledger._append = half  # type: ignore[assignment, method-assign]
    elif moment == "reserved":
        Ledger._append = _kill_on_call(append, 1, after=True)  # type: ignore[method-assign]
    elif moment == "in-training":
        CheckpointStore.record = _kill_on_call(CheckpointStore.record, 4, after=True)  # type: ignore[method-assign]
    elif moment == "before-settling":
        Ledger.settle = _kill_on_call(settle, 1, after=False)  # type: ignore[method-assign]
    elif moment == "settled":
        Ledger.settle = _kill_on_call(settle, 1, after=True)  # type: ignore[method-assign]


def kill(folder: str, moments: list[str]) -> None:
    import torch
    from fit_cases import mlp, run

    torch.set_num_threads(1)
    module, model = sys.modules["dpbitfit_fx.fit"], mlp()
    start = {name: value.clone() for name, value in model.state_dict().items()}
    built: list[Any] = []
    build = module.build_engine

    def once(*arguments: Any, **names: Any) -> Any:
        built.extend([] if built else [build(*arguments, **names)])
        return built[0]

    module.build_engine = once  # type: ignore[attr-defined]
    plan: dict[str, Any] = {"max_steps": 5, "checkpoint_every": 2, "target_epsilon": None, "noise_multiplier": 1.0}
    run(None, model=model, **plan)
    codes = []
    for moment in moments:
        child = os.fork()
        if child == 0:
            try:
                die_at(moment)
                model.load_state_dict(start)
                run(Path(folder) / moment / "out", model=model, ledger=Path(folder) / moment / "ledger", **plan)
            finally:
                os._exit(1)
        codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    print(*codes)


if __name__ == "__main__":
    if sys.argv[1] == "race":
        race(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
    else:
        kill(sys.argv[2], sys.argv[3:])
