"""The picture of `datps certify`: certified accuracy against l2 radius. Needs matplotlib, the extra `report`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from common.errors import SpecError, StorageError, refusal

if TYPE_CHECKING:
    from worker.certificates import CertifiedSample
    from worker.certification import CertificationSettings

_SIZE_INCHES, _DPI = (6.4, 4.4), 150
_TITLE_CHARACTERS = 60
STEPS: Literal["pre"] = "pre"
"""How matplotlib is to join the points of `outline`: at a radius the accuracy is still that of the step to its left."""


def outline(samples: Sequence[CertifiedSample]) -> tuple[list[float], list[float]]:
    """The points of the staircase of certified accuracy, down to 0 behind the last radius; at least one sample."""
    from worker.certificates import certified_curve

    radii, accuracies = certified_curve(samples)
    return [*radii, radii[-1]], [*accuracies, 0.0]


def refuse_unless_drawable(path: Path) -> None:
    """Refuses a picture that `draw` could not write, before hours are spent on what it shows.

    Raises:
        SpecError: matplotlib is not installed, it has no such format, or there is no such folder.
    """
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError as error:
        rule = "matplotlib, of the extra `report` (pip install 'datps[report]')"
        raise SpecError(refusal(rule, "plot", path, str(error))) from None
    formats = sorted(FigureCanvasBase.get_supported_filetypes())
    if path.suffix.removeprefix(".").lower() not in formats:
        raise SpecError(refusal(f"a file name that ends in one of {', '.join(formats)}", "plot", path))
    if not path.parent.is_dir():
        raise SpecError(refusal("a folder that is there", "plot", path, f"{path.parent} is not"))


def draw(path: Path, samples: Sequence[CertifiedSample], settings: CertificationSettings, *, title: str) -> None:
    """Draws the steps of certified accuracy, and the radius that no certificate can pass.

    Raises:
        StorageError: the file cannot be written.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    radii, accuracies = outline(samples)
    figure = Figure(figsize=_SIZE_INCHES, dpi=_DPI, layout="constrained")
    axes = figure.add_subplot()
    axes.step(radii, accuracies, where=STEPS, label=f"{len(samples)} samples")
    axes.axvline(settings.maximal_radius, color="0.5", linestyle=":", label=f"greatest radius of n={settings.n}")
    axes.set(xlim=(0, None), ylim=(0, 1.02), xlabel="l2 radius", ylabel="certified accuracy")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2)
    described = f"noise_std={settings.noise_std:g}, n={settings.n}, alpha={settings.alpha:g}"
    shown = title if len(title) <= _TITLE_CHARACTERS else f"...{title[-_TITLE_CHARACTERS:]}"
    axes.set_title(f"{shown}\n{described}", fontsize="medium", parse_math=False)
    try:
        figure.savefig(path)
    except OSError as error:
        raise StorageError(refusal("a file that can be written", "plot", path, str(error))) from None
