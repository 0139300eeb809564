"""Sealed graphs edited at random: what still passes the seal is measured, and must have sensitivity R and the right noise.

`tools/fuzz edits --edits 100000` runs many; tests/test_edited_graphs.py a slice. The grammar is tests/graph_edits.py. An edited
graph counts as accepted where all passes that a user's ``compile`` ends with accept it: the seal, the split, the lowering
with its own proofs, and ``check_rows`` on what finally runs. Nothing in the measurement reads the template or the graph: it
knows R, sigma and N as they were given to ``compile``, runs the graph on hostile batches, and compares numbers.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import difflib
import functools
import hashlib
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from fit_cases import mlp, scaled_loss, text_loss, text_model
from graph_edits import ON_THE_TAIL, Edited, edited
from torch import Tensor, fx, nn

from dpbitfit_fx.compile import PrivateStep, check_rows
from dpbitfit_fx.compile import compile as compile_step
from dpbitfit_fx.errors import DPBitFitError
from dpbitfit_fx.lowering import Lowered
from dpbitfit_fx.passes.clipping import AutomaticClipping, AutoVClipping, Clipping, FlatClipping, PerLayerClipping
from dpbitfit_fx.passes.joint_graph import JointGraph
from dpbitfit_fx.passes.numerics import noise_scale
from dpbitfit_fx.passes.seal import check_update, seal, seal_partial, split

SIGMA, R, N = 1.25, 0.5, 16.0
NAN, INF = float("nan"), float("inf")
UNSOUND, RAW = "UNSOUND", "raw error"
BY_LAYER = PerLayerClipping(layer_norms={"mix": 0.3, "head": 0.4})
CASES: dict[str, tuple[str, Clipping]] = {
    "mlp, automatic": ("mlp", AutomaticClipping(R)),
    "mlp, flat": ("mlp", FlatClipping(R)),
    "mlp, AUTO-V": ("mlp", AutoVClipping(R)),
    "mlp, per layer": ("mlp", PerLayerClipping(R)),
    "text, automatic": ("text", AutomaticClipping(R)),
    "text, per layer": ("text", BY_LAYER),
    "ghosts, flat": ("ghosts", FlatClipping(R)),
    "ghosts, AUTO-V": ("ghosts", AutoVClipping(R)),
}
STAGES = ("whole", "whole", "whole", "partial", "partial", "update")


class DoesNotRun(Exception):
    """The edited graph raises on the example batch itself."""


Leaves = list[Tensor]


@dataclasses.dataclass
class Runs:
    """What finally runs of an edited graph; ``release`` is the whole graph, where it is one: its own outputs, not the first."""

    sums: Callable[[Leaves, Tensor, Tensor], Any]
    update: Callable[[Tensor, Tensor], Any]
    release: Callable[[Leaves, Tensor, Tensor, Tensor], Any] | None = None


@dataclasses.dataclass
class Case:
    step: PrivateStep
    tolerance: float  # relative to R: what the documentation grants to rounding
    batches: list[Leaves]
    sizes: dict[str, Any]  # of the whole graph's nodes
    before: list[Tensor]
    texts: dict[str, str] = dataclasses.field(default_factory=dict)

    def graph(self, stage: str) -> JointGraph:
        assert self.step.update is not None
        return {"whole": self.step.joint, "partial": self.step.partial, "update": self.step.update}[stage]


# -- the graphs that are edited, and the batches they are measured on ---------------------------------------------------


def _records(kind: str, rows: int, seed: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    labels, weights = torch.randint(0, 2, (rows,), generator=g), torch.ones(rows)
    if kind == "mlp":
        return {"x": torch.randn(rows, 4, generator=g), "y": labels, "weight": weights}
    lengths = torch.randint(1, 7, (rows, 1), generator=g)
    ids, mask = torch.randint(1, 20, (rows, 6), generator=g), (torch.arange(6)[None] < lengths).long()
    return {"input_ids": ids, "attention_mask": mask, "label": labels, "weight": weights}


def _hostile(kind: str) -> list[dict[str, Tensor]]:
    """One record; gradients of all sizes; copies at full norm, in one direction and in two; NaN, inf and zero; huge inputs."""
    one, spread, same, odd, far = (_records(kind, rows, rows) for rows in (1, 6, 5, 4, 3))
    one["weight"] = torch.tensor([1e6])
    spread["weight"] = torch.tensor([1e-8, 1e-3, 1.0, 1e2, 1e5, 1e8])
    same = {k: v[:1].repeat(5, *[1] * (v.dim() - 1)) for k, v in same.items()}
    same["weight"] = torch.full((5,), 1e6)
    both = {k: v.clone() for k, v in same.items()}
    both["weight"] = torch.tensor([1e4, -1e4, 1e4, 1e-20, 1e20])
    odd["weight"] = torch.tensor([NAN, 1.0, INF, 0.0])
    if kind == "mlp":
        odd["x"][1, 2] = NAN
        far["x"] *= torch.tensor([[1e-8], [1e4], [1e8]])
    else:
        odd["attention_mask"][1] = 0
        far["input_ids"][:], far["attention_mask"][:] = far["input_ids"][:, :1].clone(), 1
    return [one, spread, same, both, odd, far]


def _sizes(joint: JointGraph, values: list[Tensor]) -> dict[str, Any]:
    found: dict[str, Any] = {}

    class Record(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            found[n.name] = (value.shape, value.dtype) if isinstance(value, Tensor) else type(value)
            return value

    with torch.no_grad():
        Record(joint.module).run(*values)
    return found


@functools.cache
def case(name: str) -> Case:
    kind, clipping = CASES[name]
    data = "mlp" if kind == "mlp" else "text"
    model = mlp() if kind == "mlp" else text_model()
    ghosts: dict[str, Any] = {"trainable": "all", "ghost_norms": True} if kind == "ghosts" else {}
    loss, example = scaled_loss if kind == "mlp" else text_loss, _records(data, 4, 0)
    example["weight"] = torch.tensor([1.0, 2.0, 0.5, 1.0])
    step = compile_step(
        model, loss, example, clipping=clipping, noise_multiplier=SIGMA, expected_batch_size=N, **ghosts
    )
    batches = [[b[n] for n in example] for b in (example, *_hostile(data))]
    z = step.zero_accumulator()
    sizes = _sizes(step.joint, [*step.joint.values(batches[0]), torch.ones(4), z, z])
    found = Case(step, 1e-4 if kind == "ghosts" else 1e-5, batches, sizes, [])
    found.texts = {stage: found.graph(stage).text() for stage in STAGES}
    found.before = [step._lowered(b, torch.ones(len(b[0])), z) for b in batches]
    return found


# -- accepted or refused ------------------------------------------------------------------------------------------------


def prove(joint: JointGraph, stage: str) -> None:
    {"whole": seal, "partial": seal_partial, "update": check_update}[stage](joint)


def lowered(of: Case, joint: JointGraph, stage: str) -> Runs:
    """What runs of a graph that the seal accepted, after every further proof of ``compile``; raises where one refuses."""
    step, example, z = copy.copy(of.step), of.batches[0], of.step.zero_accumulator()
    values = [*joint.values(example), torch.ones(4), z, z]
    try:
        with torch.no_grad():
            fed = {"whole": values, "partial": values[:-1], "update": [z, z]}[stage]
            fx.Interpreter(nn.Module(), graph=joint.module.graph).run(*fed)
    except Exception as error:
        raise DoesNotRun(str(error)) from error
    joint = dataclasses.replace(joint, module=fx.GraphModule(nn.Module(), joint.module.graph))
    if stage == "update":
        step.update = joint
        return Runs(step._lowered, step.privatize)
    if stage == "whole":
        step.joint = joint
        step.partial, step.update = split(joint)
    else:
        step.partial = joint
    step._lowered = Lowered(step.partial, "eager")
    check_rows(step)
    return Runs(step._lowered, step.privatize, released(joint) if stage == "whole" else None)


def released(joint: JointGraph) -> Callable[[Leaves, Tensor, Tensor, Tensor], Any]:
    return lambda leaves, mask, accumulator, z: joint.module(*joint.values(leaves), mask, accumulator, z)


@dataclasses.dataclass(frozen=True)
class Verdict:
    kind: str
    why: str = ""


def judge(of: Case, joint: JointGraph, stage: str) -> Verdict:
    try:
        prove(joint, stage)
    except DPBitFitError as error:
        return Verdict("refused by the seal", str(error))
    except Exception as error:
        return Verdict(RAW, f"{type(error).__name__}: {error}")
    try:
        runs = lowered(of, joint, stage)
    except DPBitFitError as error:
        return Verdict("refused by check_rows", str(error))
    except DoesNotRun as error:
        return Verdict("does not run", str(error))
    except Exception as error:
        return Verdict(RAW, f"{type(error).__name__}: {error}")
    try:
        with torch.no_grad():
            why, same = measured(of, runs)
    except DoesNotRun as error:
        return Verdict("does not run", str(error))
    return Verdict(UNSOUND, why) if why else Verdict("sound, the same numbers" if same else "sound, other gradients")


# -- the measurement ----------------------------------------------------------------------------------------------------


def without(leaves: Leaves, row: int) -> Leaves:
    return [torch.cat([x[:row], x[row + 1 :]]) for x in leaves]


def spoiled(leaves: Leaves, row: int) -> Leaves:
    """What a row holds that is masked out: rubbish, of another kind for every row."""
    out = [x.clone() for x in leaves]
    for x in out:
        x[row] = (NAN, INF, -1e30, 1e30)[row % 4] if x.dtype.is_floating_point else row % 2
    return out


def measured(of: Case, runs: Runs) -> tuple[str, bool]:
    """What is wrong with a graph that was accepted, or ''; and whether its sums are those of the graph before the edit."""
    count, g = of.step.num_trainable, torch.Generator().manual_seed(3)
    one, other, start = torch.randn(3, count, generator=g)
    nothing, scale, same = torch.zeros(count), noise_scale(SIGMA, R, N), True

    def added(leaves: Leaves, mask: Tensor, accumulator: Tensor) -> Tensor:
        """A graph may be made for other sizes alone. One that records of this size stop, where others do not, shows them."""
        try:
            return single(runs.sums(leaves, mask, accumulator))
        except (RuntimeError, IndexError) as error:
            try:
                runs.sums([x[torch.arange(len(mask)) % len(x)] for x in of.batches[0]], mask, accumulator)
            except Exception as again:
                raise DoesNotRun(f"{len(mask)} rows: {again}") from again
            raise Unsound(f"what a record holds stops the step: {error}") from error

    def single(x: Any) -> Tensor:
        """The output, if it is one, of the declared shape and finite; a step gives it, a graph a tuple of one."""
        x = x[0] if isinstance(x, (tuple, list)) and len(x) == 1 else x
        if not isinstance(x, Tensor) or x.shape != (count,) or x.dtype != of.step.dtype:
            raise Unsound("the output is not one vector [D]")
        if not bool(x.isfinite().all()):
            raise Unsound("an output is not finite")
        return x.double()

    def near(x: Tensor, y: Tensor, allowed: float, what: str) -> None:
        if not bool((x - y).norm() <= allowed):
            raise Unsound(f"{what}: off by {float((x - y).norm()):.3g}, allowed {allowed:.3g}")

    try:
        for leaves, before in zip(of.batches, of.before, strict=True):
            rows = len(leaves[0])
            mask = torch.ones(rows)
            whole = added(leaves, mask, start)
            loose = 1e-4 * R * rows + 1e-6 * float(whole.norm())  # kernels of other sizes round otherwise
            same = same and bool((whole - start - before).norm() <= loose)
            near(added(leaves, 3.0 * mask, start), whole, 1e-6, "a mask of 3 is not a mask of 1")
            near(added(leaves, mask, nothing) + start, whole, loose, "the accumulator is not added once")
            for row in range(rows):
                others = mask.clone()
                others[row] = 0.0
                rest = added(spoiled(leaves, row), others, start)
                near(whole, rest, R * (1 + of.tolerance), f"sensitivity, row {row} of {rows} masked out")
                if row == rows - 1:
                    near(added(leaves, others, start), rest, 1e-6, "what a masked row holds shows")
            if rows > 1:
                rest = added(without(leaves, rows // 2), mask[1:], start)
                near(whole, rest, R + loose, f"sensitivity, row {rows // 2} of {rows} taken out")
        for total in (nothing, start):
            for z in (one, other, 1e3 * one):
                expected = (total.double() + scale * z.double()) / N
                near(single(runs.update(total, z)), expected, 1e-6 * float(expected.norm()), "update: the noise or its base")
        if runs.release is not None:
            leaves, mask = of.batches[0], torch.ones(len(of.batches[0][0]))
            first, second = (single(runs.release(leaves, mask, start, z)) for z in (one, other))
            near((first - second) * N, scale * (one - other).double(), 1e-5 * scale * count**0.5, "the noise")
            rest = added(leaves, mask, start)
            near(first * N - scale * one, rest, 1e-4 * R * len(mask) + 1e-5, "the whole graph is not its two halves")
    except Unsound as error:
        return str(error), False
    return "", same


class Unsound(Exception):
    """What a measurement found."""


# -- many ---------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Found:
    """Verdicts, in all, per kind of edit, per case and per stage; ``texts``: the verdict on each distinct edited graph."""

    total: Counter[str] = dataclasses.field(default_factory=Counter)
    tables: dict[str, dict[str, Counter[str]]] = dataclasses.field(default_factory=dict)
    texts: dict[bytes, Verdict] = dataclasses.field(default_factory=dict)
    bad: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def add(self, table: str, row: str, kind: str) -> None:
        self.tables.setdefault(table, {}).setdefault(row, Counter())[kind] += 1


def one_edit(seed: int, on_the_tail: float = ON_THE_TAIL) -> tuple[str, str, Edited]:
    """Case, stage and edited graph: all of it a function of the seed, and of where edits are aimed."""
    chance = random.Random(seed)
    name, stage = chance.choice(list(CASES)), chance.choice(STAGES)
    of = case(name)
    return name, stage, edited(of.graph(stage), of.texts[stage], of.sizes, chance, on_the_tail)


def judge_many(
    edits: int,
    start: int,
    show: Callable[[int, Found], None] = lambda _, __: None,
    on_the_tail: float = ON_THE_TAIL,
) -> Found:
    """Edits numbered from ``start`` on. A graph that was met before has the verdict that it had."""
    found = Found()
    for seed in range(start, start + edits):
        name, stage, new = one_edit(seed, on_the_tail)
        key = hashlib.sha256(repr((name, stage, new.text, new.joint.inputs)).encode()).digest()
        if key not in found.texts:
            found.texts[key] = judge(case(name), new.joint, stage)
        verdict = found.texts[key]
        found.total[verdict.kind] += 1
        found.add("by case", name, verdict.kind)
        found.add("by stage", stage, verdict.kind)
        for kind in {kind for kind, _ in new.said}:
            found.add("by kind of edit", kind, verdict.kind)
        if verdict.kind in (UNSOUND, RAW):
            found.bad.append(
                {"seed": seed, "case": name, "stage": stage, "edits": new.said, **dataclasses.asdict(verdict)}
            )
        show(seed, found)
    return found


def difference(seed: int, on_the_tail: float) -> str:
    name, stage, new = one_edit(seed, on_the_tail)
    before, after = (str(x.module.graph).splitlines() for x in (case(name).graph(stage), new.joint))
    return "\n".join(difflib.unified_diff(before, after, "before", "after", n=1, lineterm=""))


def summary(found: Found, start: int, seconds: float) -> dict[str, Any]:
    done = found.total.total()
    refused = sum(n for kind, n in found.total.items() if kind.startswith("refused"))
    tables = {title: {row: dict(c.most_common()) for row, c in sorted(t.items())} for title, t in found.tables.items()}
    return {
        "edited_graphs": done,
        "distinct": len(found.texts),
        "seed": start,
        "cpu_seconds": round(seconds, 1),
        "total": dict(found.total.most_common()),
        "refused_share": round(refused / max(1, done), 4),
        **tables,
        "bad": found.bad,
    }


def main(arguments: list[str]) -> int:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    parser = argparse.ArgumentParser(prog="tools/fuzz edits", description=__doc__)
    parser.add_argument("--edits", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0, help="the number of the first edit; each is a function of its number")
    parser.add_argument(
        "--on-the-tail", type=float, default=ON_THE_TAIL, metavar="SHARE",
        help="how many of the edits are aimed at the clip and the noise; 0: all of them at what comes before",
    )  # fmt: skip
    parser.add_argument("--only", type=int, metavar="SEED", help="this one alone, with the difference that it makes")
    parser.add_argument("--json", type=Path, help="write the counts here, and everything unsound")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    share = options.on_the_tail
    if options.only is not None:
        name, stage, new = one_edit(options.only, share)
        verdict = judge(case(name), new.joint, stage)
        print(f"{name}, {stage}: {new.said}\n{difference(options.only, share)}\n{verdict.kind} {verdict.why}")
        return 1 if verdict.kind in (UNSOUND, RAW) else 0
    started = time.process_time()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, disable=not sys.stderr.isatty(), transient=True) as progress:
        bar = progress.add_task("edits", total=options.edits)

        def show(seed: int, found: Found) -> None:
            if found.bad and found.bad[-1]["seed"] == seed:
                progress.console.print(f"{json.dumps(found.bad[-1])}\n{difference(seed, share)}", markup=False)
            progress.advance(bar)
            done = seed + 1 - options.seed
            if done % 1000 == 0:
                result = summary(found, options.seed, time.process_time() - started)
                if options.json:  # as far as it has come
                    options.json.write_text(json.dumps(result, indent=2) + "\n")
                if not sys.stderr.isatty():
                    print(f"{done} edits, {result['cpu_seconds']} CPU s: {result['total']}", flush=True)

        found = judge_many(options.edits, options.seed, show, share)
    result = summary(found, options.seed, time.process_time() - started)
    print(json.dumps(result, indent=2))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    return 1 if found.bad else 0
