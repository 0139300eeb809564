"""What the fork server of ``kill_cases`` imports and computes once, before it forks: no run that is killed repeats it."""

from __future__ import annotations

import contextlib

import dp_accounting  # noqa: F401
import torch
from fit_cases import RECORDS
from kill_cases import BATCH, DELTA, SIGMA, STEPS, ort_records

import dpbitfit_fx.compile
import dpbitfit_fx.ort_runner  # noqa: F401
from dpbitfit_fx.accounting import epsilon
from dpbitfit_fx.sampling import PoissonSampler

with contextlib.suppress(ImportError):
    import onnx  # noqa: F401
    import onnxruntime  # noqa: F401

torch.set_num_threads(1)
for size, batch in ((RECORDS, BATCH["fit"]), (len(ort_records()), BATCH["ort"])):
    epsilon(PoissonSampler.from_expected_batch_size(size, batch, steps=STEPS), SIGMA, DELTA)
