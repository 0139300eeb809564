"""Markdown tables and plots of what :mod:`side_by_side` found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .models import MODELS
from .systems import SYSTEMS

AXES = {"size": "", "rows": "rows", "layers": "layers"}


def _megabytes(value: float | None) -> str:
    return "-" if value is None else f"{value / 1e6:,.0f}"


def tables(found: dict[str, Any], pictures: list[str], folder: Path | None) -> str:
    machine = found["machine"]
    lines = [f"torch {machine['torch']}, {machine['threads']} threads, {machine['device']}.", ""]
    for name in pictures:
        lines += [f"![{name}]({folder.name if folder else '.'}/{name})", ""]
    for case in found["cases"]:
        lines += _table(case)
    return "\n".join(lines)


def _table(case: dict[str, Any]) -> list[str]:
    entry, rows = MODELS[case["model"]], case["systems"]
    depth = "" if case["layers"] is None else f", {case['layers']} layers"
    title = f"## {entry.what}{depth}: {case['rows']} x {case['size']} {entry.axis}"
    lines = [title, "", f"{case['turns']} turns.", ""]
    lines += [
        "| system | time | interval | CPU s | wall s | step's peak MB | of it | kept MB | peak RSS MB | first step after s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    peak = next(iter(rows.values()))["peak"] if rows else None
    for name, row in rows.items():
        interval = "{:.3f} - {:.3f}".format(*row["interval"]) if "interval" in row else "-"
        share = f"{row['peak'] / peak:.2f}" if row["peak"] and peak else "-"
        lines.append(
            f"| {SYSTEMS[name].what} | {row.get('ratio', float('nan')):.3f} | {interval} | {row['cpu']:.3f} | "
            f"{row['wall']:.3f} | {_megabytes(row['peak'])} | {share} | {_megabytes(row['kept'])} | "
            f"{_megabytes(row['rss'])} | {row['started']:.1f} |"
        )
    floor, base = case["floor"], next(iter(rows.values()), None)
    if floor and base:
        rates = ", ".join(f"{name} {rate:.0f}" for name, rate in floor["gflops"].items())
        lines += [
            "",
            f"Floor: {floor['flops'] / 1e9:.1f} GFLOP at the best of {rates} GFLOP/s of CPU time: "
            f"{floor['cpu']:.3f} s, {floor['cpu'] / base['cpu']:.3f} of the first row.",
        ]
    for name, why in case["failed"].items():
        what = SYSTEMS[name].what if name in SYSTEMS else name
        lines += ["", f"Does not run: {what} ({why})."]
    return [*lines, ""]


def draw(found: dict[str, Any], folder: Path) -> list[Path]:
    """Time and memory against size, rows or depth, for every model measured at three values or more of one of them."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for model in dict.fromkeys(case["model"] for case in found["cases"]):
        for axis, label in AXES.items():
            for cases in _series([c for c in found["cases"] if c["model"] == model], axis):
                figure = Figure(figsize=(11, 4.2), layout="constrained")
                FigureCanvasSVG(figure)
                time, memory = figure.subplots(1, 2)
                key = "wall" if found["machine"]["device"].startswith("cuda") else "cpu"
                for name in dict.fromkeys(n for c in cases for n in c["systems"]):
                    here = [(c[axis], c["systems"][name]) for c in cases if name in c["systems"]]
                    line = SYSTEMS[name].what.replace("*", "").replace("`", "")
                    style = {"marker": "o", "linewidth": 2.2 if name.startswith("ours") else 1.2, "label": line}
                    time.plot([x for x, _ in here], [r[key] for _, r in here], **style)
                    held = [(x, r["peak"] / 1e6) for x, r in here if r["peak"]]
                    memory.plot([x for x, _ in held], [y for _, y in held], **style)
                for part, title in ((time, f"{key} seconds a step"), (memory, "peak MB of a step")):
                    part.set(xscale="log", yscale="log", title=title, xlabel=label or MODELS[model].axis)
                    part.set_xticks([c[axis] for c in cases], [str(c[axis]) for c in cases], minor=False)
                    part.minorticks_off()
                    part.grid(alpha=0.3)
                figure.legend(*time.get_legend_handles_labels(), loc="outside right center", fontsize="small")
                same = ", ".join(f"{cases[0][k]} {v or MODELS[model].axis}" for k, v in AXES.items() if k != axis and cases[0][k])
                figure.suptitle(f"{MODELS[model].what}, {same}")
                path = folder / f"{model}-{axis}.svg"
                figure.savefig(path, metadata={"Date": None})
                written.append(path)
    return written


def _series(cases: list[dict[str, Any]], axis: str) -> list[list[dict[str, Any]]]:
    """Cases that differ in this axis alone: the set with most values of it, three at least. Of twins, the one of more systems."""
    groups: dict[tuple[Any, ...], dict[int, dict[str, Any]]] = {}
    for case in sorted(cases, key=lambda c: len(c["systems"])):
        if case[axis] is not None:
            groups.setdefault(tuple(case[k] for k in AXES if k != axis), {})[case[axis]] = case
    best = max(groups.values(), key=len, default={})
    return [[best[value] for value in sorted(best)]] if len(best) >= 3 else []
