"""The report's tables, and all of it as one HTML page that needs nothing beside itself."""

from __future__ import annotations

import base64
import html
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from common.config import JobSpec, ObjectiveName
from deploy.report import paper
from deploy.report.collect import RunData, communication_of, method_of
from deploy.report.experiments import Experiment, experiments, told_apart
from deploy.report.judged import autoattack_of
from deploy.report.paper import PaperRow

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1d2330; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .88rem; }
th, td { padding: .3rem .7rem; text-align: left; border-bottom: 1px solid #e3e6ec; white-space: nowrap; }
th { color: #5b6475; font-weight: 600; }
.number { text-align: right; }
.long { white-space: normal; min-width: 24rem; }
tr.ours td { background: #f2f7ff; }
figure { margin: 1rem 0; } img { max-width: 100%; height: auto; }
p.note { color: #5b6475; max-width: 48rem; }
"""
_SAID = (
    *("data.name", "model.name", "workers", "data.batch_per_worker", "objective.name"),
    *("codec.name", "codec.bits", "codec.two_sided", "codec.density", "exchange.topology"),
)
"""Keys of the job that the words of its row speak of."""
_LONG = 60
"""Characters; longer cells are broken into lines."""
_NOTE_OF_OURS = (
    "Rows of ours are means over runs whose jobs differ in nothing but their seed and how they are carried out; "
    "they name the keys in which they differ from other rows of ours of their method. "
    "AA images: of the test data, so many were attacked by AutoAttack."
)


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table as text.

    Attributes:
        title: of its section.
        note: what to know about it.
        head, rows: cells; a row with True is one of ours beside the paper's.
    """

    title: str
    note: str
    head: Sequence[str]
    rows: Sequence[tuple[Sequence[str], bool]]


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A figure: its file name without suffix, what it shows, and the PNG."""

    name: str
    title: str
    png: bytes


def page(title: str, tables: Iterable[Table], pictures: Iterable[Picture]) -> str:
    """The HTML document."""
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(title)}</title>",
        f"<meta name=viewport content='width=device-width'><style>{_STYLE}</style><h1>{html.escape(title)}</h1>",
        *map(_table, tables),
        *map(_picture, pictures),
    ]
    return "\n".join(parts) + "\n"


def runs_table(data: Sequence[RunData], names: Mapping[str, str]) -> Table:
    """All runs, with what they cost."""
    head: tuple[str, ...] = (
        "run",
        "method",
        "data",
        "model",
        "M x B",
        "communication",
        "epochs",
        "TA %",
        "RA %",
        "C, s",
        "T, s",
    )
    head += ("pushed, MB", "pulled, MB")
    rows = []
    for run in data:
        result, spec = run.result or {}, run.spec
        cells = [
            names[str(run.folder)],
            *(method_of(spec), spec.data.name.value, spec.model.name.value),
            f"{spec.workers} x {spec.data.batch_per_worker}",
            *(communication_of(spec), f"{run.epochs:g}"),
            *(_percent(result.get(name)) for name in ("clean_accuracy", "robust_accuracy")),
            *(_of_epoch(run, name) for name in ("communication_s", "round_s")),
            *(_mega(result.get(name)) for name in ("pushed_bytes_per_round", "pulled_bytes_per_round")),
        ]
        rows.append((cells, False))
    note = (
        "C: waiting for averages, T: all of it, seconds of worker 0 per epoch. Pushed, pulled: one worker, per round. "
        "A run without accuracies is not complete."
    )
    return Table(title="Runs", note=note, head=head, rows=rows)


def table_1(data: Sequence[RunData]) -> Table | None:
    """The paper's Table 1, with our runs of the same methods."""
    return _beside(
        "Table 1: methods",
        "ImageNet, ResNet-50 in the paper; C and T are seconds per epoch. Where ours are other data and models, "
        "compare rows of ours with each other.",
        paper.TABLE_1,
        data,
        _ours_of,
    )


def table_3(data: Sequence[RunData]) -> Table | None:
    """The paper's Table 3: semi-supervised training; our runs stand below the row of their network."""
    return _beside(
        "Table 3: labeled and unlabeled images",
        "CIFAR-10 with 500K unlabeled images in the paper.",
        paper.TABLE_3,
        data,
        _ours_of,
        lambda row, spec: row.model is spec.model.name,
    )


def table_4(data: Sequence[RunData]) -> Table | None:
    """The paper's Table 4: bits on the wire."""
    return _beside(
        "Table 4: quantization",
        "ImageNet, ResNet-50, 6 x 512 in the paper. Data: all workers together, both ways, per round.",
        paper.TABLE_4,
        data,
        lambda spec: f"{communication_of(spec)}; {_where(spec)}, {spec.codec.name}",
        lambda row, spec: row.setting == communication_of(spec),
    )


def table_2(ours: Mapping[str, tuple[str, Sequence[float | None]]]) -> Table | None:
    """The paper's Table 2: certified accuracy at its radii.

    `ours`: by name of the run, how many samples, and fractions.
    """
    if not ours:
        return None
    rows: list[tuple[Sequence[str], bool]] = []
    for (noise_std, copies), values in paper.TABLE_2.items():
        figures = [f"{100 * value:.1f}" for value in values]
        rows.append(([f"paper: noise {noise_std}, N = {copies}", "", *figures], False))
    for name, (samples, found) in ours.items():
        rows.append(([name, samples, *(_percent(value) for value in found)], True))
    note = (
        "CIFAR-10, ResNet-18 in the paper. Certified accuracy, per cent, at l2 radii of pixels in [0, 1]. "
        "Where samples says `12 of 60` the certification is not complete; without any sample there are no figures."
    )
    head = ("classifier", "samples", *(f"r = {radius:g}" for radius in paper.RADII))
    return Table(title="Table 2: certified accuracy", note=note, head=head, rows=rows)


def _where(spec: JobSpec) -> str:
    return f"{spec.data.name}, {spec.model.name}, {spec.workers} x {spec.data.batch_per_worker}"


def _ours_of(spec: JobSpec) -> str:
    return f"{_where(spec)}, {spec.codec.name}, {communication_of(spec)}"


def _beside(
    title: str,
    note: str,
    rows_of_paper: Sequence[PaperRow],
    data: Sequence[RunData],
    words_of: Callable[[JobSpec], str],
    belongs: Callable[[PaperRow, JobSpec], bool] = lambda _row, _spec: True,
) -> Table | None:
    """Rows of the paper, each followed by our experiments of its kind, means over seeds; None where none is.

    Args:
        title, note, rows_of_paper, data: what to show.
        words_of: what to say of a job of ours.
        belongs: whether a job of the row's method is of the row's kind; those of no row stand at the end.
    """
    methods = {row.method for row in rows_of_paper}
    found = experiments(run for run in data if run.result and method_of(run.spec) in methods)
    if not found:
        return None
    specs = [experiment.runs[0].spec for experiment in found]
    heads = [(method_of(spec), f"ours: {words_of(spec)}{_objective(spec)}") for spec in specs]
    keys = [experiment.keys for experiment in found]
    words = told_apart([text for _, text in heads], keys, _SAID, by=[method for method, _ in heads])
    left = [
        (method, spec, _our_cells(method, text, experiment))
        for (method, _), spec, text, experiment in zip(heads, specs, words, found, strict=True)
    ]
    rows: list[tuple[Sequence[str], bool]] = []
    for row in rows_of_paper:
        rows.append((_paper_cells(row), False))
        here = [ours for ours in left if ours[0] == row.method and belongs(row, ours[1])]
        rows += [(cells, True) for _, _, cells in here]
        left = [ours for ours in left if ours not in here]
    rows += [(cells, True) for _, _, cells in left]
    head = ("method", "setting", "TA %", "RA %", "AA %", "AA images", "C, s", "T, s", "data, MB", "runs")
    return Table(title=title, note=f"{note} {_NOTE_OF_OURS}", head=head, rows=rows)


def _objective(spec: JobSpec) -> str:
    return "" if spec.objective.name is ObjectiveName.ADVERSARIAL else f", {spec.objective.name}"


def _paper_cells(row: PaperRow) -> list[str]:
    accuracies, costs = (row.clean, row.robust, row.autoattack), (row.communication_s, row.epoch_s, row.sent_mb)
    shown = ["" if each is None else f"{each:,.2f}" for each in accuracies]
    shown += ["", *("" if each is None else f"{each:,.0f}" for each in costs)]
    return [row.method, f"paper: {row.setting}", *shown, ""]


def _our_cells(method: str, words: str, experiment: Experiment) -> list[str]:
    group = experiment.runs

    def mean(name: str) -> str:
        values = [100 * run.result[name] for run in group if run.result and name in run.result]
        return f"{statistics.mean(values):.2f}" if len(values) == len(group) else ""

    def per_epoch(name: str) -> str:
        values = [run.seconds(name) / run.epochs for run in group if run.epochs]
        return f"{statistics.mean(values):,.4g}" if values else ""

    sent = [
        run.spec.workers * (run.result["pushed_bytes_per_round"] + run.result["pulled_bytes_per_round"]) / 1e6
        for run in group
        if run.result and {"pushed_bytes_per_round", "pulled_bytes_per_round"} <= set(run.result)
    ]
    return [
        *(method, words, mean("clean_accuracy"), mean("robust_accuracy"), *_autoattack(group)),
        *(per_epoch("communication_s"), per_epoch("round_s")),
        *(f"{statistics.mean(sent):,.4g}" if sent else "", str(len(group))),
    ]


def _autoattack(group: Sequence[RunData]) -> tuple[str, str]:
    """Mean AA, and on how many images; only if all runs have it, like the other means."""
    found = [each for run in group if (each := autoattack_of(run.judged, run.spec, run.result))]
    if len(found) < len(group):
        return "", ""
    images = sorted({samples for _, samples in found})
    shown = str(images[0]) if len(images) == 1 else f"{images[0]} to {images[-1]}"
    return f"{100 * statistics.mean(accuracy for accuracy, _ in found):.2f}", shown


def _table(table: Table) -> str:
    numeric = [all(_is_number(cells[column]) for cells, _ in table.rows) for column in range(len(table.head))]
    head = "".join(_cell("th", cell, number) for cell, number in zip(table.head, numeric, strict=True))
    rows = "\n".join(
        f"<tr{' class=ours' if ours else ''}>"
        + "".join(_cell("td", cell, number) for cell, number in zip(cells, numeric, strict=True))
        for cells, ours in table.rows
    )
    section = f"<h2>{html.escape(table.title)}</h2><p class=note>{html.escape(table.note)}</p>"
    return f"{section}<div class=wide><table><tr>{head}\n{rows}</table></div>"


def _cell(tag: str, text: str, number: bool) -> str:
    kind = " class=number" if number else " class=long" if len(text) > _LONG else ""
    return f"<{tag}{kind}>{html.escape(text)}"


def _is_number(cell: str) -> bool:
    return not cell.replace(",", "").replace(".", "").replace("e-0", "").strip("0123456789")


def _picture(picture: Picture) -> str:
    data = base64.b64encode(picture.png).decode()
    alt = html.escape(picture.title)
    return f"<h2>{alt}</h2><figure><img alt='{alt}' src='data:image/png;base64,{data}'></figure>"


def _percent(fraction: float | None) -> str:
    return "" if fraction is None else f"{100 * fraction:.1f}"


def _mega(count: float | None) -> str:
    return "" if count is None else f"{count / 1e6:.3g}"


def _of_epoch(run: RunData, phase: str) -> str:
    return f"{run.seconds(phase) / run.epochs:.3g}" if run.epochs else ""
