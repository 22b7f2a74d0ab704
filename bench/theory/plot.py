"""The figure of `datps bench theory`. Needs matplotlib, the extra `report`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from common.errors import SpecError, StorageError, refusal

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLUMNS = 3
_PANEL_INCHES = (4.2, 3.1)
_DPI = 100


def refuse_unless_drawable(path: Path) -> None:
    """Refuses a figure that `draw` could not write, before minutes are spent on what it shows.

    Raises:
        SpecError: matplotlib is not installed, the name does not end in .png, or there is no such folder.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        rule = "matplotlib, of the extra `report` (pip install 'datps[report]')"
        raise SpecError(refusal(rule, "plot", path, str(error))) from None
    if path.suffix.lower() != ".png":
        raise SpecError(refusal("a file name that ends in .png", "plot", path))
    if not path.parent.is_dir():
        raise SpecError(refusal("a folder that is there", "plot", path, f"{path.parent} is not"))


def draw(path: Path, result: dict[str, Any]) -> None:
    """One panel for each sweep: what was measured, its fit, the bound and G^2.

    Raises:
        StorageError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    rows = result["sweeps"]
    lines = -(-len(rows) // _COLUMNS)
    columns = min(_COLUMNS, len(rows))
    figure = Figure(
        figsize=(columns * _PANEL_INCHES[0], lines * _PANEL_INCHES[1] + 0.4), dpi=_DPI, layout="constrained"
    )
    for number, row in enumerate(rows):
        _panel(figure.add_subplot(lines, columns, number + 1), row)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    try:
        figure.savefig(path)
    except OSError as error:
        raise StorageError(refusal("a file that can be written", "plot", path, str(error))) from None


def _panel(axes: Axes, row: dict[str, Any]) -> None:
    points, fit = row["points"], row["fit"]
    x = np.array([point["x"] for point in points])
    mean = np.array([point["mean"] for point in points])
    spread = [mean - [point["smallest"] for point in points], [point["largest"] for point in points] - mean]
    axes.errorbar(x, mean, yerr=spread, fmt="o", markersize=4, capsize=2, label="measured, least to greatest seed")
    axes.plot(x, fit["factor"] * x ** fit["exponent"], "-", color="C0", linewidth=1, label="fit")
    slope = mean[0] * (x / x[0]) ** row["theorem_1"]
    axes.plot(x, slope, "--", color="C2", linewidth=1, label="Theorem 1's exponent")
    if points[0]["bound"] is not None:
        axes.plot(
            x, [point["bound"] for point in points], "s-", color="C3", markersize=3, linewidth=1, label="bound (A25)"
        )
    axes.plot(x, [point["trivial"] for point in points], ":", color="0.4", linewidth=1, label="G²")
    axes.set(xscale="log", yscale="log", xlabel=row["variable"])
    axes.set_xticks(x, [f"{value:.3g}" for value in x])
    axes.xaxis.minorticks_off()
    axes.set_title(
        f"{row['name']}: {fit['exponent']:+.2f} ({fit['low']:+.2f} to {fit['high']:+.2f})", fontsize="medium"
    )
    axes.grid(alpha=0.3)
