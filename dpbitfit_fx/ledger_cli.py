"""`dpbitfit ledger`: the privacy budget of a dataset, shared by every run on its records. Torch-free."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from dpbitfit_fx.console import busy, console
from dpbitfit_fx.errors import ArtifactError, PrivacyError

__all__ = ["ledger"]

ledger = typer.Typer(
    no_args_is_help=True, add_completion=False, help="The privacy budget that all runs on a dataset share."
)

LedgerPath = Annotated[Path, typer.Argument(help="The ledger file.")]
Who = Annotated[str | None, typer.Option(help="Whose name the line carries; default: the login name.")]


@ledger.command()
def init(
    path: LedgerPath,
    target_epsilon: Annotated[float, typer.Option(help="The dataset's budget, over all runs.")],
    target_delta: Annotated[float, typer.Option(help="Below 1/N.")],
    name: Annotated[str, typer.Option(help="What the dataset is called.")] = "",
    who: Who = None,
) -> None:
    """Make the ledger of a dataset."""
    from dpbitfit_fx.ledger import Ledger

    made = Ledger.create(path, target_epsilon=target_epsilon, target_delta=target_delta, name=name, who=who)
    console().print(
        f"{escape(str(path))}: epsilon = {target_epsilon:g} at delta = {target_delta:g} for all runs together, ledger "
        f"{made.read().ledger_id}. Pass it to every run on these records: --ledger {escape(str(path))}."
    )


@ledger.command()
def show(
    path: LedgerPath,
    against: Annotated[
        list[Path] | None, typer.Option(help="privacy.json files that must be in it: shows a tail that was cut off.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the runs as JSON.")] = False,
) -> None:
    """Every run and what it is charged, and what is left. Checks the whole chain."""
    from dpbitfit_fx.accounting import format_epsilon
    from dpbitfit_fx.ledger import Ledger
    from dpbitfit_fx.privacy_statement import PrivacyStatement

    file = Ledger(path)
    with busy("accounting"):
        books = file.read()
        epsilon = books.epsilon()
        for one in against or ():
            statement = PrivacyStatement.load(one)
            if statement.ledger is None or statement.ledger["ledger_id"] != books.ledger_id:
                raise PrivacyError(f"{str(one)!r} is of a run that was not settled in this ledger.")
            file.check_holds(statement.ledger, f"{str(one)!r}")
    head = books.head()
    if as_json:
        runs: list[dict[str, Any]] = [
            {"run_id": run_id, "who": run.who, "when": run.when, "backend": run.backend, "graph_hash": run.graph_hash}
            | {"reserved": run.reserved, "settled": run.settled, "mechanisms": [part.to_dict() for part in run.runs]}
            for run_id, run in books.runs.items()
        ]
        budget = {"target_epsilon": books.target_epsilon, "name": books.name, **head.to_dict()}
        typer.echo(json.dumps({**budget, "runs": runs}, indent=2))
        return
    out = console()
    if books.runs:
        table = Table("run", "who", "since (UTC)", "charged steps", "sample rate", "noise", "state")
        for run_id, run in books.runs.items():
            table.add_row(
                escape(run_id[:12]),
                escape(run.who),
                escape(run.when[:16]),
                " + ".join(str(steps) for steps in run.charged),
                ", ".join(f"{part.sample_rate:.4g}" for part in run.runs),
                f"{run.runs[0].noise_multiplier:.4g}" + (" INSECURE" if any(p.insecure for p in run.runs) else ""),
                "settled" if run.reserved is None else "reserved",
            )
        out.print(table)
    out.print(
        f"{escape(books.name) or 'The dataset'}: epsilon = {format_epsilon(epsilon)} of {books.target_epsilon:g} at delta = "
        f"{books.target_delta:g}, {len(books.runs)} runs. Ledger {books.ledger_id}, line {head.lines} is {head.sha256}."
    )
    if any(part.insecure for run in books.runs.values() for part in run.runs):
        out.print("Noise from a known seed is in it: what those runs released is not protected at all.")


@ledger.command()
def settle(
    path: LedgerPath,
    folder: Annotated[Path, typer.Argument(help="Output folder of a run that was stopped, killed or given up.")],
    who: Who = None,
) -> None:
    """Charge a run that was stopped with what it used, from its own checkpoint and privacy.json. Waits for nobody: a run
    that is still going is refused."""
    from dpbitfit_fx.checkpoint import CheckpointStore
    from dpbitfit_fx.ledger import Ledger
    from dpbitfit_fx.output_folder import CHECKPOINT, statements_in
    from dpbitfit_fx.run_statement import statement_of_unfinished

    file = Ledger(path, who=who)
    books = file.read()
    if not folder.is_dir():
        raise ArtifactError(f"{str(folder)!r} is not the output folder of a run.")
    store = CheckpointStore(folder / CHECKPOINT).open()
    try:
        found = list(statements_in(folder, store).values())
        if store.exists:
            found.append(statement_of_unfinished(store))
        mine = [statement for statement in found if statement.run_id in books.runs]
        if not mine:
            raise PrivacyError(f"The ledger {str(path)!r} knows no run of {str(folder)!r}.")
        for statement in mine:
            statement.verify()
            file.settle(statement.own_runs(), run_delta=statement.delta)
            console().print(f"{statement.run_id}: settled at {statement.charged_steps} steps.")
    finally:
        store.close()


@ledger.command()
def enter(
    path: LedgerPath,
    statements: Annotated[list[Path], typer.Argument(help="privacy.json files of runs that did not know the ledger.")],
    who: Who = None,
) -> None:
    """Count runs on these records that were made without the ledger."""
    from dpbitfit_fx.ledger import Ledger
    from dpbitfit_fx.privacy_statement import PrivacyStatement

    file = Ledger(path, who=who)
    read = [PrivacyStatement.load(one, verify=True) for one in statements]
    for statement in read:
        file.enter(statement.as_prior_runs(), run_delta=statement.delta)
    show(path)


@ledger.command()
def repair(path: LedgerPath, who: Who = None) -> None:
    """Drop a torn last line, keeping a copy of the file."""
    from dpbitfit_fx.ledger import Ledger

    dropped = Ledger(path, who=who).repair()
    console().print(
        f"{escape(str(path))}: {dropped} bytes without an end were dropped; a copy of the file is beside it."
    )
