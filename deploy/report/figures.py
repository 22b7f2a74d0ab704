"""The pictures of a report, each a PNG in memory. Ours are lines and dots; nothing is drawn that was not measured."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from common.errors import SpecError, refusal
from deploy.certified_plot import STEPS
from deploy.report.collect import PHASES, RunData
from deploy.report.experiments import by_size, experiments, label_of

_WIDTH, _HEIGHT, _BAR, _LEGEND_ROW = 6.4, 4.0, 0.22, 0.19
"""Inches: of a picture, and what a bar and a row of the legend add to its height."""
_LEGEND_CHARACTERS, _KEY_CHARACTERS = 96, 6
"""Of a row of the legend, and of the line before each name."""
_PHASE_NAMES = {"attack_s": "attack", "compute_s": "gradient and update", "communication_s": "waiting for averages"}


def draw(paint: Callable[[Any], None], *, title: str, x: str, y: str, bars: int = 0) -> bytes:
    """A PNG with axes that `paint` draws on, as high as its legend and its `bars` need.

    Raises:
        SpecError: matplotlib is not installed.
    """
    try:
        from matplotlib import colormaps
        from matplotlib.figure import Figure
    except ImportError as error:
        rule = "the package matplotlib (pip install 'datps[report]')"
        raise SpecError(refusal(rule, "report", "figures", str(error))) from None
    figure = Figure(
        figsize=(_WIDTH, _HEIGHT), dpi=130, layout="constrained"
    )  # without pyplot: no global state, no window
    axes = figure.subplots()
    axes.set_prop_cycle(color=[colormaps["tab20"](number) for number in (*range(0, 20, 2), *range(1, 20, 2))])
    paint(axes)
    axes.set(xlabel=x, ylabel=y)
    axes.grid(alpha=0.3)
    figure.suptitle(title)  # of the axes it would leave the picture where the bars have long names
    handles, labels = axes.get_legend_handles_labels()
    height = max(_HEIGHT, 1.5 + _BAR * bars)
    if len(labels) > 1:
        columns = max(1, min(3, len(labels), _LEGEND_CHARACTERS // (_KEY_CHARACTERS + max(map(len, labels)))))
        figure.legend(handles, labels, fontsize=8, loc="outside lower center", ncols=columns)
        height += _LEGEND_ROW * (math.ceil(len(labels) / columns) - 1)
    figure.set_figheight(height)
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    return picture.getvalue()


def learning_curves(data: Sequence[RunData], names: Mapping[str, str]) -> bytes | None:
    """Clean (dashed) and robust accuracy against the epoch, on what data they were; None without evaluations.

    The runs of an experiment have one color.
    """
    shown = [run for run in data if len(run.evaluations) > 1]
    if not shown:
        return None
    kinds = {run.evaluated_on for run in shown}

    def paint(axes: Any) -> None:
        for experiment in experiments(shown):
            own = experiment.runs[0].evaluated_on
            label, color = label_of(experiment, names) + ("" if len(kinds) == 1 else f" ({own})"), None
            for run in experiment.runs:
                epochs, clean, robust = zip(*run.evaluations, strict=True)
                line = axes.plot(epochs, [100 * each for each in robust], label=label, color=color, linewidth=1)[0]
                color, label = line.get_color(), "_"  # in the legend once
                axes.plot(epochs, [100 * each for each in clean], linestyle="--", color=color, linewidth=1)

    accuracy = f"{next(iter(kinds)).capitalize()} accuracy" if len(kinds) == 1 else "Accuracy"
    return draw(paint, title=f"{accuracy} while training (dashed: clean, solid: robust)", x="epoch", y="per cent")


def against_batch_size(data: Sequence[RunData]) -> bytes | None:
    """TA and RA against M * B, Figures 1 and 2 of the paper; None unless some experiment has several sizes."""
    shown = by_size(data)
    if not shown:
        return None

    def paint(axes: Any) -> None:
        for name, sizes in shown.items():
            color = None
            for short, key, style in (("RA", "robust_accuracy", "-"), ("TA", "clean_accuracy", "--")):
                means = [_mean([100 * run.result[key] for run in runs if run.result]) for runs in sizes.values()]
                points = {"marker": "o", "linestyle": style, "label": f"{name}, {short}", "color": color}
                color = axes.plot(list(sizes), means, **points)[0].get_color()
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

    return draw(
        paint, title="Where a round's time goes (mean over the rounds)", x="seconds per round", y="", bars=len(shown)
    )


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

    return draw(paint, title="Traffic of one worker", x="MB per round", y="", bars=len(shown))


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
                axes.step(xs, ys, where=STEPS, label=name)
            else:
                axes.plot(xs, ys, marker="o", label=name)

    return draw(paint, title=title, x=x, y=y)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
