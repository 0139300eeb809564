"""A process that has imported everything but torch, and forks one `dpbitfit ort-train` for each line it reads.

Starting Python takes longer than the runs that are to be killed. A line is the arguments, as JSON; the answers are the
child's process id and, once it has ended, its exit code (-9 where it was killed). `python ort_zygote.py ERRORS` writes
the children's standard error to the file ERRORS.
"""

from __future__ import annotations

import importlib
import importlib.abc
import json
import os
import sys
import traceback
from typing import Any

MODULES = ("ort_backends", "ort_evaluate", "ort_run", "ort_runner", "ort_text", "data", "cli")
RECORDS, BATCH, STEPS, SIGMA, DELTA = 24, 6.0, 30, 0.8, 1e-2


class NoTorch(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: Any, target: Any = None) -> None:
        if name.split(".")[0] == "torch":
            raise ImportError("torch is blocked")


def main() -> None:
    sys.meta_path.insert(0, NoTorch())
    for module in MODULES:
        importlib.import_module(f"dpbitfit_fx.{module}")
    import onnxruntime

    from dpbitfit_fx.accounting import epsilon
    from dpbitfit_fx.cli import app
    from dpbitfit_fx.ort_artifacts import training_api
    from dpbitfit_fx.sampling import PoissonSampler

    if os.path.isdir(os.path.join(os.path.dirname(onnxruntime.__file__), "training", "api")):
        training_api()
    epsilon(
        PoissonSampler.from_expected_batch_size(RECORDS, BATCH, steps=STEPS), SIGMA, DELTA
    )  # cached for the children
    errors = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            os.dup2(os.open(os.devnull, os.O_RDWR), 1)
            os.dup2(errors, 2)
            code = 1
            try:
                app(json.loads(line))
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else 1
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        sys.stdout.write(f"{child}\n")
        sys.stdout.flush()
        sys.stdout.write(f"{os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
