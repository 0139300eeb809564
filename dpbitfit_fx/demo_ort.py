"""`dpbitfit demo --without-pytorch`: the demo's whole private training by the runner that needs no torch.

Exported here once (`export_run`), trained and scored by `dpbitfit ort-train` in processes that cannot import torch.
"""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Final

import numpy as np
from rich.console import Console

from dpbitfit_fx.accounting import format_epsilon
from dpbitfit_fx.demo import DELTA, LABELS, PADDED_LENGTHS, Recipe, demo_assets
from dpbitfit_fx.errors import DPBitFitError
from dpbitfit_fx.files import atomic_write_text, ensure_output_folder

__all__ = ["run_without_pytorch"]

WITHOUT_TORCH: Final = """
import importlib.abc, sys
class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "transformers"):
            raise ImportError(name + " is blocked")
sys.meta_path.insert(0, Blocked())
from dpbitfit_fx.cli import main
main()
"""


def run_without_pytorch(
    output: Path,
    *,
    epsilon: float = 8.0,
    seeds: int = 1,
    cache: Path | None = None,
    console: Console | None = None,
    recipe: Recipe | None = None,
    limit: int | None = None,
) -> dict[str, Any]:
    """Exports the recipe to ``output/artifacts``, trains it in ``output/run-<n>``; returns the numbers that it prints.

    Args:
        limit: use only so many training and test records (for tests).

    Raises:
        DPBitFitError: a run failed, or PyTorch scores its biases otherwise than the runner did.
    """
    console = console or Console(quiet=True)
    recipe = recipe or Recipe()
    ensure_output_folder(output)
    directory, training, test = demo_assets(cache, limit, console)
    for name, table in (("training", training), ("test", test)):
        with open(output / f"{name}.csv", "w", newline="", encoding="utf-8") as file:
            rows = csv.writer(file)
            rows.writerow(["text", "label"])
            rows.writerows((text, LABELS[label]) for text, label in zip(table.texts, table.labels, strict=True))

    begin = time.perf_counter()
    with console.status("exporting the run of two phases, with numeric checks"):
        from dpbitfit_fx.biases import load_biases
        from dpbitfit_fx.data import tokenize
        from dpbitfit_fx.huggingface import (
            accuracy,
            load_classifier,
            load_tokenizer,
            logits_of,
            made_up_batch,
            text_loss,
        )
        from dpbitfit_fx.onnx_run import export_run
        from dpbitfit_fx.ort_text import attach_text

        tokenizer = load_tokenizer(directory)
        artifacts = export_run(
            load_classifier(directory, len(LABELS)),
            text_loss,
            made_up_batch(PADDED_LENGTHS[-1], int(tokenizer.vocab_size)),
            output / "artifacts",
            phases=recipe.run_phases(len(training)),
            dataset_size=len(training),
            target_delta=DELTA,
            target_epsilon=epsilon,
            padded_lengths={"input_ids": PADDED_LENGTHS, "attention_mask": PADDED_LENGTHS},
            eval_output=logits_of,
            overwrite=True,
        )
        attach_text(artifacts, tokenizer.backend_tokenizer.to_str(), LABELS, tokenizer.pad_token_id or 0)
    exported = time.perf_counter() - begin
    console.print(f"Exported in {exported:.0f} s: {len(training)} training and {len(test)} test sentences.")

    held_out = tokenize(test, tokenizer, PADDED_LENGTHS[-1])
    scores, seconds = [], []
    for number in range(1, seeds + 1):
        folder = output / f"run-{number}"
        if folder.exists():
            shutil.rmtree(folder)  # the reviews are public: every run of the demo stands for a first one
        begin = time.perf_counter()
        with console.status(f"training without PyTorch, run {number} of {seeds}"):
            said = _train(artifacts, output, folder, recipe.physical_batch_size)
        seconds.append(time.perf_counter() - begin)
        model = load_biases(load_classifier(directory, len(LABELS)), folder / "biases.safetensors")
        scores.append(accuracy(model, held_out))
        if abs(said - scores[-1]) > 5e-3:
            raise DPBitFitError(f"The runner scored {said:.4f} on the test split, and PyTorch {scores[-1]:.4f}.")
        console.print(f"run {number}: test accuracy {scores[-1]:.1%}, {seconds[-1]:.0f} s")
    spent = json.loads((output / "run-1" / "privacy.json").read_text())["epsilon"]
    console.print(
        f"DP-BiTFiT without PyTorch, epsilon = {format_epsilon(spent)}: test accuracy {np.mean(scores):.1%}, mean of {seeds} "
        "run(s)."
    )
    numbers = {"epsilon": spent, "accuracies": scores, "seconds": seconds, "export_seconds": exported}
    atomic_write_text(output / "without-pytorch.json", json.dumps(numbers, indent=2) + "\n")
    return numbers


def _train(artifacts: Path, data: Path, folder: Path, rows: int) -> float:
    """One run of `dpbitfit ort-train` where torch cannot be imported; the accuracy that it reports."""
    options = {
        "--data": data / "training.csv",
        "--eval-file": data / "test.csv",
        "--output": folder,
        "--physical-batch-size": rows,
    }
    words = ["ort-train", os.fspath(artifacts), *(str(word) for pair in options.items() for word in pair)]
    command = [sys.executable, "-c", WITHOUT_TORCH, *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - our own command line
    found = re.search(r"accuracy on the public file: ([\d.]+)", done.stdout)
    if done.returncode != 0 or found is None:
        raise DPBitFitError(f"`dpbitfit ort-train` failed: {done.stderr.strip()[-500:] or done.stdout[-500:]}")
    return float(found[1])
