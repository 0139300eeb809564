"""`dpbitfit audit`: attack a private run of the user's own model on the user's own file, and say how much it leaked."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from dpbitfit_fx.console import (
    ClippingKind,
    ExpectedBatchSize,
    Labels,
    LabelsFromData,
    LedgerFile,
    LedgerUser,
    PhysicalBatchSize,
    PriorFiles,
    TargetDelta,
    Trainable,
    busy,
    clipping_of,
    console,
    names,
    tokenised,
)
from dpbitfit_fx.errors import DataError, PrivacyError

if TYPE_CHECKING:
    from dpbitfit_fx.audit_report import AuditReport

__all__ = ["audit_text"]


def audit_text(
    model: Annotated[Path, typer.Argument(help="A local Hugging Face model directory, or the folder of an export.")],
    data: Annotated[Path, typer.Argument(help="Private records: .csv, .tsv or .jsonl (of an export also .npz).")],
    output: Annotated[Path, typer.Option(help="Receives audit.json, audit.txt and, with matplotlib, audit.png.")],
    target_epsilon: Annotated[float, typer.Option(help="What the run is to claim: the budget that is attacked.")],
    attack: Annotated[
        str | None,
        typer.Option(
            help="gradient (made-up canaries, the strongest; default), or records as canaries: white-box (of an export: "
            "default, and the only one) or black-box."
        ),
    ] = None,
    canaries: Annotated[
        int,
        typer.Option(help="How many; of white-box and black-box, so many records are taken out of the file.", min=1),
    ] = 1000,
    guesses: Annotated[int | None, typer.Option(help="How many of them to guess; default: half.", min=1)] = None,
    confidence: Annotated[float, typer.Option(help="With which the lower bound holds.")] = 0.95,
    text_column: Annotated[str, typer.Option()] = "text",
    label_column: Annotated[str, typer.Option()] = "label",
    labels: Labels = None,
    labels_from_data: LabelsFromData = False,
    padded_lengths: Annotated[str, typer.Option(help="Public token lengths, as for `train`.")] = "32,64,128",
    target_delta: TargetDelta = None,
    epochs: Annotated[float, typer.Option()] = 3.0,
    expected_batch_size: ExpectedBatchSize = 256,
    physical_batch_size: PhysicalBatchSize = 32,
    max_grad_norm: Annotated[float, typer.Option()] = 1.0,
    clipping: ClippingKind = "automatic",
    learning_rate: Annotated[float, typer.Option()] = 5e-3,
    trainable: Trainable = None,
    exclude: Annotated[str | None, typer.Option(help="Name patterns that are not trained.")] = None,
    prior: PriorFiles = None,
    ledger: LedgerFile = None,
    ledger_user: LedgerUser = None,
) -> None:
    """Attack a private run with canaries: a 95 % lower bound on epsilon beside the claimed one. A test, never a proof."""
    from dpbitfit_fx.files import ensure_output_folder
    from dpbitfit_fx.ledger import Ledger

    ensure_output_folder(output)
    budget: dict[str, Any] = {
        "prior": list(prior or ()),
        "ledger": None if ledger is None else Ledger(ledger, who=ledger_user),
    }
    if (model / "manifest.json").is_file():
        if attack not in (None, "white-box"):
            raise PrivacyError(
                "An export is audited with records as canaries and how its parameters move: --attack white-box."
            )
        how = {"canaries": canaries, "guesses": guesses, "confidence": confidence}
        columns = (text_column, label_column, names(labels, "--labels"))
        plan = {
            "target_epsilon": target_epsilon,
            "target_delta": target_delta,
            "physical_batch_size": physical_batch_size,
        }
        _show(_audit_of_export(model, data, columns, {**how, **plan, **budget}), output)
        return
    if (labels is None) == (not labels_from_data):
        raise DataError("Declare the label set with --labels a,b,c, or take it from the data with --labels-from-data.")
    patterns, left_out = names(trainable, "--trainable"), names(exclude, "--exclude") or []
    clip = clipping_of(clipping, max_grad_norm)
    from dpbitfit_fx.data import parse_lengths, read_table

    table = read_table(data, text_column, label_column, names(labels, "--labels"))

    with busy("loading the model"):
        from dpbitfit_fx.audit import audit
        from dpbitfit_fx.huggingface import default_trainable, load_classifier, load_tokenizer, text_loss

        tokenizer = load_tokenizer(model)
        network: Any = load_classifier(model, len(table.label_set))
    lengths = parse_lengths(padded_lengths)
    records = tokenised(table, tokenizer, lengths[-1], "tokenising")
    report = audit(
        network,
        text_loss,
        records,
        attack=attack or "gradient",
        canaries=canaries,
        guesses=guesses,
        confidence=confidence,
        target_epsilon=target_epsilon,
        target_delta=target_delta,
        epochs=epochs,
        expected_batch_size=expected_batch_size,
        physical_batch_size=physical_batch_size,
        trainable=patterns or default_trainable(network),
        exclude=left_out,
        clipping=clip,
        learning_rate=learning_rate,
        padded_lengths={"input_ids": lengths, "attention_mask": lengths},
        pad_values={"input_ids": tokenizer.pad_token_id or 0},
        **budget,
    )
    _show(report, output)


def _audit_of_export(folder: Path, data: Path, columns: tuple[str, str, list[str] | None], options: Any) -> AuditReport:
    from dpbitfit_fx.audit_onnx import audit_onnx
    from dpbitfit_fx.ort_artifacts import read_manifest
    from dpbitfit_fx.ort_cli import Reader

    with busy("reading the artifacts and the records"):
        reader = Reader(folder, read_manifest(folder, verify=False), data, *columns, None)
        records = reader.read(data)
    return audit_onnx(folder, records, pad_values=reader.pad_values, **options)


def _show(report: AuditReport, output: Path) -> None:
    """Exit status 1 where the claim is refuted."""
    report.save(output)
    shown = console()
    shown.print(escape(report.picture()))
    shown.print(escape(report.summary()))
    shown.print(f"Everything is in {escape(str(output))}.")
    if report.violated:
        raise typer.Exit(1)
