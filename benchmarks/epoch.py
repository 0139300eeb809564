"""One epoch of the demo's records at epsilon = 8, Poisson sampling and all, each system in a process of its own.

    tools/bench epoch [--systems ours ours-bf16 opacus-bias opacus-full] [--epochs 1] [--json FILE]
    tools/bench epoch --systems ours-last-two ours-last-two-kept      (biases of the last two blocks of six)

The same for all: MiniLM, biases and head, expected batch 256, micro-batches of at most 32 rows, flat clipping at R = 0.1,
Adam with rate 5e-3, no dropout. Ours is `fit` with a few public padded lengths; Opacus is `make_private_with_epsilon` with
its own Poisson loader and `BatchMemoryManager`, every micro-batch padded to its longest record; non-private tuning takes
shuffled batches of 32, padded so too. Time is counted from the end of the first logical step to the end of the last, scaled
to an epoch: compiling is told apart. Systems run one after another, so leave the machine alone meanwhile.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch.nn.utils.rnn import pad_sequence

import dpbitfit_fx as dpb
from dpbitfit_fx.data import TokenizedText, tokenize
from dpbitfit_fx.demo import LABELS, PADDED_LENGTHS, demo_assets
from dpbitfit_fx.huggingface import accuracy, load_classifier, load_tokenizer, text_loss

from .worker import own_output

ROOT = Path(__file__).resolve().parents[1]
EPSILON, DELTA, BATCH, ROWS, NORM, RATE = 8.0, 1e-5, 256, 32, 0.1, 5e-3
LAST_TWO: dict[str, Any] = {"exclude": ["*embeddings*", "*layer.[0-3].*"]}
OURS: dict[str, dict[str, Any]] = {
    "ours": {},
    "ours-bf16": {"precision": "bf16"},
    "ours-inductor-bf16": {"precision": "bf16", "backend": "inductor"},
    "ours-last-two": LAST_TWO,
    "ours-last-two-kept": {**LAST_TWO, "cache_frozen_prefix": True},
}
SYSTEMS = ("bias", *OURS, "opacus-bias", "opacus-full")
USUAL = ("bias", "ours", "ours-bf16", "opacus-bias", "opacus-full")


class Clock:
    """CPU and wall seconds from the first mark to the last, and until the first."""

    def __init__(self) -> None:
        self.begin, self.marks = time.perf_counter(), list[tuple[float, float]]()

    def mark(self, _: Any = None) -> None:
        self.marks.append((time.process_time(), time.perf_counter()))

    def seconds(self, steps: float) -> dict[str, float]:
        """Of so many steps, at the pace of those measured."""
        (cpu, wall), (cpu_end, wall_end) = self.marks[0], self.marks[-1]
        scale = steps / (len(self.marks) - 1)
        return {"cpu": (cpu_end - cpu) * scale, "wall": (wall_end - wall) * scale, "start": wall - self.begin}


def padded(items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """As a data collator does: to the longest of these records."""
    names = ("input_ids", "attention_mask")
    texts = {name: pad_sequence([item[name] for item in items], batch_first=True) for name in names}
    return {**texts, "labels": torch.tensor([item["labels"] for item in items])}


def bias_parameters(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    for name, p in model.named_parameters():
        p.requires_grad_(name.endswith("bias") or name.startswith("head."))
    return [p for p in model.parameters() if p.requires_grad]


def plain(model: torch.nn.Module, data: TokenizedText, epochs: int, clock: Clock) -> None:
    optimizer = torch.optim.Adam(bias_parameters(model), lr=RATE / 2)
    loader = torch.utils.data.DataLoader(data, ROWS, shuffle=True, collate_fn=padded)  # type: ignore[arg-type,var-annotated]
    for _ in range(epochs):
        for batch in loader:
            optimizer.zero_grad()
            torch.autograd.backward(text_loss(model, batch).mean())
            optimizer.step()
            clock.mark()


def ours(
    model: torch.nn.Module, data: TokenizedText, epochs: int, clock: Clock, **options: Any
) -> None:
    """``parallel_batches`` is for the eager backend; Inductor gets as many rows in one physical batch."""
    together = torch.get_num_threads() if options.get("backend", "eager") == "eager" else 1
    dpb.fit(
        model,
        text_loss,
        data,
        target_epsilon=EPSILON,
        target_delta=DELTA,
        epochs=epochs,
        expected_batch_size=BATCH,
        physical_batch_size=ROWS // 2 if together > 1 else ROWS,
        parallel_batches=together,
        trainable=["bias", "head.*"],
        clipping=dpb.FlatClipping(max_grad_norm=NORM),
        **options,
        optimizer=torch.optim.Adam,
        learning_rate=RATE,
        padded_lengths={"input_ids": PADDED_LENGTHS, "attention_mask": PADDED_LENGTHS},
        callbacks=[clock.mark],
    )


def opacus(model: torch.nn.Module, data: TokenizedText, epochs: int, clock: Clock, biases: bool) -> None:
    library = importlib.import_module("opacus")
    manager = importlib.import_module("opacus.utils.batch_memory_manager").BatchMemoryManager
    trained = bias_parameters(model) if biases else list(model.parameters())
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.encoder.register_forward_pre_hook(_spell_positions_out, with_kwargs=True)  # type: ignore[union-attr]
    engine = library.PrivacyEngine()
    loader = torch.utils.data.DataLoader(data, BATCH, collate_fn=padded)  # type: ignore[arg-type,var-annotated]
    private, optimizer, loader = engine.make_private_with_epsilon(
        module=model.train(),
        optimizer=torch.optim.Adam(trained, lr=RATE if biases else RATE / 10),
        data_loader=loader,
        target_epsilon=EPSILON,
        target_delta=DELTA,
        epochs=epochs,
        max_grad_norm=NORM,
    )
    for _ in range(epochs):
        with manager(data_loader=loader, max_physical_batch_size=ROWS, optimizer=optimizer) as parts:
            for batch in parts:
                optimizer.zero_grad()
                text_loss(private, batch).mean().backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                if not optimizer._is_last_step_skipped:
                    clock.mark()


def _spell_positions_out(_: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Position ids [B, T]: the [1, T] that BERT makes by itself have no per-sample gradient in Opacus."""
    ids = kwargs["input_ids"]
    return args, {**kwargs, "position_ids": torch.arange(ids.shape[1]).expand(ids.shape)}


def run(system: str, epochs: int, limit: int | None) -> dict[str, Any]:
    directory, training, test = demo_assets(None, limit, Console(quiet=True))
    tokenizer = load_tokenizer(directory)
    records, held_out = (tokenize(part, tokenizer, PADDED_LENGTHS[-1]) for part in (training, test))
    torch.manual_seed(0)
    model, clock = load_classifier(directory, len(LABELS)).eval(), Clock()
    per_epoch = len(records) / BATCH
    if system == "bias":
        plain(model, records, epochs, clock)
        per_epoch = len(records) / ROWS
    elif system.startswith("ours"):
        ours(model, records, epochs, clock, **OURS[system])
    else:
        opacus(model, records, epochs, clock, system == "opacus-bias")
    found = {**clock.seconds(per_epoch), "steps": len(clock.marks)}
    return {**found, "accuracy": accuracy(model.eval(), held_out)}


def children(options: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    limit = [] if options.limit is None else ["--limit", str(options.limit)]
    for system in options.systems:
        command = [sys.executable, "-m", "benchmarks.epoch", system, "--epochs", str(options.epochs), *limit]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)  # noqa: S603
        if done.returncode != 0:
            raise SystemExit(f"{system} ended with status {done.returncode}; its error is above.")
        yield system, json.loads(done.stdout.splitlines()[-1])


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="tools/bench epoch", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(USUAL))
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--limit", type=int, help="so many records only, to try the command")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    found: dict[str, Any] = {}
    print("| system | CPU s an epoch | wall s an epoch | until the first step, s | test accuracy | steps |")
    print("|---|---|---|---|---|---|")
    for system, r in children(options):
        found[system] = r
        print(
            f"| {system} | {r['cpu']:.1f} | {r['wall']:.1f} | {r['start']:.1f} | {r['accuracy']:.1%} | {r['steps']} |",
            flush=True,
        )
        if options.json:
            options.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    child = argparse.ArgumentParser()
    child.add_argument("system", choices=SYSTEMS)
    child.add_argument("--epochs", type=int, required=True)
    child.add_argument("--limit", type=int)
    given = child.parse_args()
    answers = own_output()
    print(json.dumps(run(given.system, given.epochs, given.limit)), file=answers, flush=True)
