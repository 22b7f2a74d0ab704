"""The pictures of a report, each a PNG in memory. Ours are lines and dots; nothing is drawn that was not measured."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from common.errors import SpecError, refusal
from deploy.report.collect import PHASES, RunData, method_of

_PHASE_NAMES = {"attack_s": "attack", "compute_s": "gradient and update", "communication_s": "waiting for averages"}


def draw(paint: Callable[[Any], None], *, title: str, x: str, y: str) -> bytes:
    """A PNG with axes that `paint` draws on.

    Raises:
        SpecError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        rule = "the package matplotlib (pip install 'datps[report]')"
        raise SpecError(refusal(rule, "report", "figures", str(error))) from None
    figure = Figure(figsize=(6.4, 4.0), dpi=130, layout="constrained")  # without pyplot: no global state, no window
    axes = figure.subplots()
    paint(axes)
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.grid(alpha=0.3)
    handles, labels = axes.get_legend_handles_labels()
    if len(labels) > 1:
        figure.legend(handles, labels, fontsize=8, loc="outside lower center", ncols=3)
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    return picture.getvalue()


def learning_curves(data: Sequence[RunData], names: Mapping[str, str]) -> bytes | None:
    """TA (dashed) and RA against the epoch; None without evaluations."""
    shown = [run for run in data if len(run.evaluations) > 1]
    if not shown:
        return None

    def paint(axes: Any) -> None:
        for run in shown:
            epochs, clean, robust = zip(*run.evaluations, strict=True)
            line = axes.plot(epochs, [100 * each for each in robust], label=names[str(run.folder)])[0]
            axes.plot(epochs, [100 * each for each in clean], linestyle="--", color=line.get_color())

    return draw(paint, title="Test accuracy while training (dashed: TA, solid: RA)", x="epoch", y="per cent")


def against_batch_size(data: Sequence[RunData]) -> bytes | None:
    """TA and RA against M * B by method, figures 1 and 2 of the paper; None unless a method has several sizes."""
    by_method: dict[str, dict[int, list[tuple[float, float]]]] = {}
    for run in data:
        if run.result:
            accuracies = (100 * run.result["clean_accuracy"], 100 * run.result["robust_accuracy"])
            by_method.setdefault(method_of(run.spec), {}).setdefault(run.batch, []).append(accuracies)
    shown = {method: sizes for method, sizes in by_method.items() if len(sizes) > 1}
    if not shown:
        return None

    def paint(axes: Any) -> None:
        for method, sizes in shown.items():
            ordered = sorted(sizes)
            for index, style in ((1, "-"), (0, "--")):
                means = [_mean([each[index] for each in sizes[size]]) for size in ordered]
                label = f"{method}, {'RA' if index else 'TA'}"
                axes.plot(ordered, means, marker="o", linestyle=style, label=label)
        axes.set_xscale("log", base=2)

    return draw(paint, title="Accuracy against batch size", x="samples per round (M x B)", y="per cent")


def time_by_phase(data: Sequence[RunData], names: Mapping[str, str]) -> bytes | None:
    """Seconds per round by phase, a bar for each run."""
    shown = [run for run in data if run.rounds]
    if not shown:
        return None

    def paint(axes: Any) -> None:
        labels = [names[str(run.folder)] for run in shown]
        left = [0.0] * len(shown)
        for phase in PHASES:
            widths = [run.seconds(phase) / len(run.rounds) for run in shown]
            axes.barh(labels, widths, left=left, label=_PHASE_NAMES.get(phase, phase.removesuffix("_s")))
            left = [start + width for start, width in zip(left, widths, strict=True)]
        axes.invert_yaxis()

    return draw(paint, title="Where a round's time goes (mean over the rounds)", x="seconds per round", y="")


def bytes_per_round(data: Sequence[RunData], names: Mapping[str, str]) -> bytes | None:
    """What a worker pushes and pulls each round."""
    shown = [run for run in data if run.result and "pushed_bytes_per_round" in run.result]
    if not shown:
        return None

    def paint(axes: Any) -> None:
        labels = [names[str(run.folder)] for run in shown]
        left = [0.0] * len(shown)
        for key, name in (("pushed_bytes_per_round", "pushed"), ("pulled_bytes_per_round", "pulled")):
            widths = [run.result[key] / 1e6 for run in shown if run.result]
            axes.barh(labels, widths, left=left, label=name)
            left = [start + width for start, width in zip(left, widths, strict=True)]
        axes.invert_yaxis()

    return draw(paint, title="Traffic of one worker", x="MB per round", y="")


def lines(
    series: Mapping[str, Sequence[tuple[float, float]]], *, title: str, x: str, y: str, step: bool = False
) -> bytes | None:
    """Named lines through measured points; None without any."""
    if not any(series.values()):
        return None

    def paint(axes: Any) -> None:
        for name, points in series.items():
            xs, ys = zip(*points, strict=True)
            if step:
                axes.step(xs, ys, where="post", label=name)
            else:
                axes.plot(xs, ys, marker="o", label=name)

    return draw(paint, title=title, x=x, y=y)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
