"""`dpbitfit ort-train`: private training from an export on the user's own file, on a machine without PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from dpbitfit_fx.console import (
    EvalFile,
    LedgerFile,
    LedgerUser,
    Overwrite,
    PhysicalBatchSize,
    PriorFiles,
    Resume,
    TuningCovered,
    busy,
    console,
    names,
)
from dpbitfit_fx.errors import DataError

__all__ = ["ort_budget", "ort_train"]


def ort_budget(
    artifacts: Annotated[Path, typer.Argument(help="Folder of an export (`dpbitfit export --format onnx`).")],
    dataset_size: Annotated[int, typer.Option(help="The public number of records to plan for.")],
    target_epsilon: Annotated[float, typer.Option(help="Never exceeded, earlier runs included.")],
    target_delta: Annotated[float | None, typer.Option(help="Below 1/N; default: the export's plan.")] = None,
    steps: Annotated[
        int | None, typer.Option(help="Logical steps; default: as many as stay within the target.")
    ] = None,
    prior: PriorFiles = None,
    tuning_covered: TuningCovered = False,
) -> None:
    """Write budget.json beside an export: epsilon after every step, for trainers in other languages."""
    from dpbitfit_fx.accounting import format_epsilon
    from dpbitfit_fx.ort_budget import attach_budget

    with busy("matching the seal, and accounting"):
        made = attach_budget(
            artifacts,
            dataset_size=dataset_size,
            target_epsilon=target_epsilon,
            target_delta=target_delta,
            steps=steps,
            prior=list(prior or ()),
            tuning_covered=tuning_covered,
        )
    console().print(
        f"{escape(str(artifacts / 'budget.json'))}: {made['steps']} steps, each record drawn with probability "
        f"{made['sample_rate']:.4g} at each, spend epsilon = {format_epsilon(made['epsilon_by_step'][-1])} at delta = "
        f"{made['target_delta']:g}."
    )


def ort_train(
    artifacts: Annotated[Path, typer.Argument(help="Folder of an export (`dpbitfit export`, or from Python).")],
    data: Annotated[
        Path, typer.Option(help="Private records: .csv, .tsv or .jsonl, or .npz with an array per batch entry.")
    ],
    output: Annotated[Path, typer.Option(help="Receives biases.safetensors, privacy.json and summary.md.")],
    text_column: Annotated[str, typer.Option()] = "text",
    label_column: Annotated[str, typer.Option(help="In .npz: the entry with the class numbers.")] = "label",
    labels: Annotated[str | None, typer.Option(help="The label set, where the export does not know it.")] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="tokenizer.json, where the export does not carry it.")] = None,
    steps: Annotated[int | None, typer.Option(help="Logical steps; default: the export's plan.")] = None,
    epochs: Annotated[float | None, typer.Option(help="In place of --steps.")] = None,
    target_epsilon: Annotated[
        float | None, typer.Option(help="Refuse a plan that spends more, earlier runs included.")
    ] = None,
    target_delta: Annotated[float | None, typer.Option(help="Below 1/N; default: the export's plan.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Default: the export's.")] = None,
    lr_schedule: Annotated[str | None, typer.Option(help="constant, or linear (falls to zero).")] = None,
    warmup_steps: Annotated[int, typer.Option(help="Steps over which the learning rate grows.", min=0)] = 0,
    padded_lengths: Annotated[
        str | None, typer.Option(help="Public lengths such as 16,32,64, of an export with a free length.")
    ] = None,
    physical_batch_size: PhysicalBatchSize = 32,
    dataset_size: Annotated[int | None, typer.Option(help="The public N; default: the export's plan.")] = None,
    eval_file: EvalFile = None,
    device: Annotated[str, typer.Option(help="cpu, or cuda with an ONNX Runtime that has it.")] = "cpu",
    prior: PriorFiles = None,
    ledger: LedgerFile = None,
    ledger_user: LedgerUser = None,
    checkpoint_every: Annotated[int, typer.Option(help="Steps between checkpoints.", min=1)] = 50,
    resume: Resume = True,
    overwrite: Overwrite = False,
    tuning_covered: TuningCovered = False,
) -> None:
    """Train from an export on private records, in ONNX Runtime, without PyTorch."""
    from dpbitfit_fx.accounting import format_epsilon
    from dpbitfit_fx.data import parse_lengths
    from dpbitfit_fx.files import ensure_output_folder
    from dpbitfit_fx.ledger import Ledger
    from dpbitfit_fx.ort_artifacts import read_manifest
    from dpbitfit_fx.ort_evaluate import Evaluator
    from dpbitfit_fx.ort_records import Records
    from dpbitfit_fx.ort_runner import OrtTrainer, Schedule

    lengths = None if padded_lengths is None else parse_lengths(padded_lengths)
    schedule = None if lr_schedule is None and not warmup_steps else Schedule(lr_schedule or "constant", warmup_steps)
    with busy("reading the artifacts and the records"):
        manifest = read_manifest(artifacts, verify=False)  # OrtTrainer verifies every file, these among them
        ensure_output_folder(output)
        declared = names(labels, "--labels")
        reader = Reader(artifacts, manifest, data, text_column, label_column, declared, tokenizer, lengths)
        private = reader.read(data)
        public, evaluator = None, None
        if eval_file is not None:
            evaluator = Evaluator(artifacts, manifest, device)
            public = Records(manifest, reader.read(eval_file), reader.pad_values, lengths)
        trainer = OrtTrainer(
            artifacts,
            private,
            steps=steps,
            epochs=epochs,
            target_epsilon=target_epsilon,
            target_delta=target_delta,
            learning_rate=learning_rate,
            schedule=schedule,
            physical_batch_size=physical_batch_size,
            padded_lengths=lengths,
            pad_values=reader.pad_values,
            dataset_size=dataset_size,
            prior=list(prior or ()),
            ledger=None if ledger is None else Ledger(ledger, who=ledger_user),
            output_dir=output,
            checkpoint_every=checkpoint_every,
            resume=resume,
            overwrite=overwrite,
            tuning_covered=tuning_covered,
            public_declarations=reader.declared,
            device=device,
        )

    def scores(running: OrtTrainer) -> dict[str, float]:
        assert evaluator is not None and public is not None
        return evaluator.scores(public, running.flat(), reader.label_entry)

    with trainer:
        if trainer.step:
            console().print(f"Resumed at step {trainer.step}.")
        trainer.train(eval_fn=None if evaluator is None else scores, progress=True)
        statement = trainer.finish()
    for name in ("accuracy", "loss"):
        if trainer.history and name in trainer.history[-1]:
            console().print(f"{name} on the public file: {trainer.history[-1][name]:.4g}")
    lost = f" and {statement.lost_steps} lost ones" if statement.lost_steps else ""
    console().print(
        f"epsilon = {format_epsilon(statement.epsilon)} at delta = {statement.delta:g}, noise multiplier "
        f"{statement.noise_multiplier:.4g}, {statement.steps} steps{lost}. Everything is in {escape(str(output))}."
    )


class Reader:
    """The records of a file: arrays from .npz as they are, texts by the export's tokenizer and label set."""

    def __init__(
        self,
        artifacts: Path,
        manifest: dict[str, Any],
        data: Path,
        text_column: str,
        label_column: str,
        declared: list[str] | None,
        tokenizer: Path | None,
        lengths: tuple[int, ...] | None = None,
    ) -> None:
        from dpbitfit_fx.ort_text import TextInput, labels_of

        self._columns = (text_column, label_column)
        self._text: TextInput | None = None
        self._labels: list[str] | None = None
        self.pad_values: dict[str, float] = {}
        self.declared: dict[str, Any] = {}
        self.label_entry = label_column
        if data.suffix.lower() == ".npz":
            return
        self._text, self._labels = TextInput(artifacts, manifest, tokenizer, lengths), labels_of(manifest, declared)
        if self._labels is None:
            raise DataError("The export does not know the label set. Declare it, in the model's order: --labels a,b,c.")
        self.pad_values, self.label_entry = self._text.pad_values, self._text.paths["labels"]
        source = "the export's" if declared is None else "declared"
        self.declared = {"label_set": self._labels, "label_set_source": source, "text": "longer texts are cut"}

    def read(self, path: Path) -> Any:
        from dpbitfit_fx.data import read_table
        from dpbitfit_fx.ort_records import read_arrays

        if self._text is None:
            return read_arrays(path)
        return self._text.records(read_table(path, *self._columns, self._labels))
