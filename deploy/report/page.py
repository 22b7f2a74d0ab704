"""The report's tables, and all of it as one HTML page that needs nothing beside itself."""

from __future__ import annotations

import base64
import html
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from deploy.report import paper
from deploy.report.collect import RunData, communication_of, method_of
from deploy.report.paper import PaperRow

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1d2330; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .88rem; }
th, td { padding: .3rem .7rem; text-align: left; border-bottom: 1px solid #e3e6ec; white-space: nowrap; }
th { color: #5b6475; font-weight: 600; }
.number { text-align: right; }
tr.ours td { background: #f2f7ff; }
figure { margin: 1rem 0; } img { max-width: 100%; height: auto; }
p.note { color: #5b6475; max-width: 48rem; }
"""


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
        lambda run: (method_of(run.spec), None),
    )


def table_3(data: Sequence[RunData]) -> Table | None:
    """The paper's Table 3: semi-supervised training."""
    return _beside(
        "Table 3: labeled and unlabeled images",
        "CIFAR-10 with 500K unlabeled images in the paper.",
        paper.TABLE_3,
        data,
        lambda run: (method_of(run.spec), None),
    )


def table_4(data: Sequence[RunData]) -> Table | None:
    """The paper's Table 4: bits on the wire."""
    return _beside(
        "Table 4: quantization",
        "ImageNet, ResNet-50, 6 x 512 in the paper. Data: all workers together, both ways, per round.",
        paper.TABLE_4,
        data,
        lambda run: (method_of(run.spec), communication_of(run.spec)),
    )


def table_2(ours: Mapping[str, Sequence[float | None]]) -> Table | None:
    """The paper's Table 2: certified accuracy at its radii; `ours`: by name of the run, fractions."""
    if not ours:
        return None
    rows: list[tuple[Sequence[str], bool]] = []
    for (noise_std, copies), values in paper.TABLE_2.items():
        rows.append(([f"paper: noise {noise_std}, N = {copies}", *(f"{100 * value:.1f}" for value in values)], False))
    for name, found in ours.items():
        rows.append(([name, *(_percent(value) for value in found)], True))
    note = "CIFAR-10, ResNet-18 in the paper. Certified accuracy, per cent, at l2 radii of pixels in [0, 1]."
    head = ("classifier", *(f"r = {radius:g}" for radius in paper.RADII))
    return Table(title="Table 2: certified accuracy", note=note, head=head, rows=rows)


def _beside(
    title: str,
    note: str,
    rows_of_paper: Sequence[PaperRow],
    data: Sequence[RunData],
    key_of: Callable[[RunData], tuple[str, str | None]],
) -> Table | None:
    """Rows of the paper, each followed by ours of the same kind, means over seeds; None where none is."""
    ours: dict[tuple[str, ...], list[RunData]] = {}
    methods = {row.method for row in rows_of_paper}
    for run in data:
        method, setting = key_of(run)
        if run.result and method in methods:
            where = (
                f"{run.spec.data.name}, {run.spec.model.name}, {run.spec.workers} x {run.spec.data.batch_per_worker}"
            )
            words = where if setting is None else f"{setting}; {where}"
            codec = f", {run.spec.codec.name}"
            ours.setdefault((method, setting or "", words + codec), []).append(run)
    if not ours:
        return None
    settings = {row.setting for row in rows_of_paper}
    rows: list[tuple[Sequence[str], bool]] = []
    left = dict(ours)
    for row in rows_of_paper:
        rows.append((_paper_cells(row), False))
        for key in [key for key in left if key[0] == row.method and key[1] in ("", row.setting)]:
            rows.append((_our_cells(key[0], key[2], left.pop(key)), True))
    for key, group in left.items():  # settings that the paper does not have
        assert key[1] not in settings or key[0] in methods
        rows.append((_our_cells(key[0], key[2], group), True))
    head = ("method", "setting", "TA %", "RA %", "AA %", "C, s", "T, s", "data, MB", "runs")
    return Table(title=title, note=note, head=head, rows=rows)


def _paper_cells(row: PaperRow) -> list[str]:
    numbers = (row.clean, row.robust, row.autoattack, row.communication_s, row.epoch_s, row.sent_mb)
    shown = ["" if each is None else f"{each:,.{2 if index < 3 else 0}f}" for index, each in enumerate(numbers)]
    return [row.method, f"paper: {row.setting}", *shown, ""]


def _our_cells(method: str, words: str, group: Sequence[RunData]) -> list[str]:
    def mean(name: str) -> str:
        values = [100 * run.result[name] for run in group if run.result and name in run.result]
        return f"{statistics.mean(values):.2f}" if len(values) == len(group) else ""

    def per_epoch(name: str) -> str:
        values = [run.seconds(name) / run.epochs for run in group if run.epochs]
        return f"{statistics.mean(values):,.4g}" if values else ""

    sent = [
        run.spec.workers * (run.result["pushed_bytes_per_round"] + run.result["pulled_bytes_per_round"]) / 1e6
        for run in group
        if run.result and "pushed_bytes_per_round" in run.result
    ]
    return [
        *(method, f"ours: {words}", mean("clean_accuracy"), mean("robust_accuracy")),
        *(mean("autoattack_accuracy"), per_epoch("communication_s"), per_epoch("round_s")),
        *(f"{statistics.mean(sent):,.4g}" if sent else "", str(len(group))),
    ]


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
    return f"<{tag}{' class=number' if number else ''}>{html.escape(text)}"


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
