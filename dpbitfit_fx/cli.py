"""The command line, `dpbitfit`. torch is imported only by the commands that need it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from dpbitfit_fx.audit_cli import audit_text
from dpbitfit_fx.console import (
    ClippingKind,
    EvalFile,
    ExpectedBatchSize,
    Labels,
    LabelsFromData,
    LedgerFile,
    LedgerUser,
    Overwrite,
    ParallelBatches,
    PhysicalBatchSize,
    PriorFiles,
    Resume,
    TargetDelta,
    Trainable,
    TuningCovered,
)
from dpbitfit_fx.console import busy as _busy
from dpbitfit_fx.console import clipping_of as _clipping
from dpbitfit_fx.console import console as _console
from dpbitfit_fx.console import names as _names
from dpbitfit_fx.console import tokenised as _tokenised
from dpbitfit_fx.errors import ArtifactError, DataError, DPBitFitError, PrivacyError
from dpbitfit_fx.ledger_cli import ledger as ledger_commands
from dpbitfit_fx.ort_cli import ort_budget, ort_train

__all__ = ["app", "main"]

RUN_FILE = "run.json"


class _Group(typer.core.TyperGroup):
    """Turns every error of ours into one red paragraph and exit code 2."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except DPBitFitError as error:
            if ctx.params.get("debug"):
                raise
            _console(stderr=True).print(f"[red]{escape(' '.join(str(error).split()))}[/red]")
            raise typer.Exit(2) from None
        except KeyboardInterrupt as interrupt:
            if ctx.params.get("debug"):
                raise
            _console(stderr=True).print(f"[red]{escape(str(interrupt) or 'Interrupted.')}[/red]")
            raise typer.Exit(130) from None


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Differentially private bias tuning (DP-BiTFiT) of unedited PyTorch models.",
)


@app.callback()
def _options(debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False) -> None:
    del debug  # read from the context where errors are shown


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder for everything that the demo leaves.")] = Path("dpbitfit-demo"),
    epsilon: Annotated[float, typer.Option(help="Target epsilon, at delta = 1e-5.")] = 8.0,
    seeds: Annotated[int, typer.Option(help="How many private runs to average.", min=1)] = 1,
    cache: Annotated[
        Path | None, typer.Option(help="Where downloads are kept; default $DPBITFIT_CACHE or ~/.cache/dpbitfit.")
    ] = None,
    baselines: Annotated[bool, typer.Option(help="Also run the linear probe and non-private bias tuning.")] = True,
    without_pytorch: Annotated[
        bool,
        typer.Option("--without-pytorch", help="Only train: export the run, train it where torch cannot be imported."),
    ] = False,
) -> None:
    """The whole main job on real input: MiniLM and movie reviews, privately, in PyTorch and ONNX Runtime."""
    from dpbitfit_fx.demo import run_demo

    if without_pytorch:
        from dpbitfit_fx.demo_ort import run_without_pytorch

        run_without_pytorch(output, epsilon=epsilon, seeds=seeds, cache=cache, console=_console())
        return

    run_demo(output, epsilon=epsilon, seeds=seeds, cache=cache, baselines=baselines, console=_console())


@app.command()
def train(
    context: typer.Context,
    model: Annotated[Path, typer.Argument(help="A local Hugging Face model directory (safetensors).")],
    data: Annotated[Path, typer.Argument(help="Private records: .csv, .tsv or .jsonl.")],
    output: Annotated[Path, typer.Option(help="Receives biases.safetensors, privacy.json and summary.md.")],
    target_epsilon: Annotated[float, typer.Option(help="Privacy budget of the run, earlier runs included.")],
    text_column: Annotated[str, typer.Option()] = "text",
    label_column: Annotated[str, typer.Option()] = "label",
    labels: Labels = None,
    labels_from_data: LabelsFromData = False,
    padded_lengths: Annotated[
        str,
        typer.Option(help="Public token lengths; a text is padded to the smallest that fits, or cut to the largest."),
    ] = "32,64,128",
    target_delta: TargetDelta = None,
    epochs: Annotated[float, typer.Option()] = 3.0,
    expected_batch_size: ExpectedBatchSize = 256,
    physical_batch_size: PhysicalBatchSize = 32,
    parallel_batches: ParallelBatches = 1,
    max_grad_norm: Annotated[float, typer.Option()] = 1.0,
    clipping: ClippingKind = "automatic",
    learning_rate: Annotated[float, typer.Option()] = 5e-3,
    trainable: Trainable = None,
    exclude: Annotated[
        str | None, typer.Option(help="Name patterns that are not trained, e.g. '*LayerNorm*', separated by commas.")
    ] = None,
    add_bias: Annotated[
        bool, typer.Option("--add-bias", help="Also train a new bias for every layer that has none.")
    ] = False,
    precision: Annotated[str, typer.Option(help="float32, or bf16: about half the time on a CPU that has it.")] = "float32",
    backend: Annotated[str, typer.Option(help="eager, or inductor: a longer start, faster steps.")] = "eager",
    cache_frozen_prefix: Annotated[
        bool, typer.Option("--cache-frozen-prefix", help="Keep in memory what lies before the first trained layer.")
    ] = False,
    shard_frozen: Annotated[
        bool, typer.Option("--shard-frozen", help="Under torchrun: each process keeps 1/N of every large frozen weight.")
    ] = False,
    dataset_size: Annotated[int | None, typer.Option(help="The public N; default: the number of records.")] = None,
    eval_file: EvalFile = None,
    prior: PriorFiles = None,
    ledger: LedgerFile = None,
    ledger_user: LedgerUser = None,
    resume: Resume = True,
    overwrite: Overwrite = False,
    tuning_covered: TuningCovered = False,
) -> None:
    """Train the biases of a model on private labelled text; in all processes that torchrun starts, as one run."""
    from dpbitfit_fx.accounting import format_epsilon
    from dpbitfit_fx.data import parse_lengths, read_table
    from dpbitfit_fx.files import ensure_output_folder
    from dpbitfit_fx.ledger import Ledger

    budget = None if ledger is None else Ledger(ledger, who=ledger_user)
    if (labels is None) == (not labels_from_data):
        raise DataError(
            "Declare the label set with --labels a,b,c, or take it from the data with --labels-from-data, which makes "
            "the set itself public; one of the two."
        )
    lengths = parse_lengths(padded_lengths)
    patterns, left_out = _names(trainable, "--trainable"), _names(exclude, "--exclude") or []
    clip = _clipping(clipping, max_grad_norm)
    table = read_table(data, text_column, label_column, _names(labels, "--labels"))
    public = None if eval_file is None else read_table(eval_file, text_column, label_column, table.label_set)
    ensure_output_folder(output)

    with _busy("loading the model"):
        from dpbitfit_fx.fit import fit
        from dpbitfit_fx.huggingface import accuracy, default_trainable, load_classifier, load_tokenizer, text_loss
        from dpbitfit_fx.ranks import torchrun_group

        tokenizer = load_tokenizer(model)
        network = load_classifier(model, len(table.label_set))
    first = context.with_resource(torchrun_group())
    chosen = patterns or default_trainable(network)
    pad = tokenizer.pad_token_id or 0
    records = _tokenised(table, tokenizer, lengths[-1], "tokenising")
    evaluation = None if public is None else _tokenised(public, tokenizer, lengths[-1], "tokenising the public file")

    result = fit(
        network,
        text_loss,
        records,
        target_epsilon=target_epsilon,
        target_delta=target_delta,
        epochs=epochs,
        expected_batch_size=expected_batch_size,
        physical_batch_size=physical_batch_size,
        parallel_batches=parallel_batches,
        trainable=chosen,
        exclude=left_out,
        add_bias=add_bias,
        clipping=clip,
        precision=precision,
        backend=backend,
        cache_frozen_prefix=cache_frozen_prefix,
        shard_frozen=shard_frozen,
        learning_rate=learning_rate,
        eval_fn=None if evaluation is None else lambda net: {"accuracy": accuracy(net, evaluation, pad_id=pad)},
        padded_lengths={"input_ids": lengths, "attention_mask": lengths},
        pad_values={"input_ids": pad},
        dataset_size=dataset_size,
        output_dir=output,
        resume=resume,
        overwrite=overwrite,
        prior=list(prior or ()),
        ledger=budget,
        tuning_covered=tuning_covered,
        public_declarations={**table.public_declarations(), "padded_lengths_source": "declared; longer texts are cut"},
    )
    if not first:
        return
    from dpbitfit_fx.files import atomic_write_text

    described = {
        "labels": list(table.label_set),
        "padded_lengths": list(lengths),
        "trainable": chosen,
        "exclude": left_out,
        "add_bias": add_bias,
        "learning_rate": learning_rate,
    }
    atomic_write_text(output / RUN_FILE, json.dumps(described, indent=2) + "\n")
    console = _console()
    if result.history:
        console.print(f"accuracy on the public file: {result.history[-1]['accuracy']:.1%}")
    console.print(
        f"epsilon = {format_epsilon(result.epsilon)} at delta = {result.delta:g}, noise multiplier "
        f"{result.noise_multiplier:.4g}, {result.steps} steps. Everything is in {escape(str(output))}."
    )


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="The output folder of `dpbitfit train`.")],
    model: Annotated[Path, typer.Argument(help="The model directory that it was trained from.")],
    output: Annotated[Path, typer.Option(help="Receives the exported files.")],
    format: Annotated[str, typer.Option(help="ort (ONNX Runtime Training) or onnx (plain ONNX).")] = "ort",
    optimizer: Annotated[str, typer.Option(help="adamw or sgd.")] = "adamw",
    length: Annotated[int | None, typer.Option(help="Tokens per text; default: the longest padded length.")] = None,
    padded_lengths: Annotated[
        str | None, typer.Option(help="Public lengths such as 16,32,64 that one graph takes, in place of --length.")
    ] = None,
    rows: Annotated[int, typer.Option(help="Rows of the made-up example batch.", min=2)] = 4,
    weight_bits: Annotated[
        int | None, typer.Option(help="8 or 4: hold frozen weights in so many bits (--format onnx).")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier export.")] = False,
) -> None:
    """Export a trained model's private step, checked against PyTorch, to train further without PyTorch."""
    from dpbitfit_fx.data import parse_lengths
    from dpbitfit_fx.privacy_statement import PrivacyStatement

    public = None if padded_lengths is None else parse_lengths(padded_lengths)
    if format not in ("ort", "onnx"):
        raise DPBitFitError(f"--format must be ort or onnx; got '{format}'.")
    if weight_bits is not None and (format != "onnx" or weight_bits not in (8, 4)):
        raise DPBitFitError(f"--weight-bits takes 8 or 4, with --format onnx; got {weight_bits} with --format {format}.")
    if optimizer not in ("adamw", "sgd"):
        raise DPBitFitError(f"--optimizer must be adamw or sgd; got '{optimizer}'.")
    described = read_run(run)
    labels, lengths, trainable = described["labels"], described["padded_lengths"], described["trainable"]
    statement = PrivacyStatement.load(run / "privacy.json")
    with _busy("loading the model"):
        from dpbitfit_fx.biases import load_biases
        from dpbitfit_fx.compile import compile as compile_step
        from dpbitfit_fx.huggingface import load_classifier, load_tokenizer, logits_of, made_up_batch, text_loss

        tokenizer = load_tokenizer(model)
        network = load_classifier(model, len(labels))
        load_biases(network, run / "biases.safetensors")
    with _busy("compiling and proving the private step"):
        step = compile_step(
            network,
            text_loss,
            made_up_batch(public[-1] if public else length or lengths[-1], _vocabulary(network), rows),
            dynamic_shapes=_free_length(public),
            trainable=trainable,
            exclude=described["exclude"],
            add_bias=described["add_bias"],
            clipping=_clipping(statement.clipping, statement.max_grad_norm),
            noise_multiplier=statement.noise_multiplier,
            expected_batch_size=statement.expected_batch_size,
        )
        for one in public or ():
            step.check_length(one)
    plan: dict[str, Any] = {
        "optimizer": optimizer,
        "sample_rate": statement.sample_rate,
        "dataset_size": statement.dataset_size,
        "steps": statement.steps,
        "target_delta": statement.delta,
        "overwrite": overwrite,
    }
    with _busy("exporting, and checking the files against PyTorch"):
        if format == "ort":
            from dpbitfit_fx.ort_export import export_ort_training

            folder = export_ort_training(step, output, eval_output=logits_of, **plan)
        else:
            from dpbitfit_fx.onnx_export import export_onnx

            folder = export_onnx(step, output, weight_bits=weight_bits, **plan)
        from dpbitfit_fx.ort_text import attach_text

        attach_text(folder, tokenizer.backend_tokenizer.to_str(), labels, tokenizer.pad_token_id or 0, public)
    _console().print(
        f"{escape(str(folder))}: agrees with PyTorch. Training from it on the same records spends more budget; compose "
        f"it with `dpbitfit ort-train --prior {escape(str(run / 'privacy.json'))}`."
    )


app.command("ort-train")(ort_train)
app.command("audit")(audit_text)
app.command("ort-budget")(ort_budget)
app.add_typer(ledger_commands, name="ledger")


def read_run(folder: Path) -> dict[str, Any]:
    """What run.json says of a run of `dpbitfit train`.

    Raises:
        ArtifactError: it cannot be read, or is damaged.
    """
    from dpbitfit_fx.files import read_text

    def texts(value: Any) -> bool:
        return isinstance(value, list) and all(isinstance(item, str) for item in value)

    try:
        described = json.loads(read_text(folder / RUN_FILE))
        labels, lengths, trainable = described["labels"], described["padded_lengths"], described["trainable"]
        left_out, added = described.setdefault("exclude", []), described.setdefault("add_bias", False)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        described = None
    else:
        sound = texts(labels) and len(labels) > 1 and texts(left_out) and isinstance(added, bool)
        sound = sound and (isinstance(trainable, str) or texts(trainable))
        sound = sound and isinstance(lengths, list) and bool(lengths)
        described = described if sound and all(type(n) is int and 0 < n < 2**31 for n in lengths) else None
    if described is None:
        raise ArtifactError(f"'{folder / RUN_FILE}' is damaged: it does not describe a run of `dpbitfit train`.")
    found: dict[str, Any] = described
    return found


def _free_length(lengths: tuple[int, ...] | None) -> dict[str, dict[int, Any]] | None:
    """`dynamic_shapes` of texts whose padded length lies between the first and the last of these."""
    if lengths is None:
        return None
    from torch.export import Dim

    size = Dim("padded_length", min=lengths[0], max=lengths[-1])
    return {name: {1: size} for name in ("input_ids", "attention_mask")}


def _vocabulary(network: Any) -> int:
    config = getattr(network, "config", None) or network.encoder.config
    return int(config.vocab_size)


@app.command()
def inspect(
    model: Annotated[Path, typer.Argument(help="A local Hugging Face model directory (safetensors).")],
    num_labels: Annotated[int, typer.Option(help="Classes of the classifier.", min=2)] = 2,
    trainable: Annotated[str | None, typer.Option(help="Name patterns separated by commas; default: bias.")] = None,
    exclude: Annotated[str | None, typer.Option(help="Name patterns that are not trained.")] = None,
    add_bias: Annotated[
        bool, typer.Option("--add-bias", help="Also a new bias for every layer that has none.")
    ] = False,
    length: Annotated[int, typer.Option(help="Tokens per made-up text.", min=2)] = 32,
    clipping: Annotated[str, typer.Option(help="automatic, flat, auto-v or per-layer.")] = "automatic",
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Show what would be trained and by which rule, what was rewritten, what is slow, or why a model is refused."""
    patterns, left_out = _names(trainable, "--trainable"), _names(exclude, "--exclude") or []
    clip = _clipping(clipping, 1.0)
    with _busy("loading the model"):
        from dpbitfit_fx.compile import compile as compile_step
        from dpbitfit_fx.huggingface import default_trainable, load_classifier, made_up_batch, text_loss

        network = load_classifier(model, num_labels)
    with _busy("compiling and proving the private step"):
        step = compile_step(
            network,
            text_loss,
            made_up_batch(length, _vocabulary(network)),
            trainable=patterns or default_trainable(network),
            exclude=left_out,
            add_bias=add_bias,
            clipping=clip,
        )
    report = step.report()
    console = _console()
    if as_json:
        typer.echo(json.dumps(report.to_dict(), indent=2, default=str))
        return
    console.print(escape(str(report)))
    operators = Table("operator in the private step", "times")
    for name, count in sorted(report.operators.items(), key=lambda item: -item[1]):
        operators.add_row(escape(name), str(count))
    console.print(operators)
    if not report.slow:  # the report's own lines name them
        console.print("slow operators: none")


@app.command()
def account(
    dataset_size: Annotated[int, typer.Option(help="N, the public number of records.")],
    expected_batch_size: Annotated[int, typer.Option(help="Expected records per Poisson draw.")] = 256,
    epochs: Annotated[float | None, typer.Option()] = None,
    steps: Annotated[int | None, typer.Option(help="Logical steps, in place of --epochs.")] = None,
    target_delta: Annotated[float, typer.Option(help="Below 1/N.")] = 1e-5,
    target_epsilon: Annotated[float | None, typer.Option(help="Solve for the noise multiplier.")] = None,
    noise_multiplier: Annotated[float | None, typer.Option(help="Compute epsilon.")] = None,
    prior: Annotated[
        list[Path] | None, typer.Option(help="privacy.json of an earlier run on the same records.")
    ] = None,
) -> None:
    """The epsilon of a plan, or the noise multiplier for an epsilon. Reads no data."""
    from dpbitfit_fx import accounting
    from dpbitfit_fx.sampling import PoissonSampler

    if (target_epsilon is None) == (noise_multiplier is None):
        raise PrivacyError(
            "Give either --target-epsilon or --noise-multiplier, and not both: one follows from the other."
        )
    sampler = PoissonSampler.from_expected_batch_size(dataset_size, expected_batch_size, epochs=epochs, steps=steps)
    earlier = list(prior or ())
    with _busy("accounting"):
        if noise_multiplier is None:
            assert target_epsilon is not None
            noise_multiplier = accounting.solve_noise_multiplier(sampler, target_epsilon, target_delta, earlier)
        spent = accounting.epsilon(sampler, noise_multiplier, target_delta, prior=earlier)
    table = Table("quantity", "value")
    for name, value in (
        ("epsilon", f"{accounting.format_epsilon(spent)}"),
        ("delta", f"{target_delta:g}"),
        ("noise multiplier", f"{noise_multiplier:.6g}"),
        ("sample rate", f"{sampler.sample_rate:.6g}"),
        ("steps", f"{sampler.steps}"),
        ("earlier runs composed", f"{len(earlier)}"),
        ("neighbouring relation", accounting.NEIGHBORING_RELATION),
    ):
        table.add_row(name, value)
    _console().print(table)


def main() -> None:
    """Entry point of the script `dpbitfit`."""
    app()


if __name__ == "__main__":
    main()
