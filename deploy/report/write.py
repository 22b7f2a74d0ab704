"""Writes a report: collects the runs, draws, and puts the page and its pictures into a folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common.errors import StorageError, refusal
from deploy.certified_plot import outline
from deploy.report import figures
from deploy.report.collect import RunData, collect
from deploy.report.page import Picture, page, runs_table, table_1, table_2, table_3, table_4
from deploy.report.paper import RADII
from worker.certificates import summarize

PAGE = "report.html"


def write(paths: Sequence[Path], out: Path, title: str) -> dict[str, Any]:
    """Writes `report.html` and a PNG of each figure into `out`; returns what was written, by name.

    Raises:
        SpecError: no runs in a path, a damaged one, or matplotlib is missing.
        StorageError: the folder cannot be written.
    """
    data = collect(paths)
    names = names_of(data)
    tables = [
        runs_table(data, names),
        *(table_1(data), table_2(at_paper_radii(data, names)), table_3(data), table_4(data)),
    ]
    pictures = pictures_of(data, names)
    try:
        out.mkdir(parents=True, exist_ok=True)
        for picture in pictures:
            (out / f"{picture.name}.png").write_bytes(picture.png)
        (out / PAGE).write_text(page(title, [table for table in tables if table], pictures), encoding="utf-8")
    except OSError as error:
        raise StorageError(refusal("a folder with room to write", "out", out, str(error))) from None
    return {"page": str(out / PAGE), "runs": len(data), "pictures": [f"{picture.name}.png" for picture in pictures]}


def names_of(data: Sequence[RunData]) -> dict[str, str]:
    """A short name for each run's folder, different for all: its last parts, as many as that takes."""
    for depth in range(1, 8):
        names = {str(run.folder): "/".join(run.folder.parts[-depth:]) for run in data}
        if len(set(names.values())) == len(names):
            return names
    return {str(run.folder): str(run.folder) for run in data}


def pictures_of(data: Sequence[RunData], names: Mapping[str, str]) -> list[Picture]:
    """All figures that these runs have something for."""
    drawn = {
        ("learning-curves", "Learning curves"): figures.learning_curves(data, names),
        ("batch-size", "Accuracy against batch size (Figures 1 and 2)"): figures.against_batch_size(data),
        ("epsilon", "RA against epsilon (Figure 3a)"): figures.lines(
            swept(data, names, "epsilon"), title="RA against the attack's radius", x="epsilon", y="per cent"
        ),
        ("steps", "RA against attack steps (Figure 3b)"): figures.lines(
            swept(data, names, "steps"), title="RA against the attack's steps", x="attack steps", y="per cent"
        ),
        ("certified", "Certified accuracy against radius"): figures.lines(
            certified_curves(data, names), title="Certified accuracy", x="l2 radius", y="per cent", step=True
        ),
        ("time", "Time by phase"): figures.time_by_phase(data, names),
        ("traffic", "Bytes per round"): figures.bytes_per_round(data, names),
    }
    return [Picture(name=name, title=title, png=png) for (name, title), png in drawn.items() if png is not None]


def at_paper_radii(data: Sequence[RunData], names: Mapping[str, str]) -> dict[str, tuple[str, list[float | None]]]:
    """How many samples, and certified accuracy at the radii of Table 2, by run and file of certificates."""
    found: dict[str, tuple[str, list[float | None]]] = {}
    for run in data:
        for file, certificates in run.certified.items():
            values: list[float | None] = [None] * len(RADII)
            if certificates.samples:
                values = [each["accuracy"] for each in summarize(certificates.samples, RADII)["certified"]]
            found[f"{names[str(run.folder)]}, {file}"] = certificates.counted, values
    return found


def certified_curves(data: Sequence[RunData], names: Mapping[str, str]) -> dict[str, list[tuple[float, float]]]:
    """(radius, certified accuracy in per cent) by run and file of certificates that has some."""
    curves = {}
    for run in data:
        for file, certificates in run.certified.items():
            if certificates.samples:
                points = zip(*outline(certificates.samples), strict=True)
                curves[f"{names[str(run.folder)]}, {file}"] = [(radius, 100 * each) for radius, each in points]
    return curves


def swept(data: Sequence[RunData], names: Mapping[str, str], key: str) -> dict[str, list[tuple[float, float]]]:
    """(value, RA in per cent) of the sweeps over `key`, by run."""
    series = {}
    for run in data:
        for sweep in (each for judged in run.judged for each in judged.sweeps if each.key == key):
            points = [(value, 100 * row.robust_accuracy) for row in sweep.rows if (value := row.at(key)) is not None]
            series[f"{names[str(run.folder)]}, {', '.join(sweep.attacks)}"] = points
    return series
