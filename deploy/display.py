"""What `datps train` looks like: a live picture on a terminal, JSON lines elsewhere, and the table at the end."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Protocol, Self, TextIO

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from deploy.progress import LEAD, ProcessState, ProcessView, RunView, update

MAXIMAL_ROWS = 16
"""Processes that are listed; of more, those that fare worst."""
_REFRESH_S = 0.25
_FLOAT32_BYTES = 4
_LABEL = "bright_black"
_COLOURS = {
    ProcessState.STARTING: "yellow",
    ProcessState.LISTENING: "cyan",
    ProcessState.JOINED: "cyan",
    ProcessState.TRAINING: "green",
    ProcessState.WAITING: "yellow",
    ProcessState.DONE: "bright_green",
    ProcessState.STOPPED: "yellow",
    ProcessState.FAILED: "bold red",
}


class Display(Protocol):
    """Shows the clusters of one `datps train`, one after the other."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def open(self, view: RunView) -> None:
        """Begins a cluster."""

    def observe(self, event: dict[str, Any]) -> None:
        """An event of the cluster, or a tick."""

    def say(self, event: str, text: str, **fields: Any) -> None:
        """A word of the launcher itself."""

    def result(self, title: str, folder: str, result: Mapping[str, Any], robust_name: str) -> None:
        """The end of a complete run."""


class TerminalDisplay:
    """A live picture."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._view: RunView | None = None
        self._live: Live | None = None
        self._drawn_s = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def open(self, view: RunView) -> None:
        """See `Display`."""
        self._close()
        self._view = view
        self._live = Live(render(view), console=self._console, auto_refresh=False)
        self._live.start()

    def observe(self, event: dict[str, Any]) -> None:
        """See `Display`."""
        if self._view is None:
            return
        self._view = update(self._view, event)
        now_s = time.monotonic()
        if now_s - self._drawn_s >= _REFRESH_S:
            self._drawn_s = now_s
            self._draw()

    def say(self, event: str, text: str, **_fields: Any) -> None:
        """See `Display`; how it ended is the caller's to print."""
        self._close()
        if event not in ("error", "stopping"):
            self._console.print(Text(text))

    def result(self, title: str, folder: str, result: Mapping[str, Any], robust_name: str) -> None:
        """See `Display`."""
        self._close()
        self._console.print(summary(title, folder, result, robust_name))

    def _draw(self) -> None:
        """A terminal that has gone away must not end the training before its state is saved."""
        if self._live is not None and self._view is not None:
            with contextlib.suppress(OSError):
                self._live.update(render(self._view), refresh=True)

    def _close(self) -> None:
        if self._live is not None:
            self._draw()
            with contextlib.suppress(OSError):
                self._live.stop()
            self._live = None


class JsonLinesDisplay:
    """The events that matter to a program, thinned out: `round` at most once a second and of one worker."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._round_s = float("-inf")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Every line has been flushed."""

    def open(self, view: RunView) -> None:
        """See `Display`."""
        self._write({"event": "run", "title": view.title, "folder": view.folder})

    def observe(self, event: dict[str, Any]) -> None:
        """See `Display`."""
        if self._matters(event):
            self._write(event)

    def say(self, event: str, text: str, **fields: Any) -> None:
        """See `Display`."""
        self._write({"event": event, "text": text, **fields})

    def result(self, title: str, folder: str, result: Mapping[str, Any], robust_name: str) -> None:
        """See `Display`."""
        names = {"title": title, "folder": folder, "robust_accuracy_attack": robust_name}
        self._write({"event": "result", **names, **result})

    def _matters(self, event: Mapping[str, Any]) -> bool:
        kind, process = event["event"], event.get("process", LEAD)
        if kind == "tick" or kind == "result":  # the launcher tells the result, with the baseline's
            return False
        if kind in ("round", "evaluation", "waiting") and process.startswith("worker-") and process != LEAD:
            return False
        if kind == "round":
            due = event["time"] - self._round_s >= 1.0 or event["round"] == event["rounds"]
            self._round_s = event["time"] if due else self._round_s
            return bool(due)
        return True

    def _write(self, event: Mapping[str, Any]) -> None:
        line = {"event": event["event"], "process": "train", "time": round(time.time(), 3), **event}
        with contextlib.suppress(OSError, ValueError):  # nobody reads any more: no error of the job
            self._stream.write(json.dumps(line) + "\n")
            self._stream.flush()


def render(view: RunView) -> RenderableType:
    """The picture of a running cluster."""
    parts: list[RenderableType] = [
        Text.assemble((view.title, "bold"), f"  {view.job}"),
        Text(f"run folder {view.folder}", style=_LABEL),
        _processes(view),
        _progress(view),
        _figures(view),
    ]
    if view.waiting_for:
        parts.append(Text(f"waiting for {', '.join(view.waiting_for)} ({view.waited_s:.0f} s)", style="yellow"))
    elif view.slow_starters:
        waited_s = view.now_s - min(view.processes[name].started_s for name in view.slow_starters)
        parts.append(Text(f"waiting for {', '.join(view.slow_starters)} to start ({waited_s:.0f} s)", style="yellow"))
    if view.message:
        parts.append(Text(view.message, style="yellow"))
    return Group(*parts, Text(""))


def summary(title: str, folder: str, result: Mapping[str, Any], robust_name: str) -> RenderableType:
    """The end of a run: accuracies beside the baseline's, time, traffic, and where to look.

    Args:
        title: what was trained.
        folder: the run folder.
        result: result.json.
        robust_name: e.g. `PGD-20, epsilon 0.2`.
    """
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("model")
    table.add_column("clean accuracy (TA)", justify="right")
    table.add_column(f"robust accuracy (RA, {robust_name})", justify="right")
    table.add_row(escape(title), _percent(result["clean_accuracy"]), _percent(result["robust_accuracy"]))
    best = result.get("best") or {}
    if "robust_accuracy" in best:
        accuracies = _percent(best["clean_accuracy"]), _percent(best["robust_accuracy"])
        table.add_row(f"its best on validation data (round {best['round']})", *accuracies)
    if baseline := result.get("baseline"):
        accuracies = _percent(baseline["clean_accuracy"]), _percent(baseline["robust_accuracy"])
        table.add_row("the same without attacks", *accuracies)
    grid = _grid()
    seconds = f"{result['seconds']:.1f} s, of which " + ", ".join(
        f"{result[key]:.1f} s {word}"
        for key, word in (
            ("attack_seconds", "attacking"),
            ("compute_seconds", "computing"),
            ("communication_seconds", "communicating"),
        )
        if key in result
    )
    grid.add_row("time", f"{seconds} ({result['rounds']} rounds, {result['workers']} workers)")
    for word in ("pushed", "pulled"):
        grid.add_row(word, _against_float32(result[f"{word}_bytes_per_round"], result["parameters"]))
    grid.add_row("run folder", escape(folder))
    return Group(table, grid)


def _processes(view: RunView) -> RenderableType:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("process", "pid", "role", "state", "where", ""):
        table.add_column(name, overflow="fold" if name == "" else "ellipsis", no_wrap=name != "")
    rows = list(view.processes.values())
    if len(rows) > MAXIMAL_ROWS:
        rows = sorted(rows, key=_urgency)[: MAXIMAL_ROWS - 1]
    for row in rows:
        state = Text(row.state.value, style=_COLOURS[row.state])
        table.add_row(row.name, str(row.pid), row.role.value, state, row.place, Text(_first_line(row.note)))
    if len(rows) < len(view.processes):
        table.add_row(f"and {len(view.processes) - len(rows)} more", "", "", "", "", "")
    return table


def _urgency(process: ProcessView) -> tuple[int, int]:
    order = (ProcessState.FAILED, ProcessState.WAITING, ProcessState.STARTING)
    rank = order.index(process.state) if process.state in order else len(order)
    return (rank, 0 if process.name == LEAD else 1)


def _progress(view: RunView) -> RenderableType:
    line = Table.grid(padding=(0, 2, 0, 0))
    bar = ProgressBar(total=max(view.rounds, 1), completed=view.round, width=40)
    left = f"{_duration(view.remaining_s)} left" if view.remaining_s is not None and view.round < view.rounds else ""
    line.add_row(
        bar, f"round {view.round}/{view.rounds or '-'}", f"epoch {view.epoch:.1f}", _duration(view.seconds), left
    )
    return line


def _figures(view: RunView) -> RenderableType:
    grid = _grid()
    grid.add_row(
        "training", f"loss {_number(view.loss)}, accuracy {_percent(view.train_accuracy)}, "
        f"learning rate {_number(view.learning_rate)}"
    )  # fmt: skip
    at = f" (round {view.evaluated_round})" if view.clean_accuracy is not None else ""
    grid.add_row(
        view.evaluated_on,
        f"clean accuracy {_percent(view.clean_accuracy)}, robust accuracy {_percent(view.robust_accuracy)}{at}",
    )
    grid.add_row(
        "traffic", f"pushed {_bytes(view.pushed_bytes)} and pulled {_bytes(view.pulled_bytes)} per round and worker, "
        f"{_bytes(view.pushed_total_bytes)} and {_bytes(view.pulled_total_bytes)} in all"
    )  # fmt: skip
    grid.add_row(
        "time", f"attacking {view.attack_s:.1f} s, computing {view.compute_s:.1f} s, "
        f"communicating {view.communication_s:.1f} s"
    )  # fmt: skip
    return grid


def _grid() -> Table:
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(style=_LABEL)
    grid.add_column()
    return grid


def _against_float32(per_round: float, parameters: int) -> str:
    float32 = _FLOAT32_BYTES * parameters
    return f"{_bytes(per_round)} per round and worker; float32 takes {_bytes(float32)} ({float32 / per_round:.2f} x)"


def _percent(fraction: float | None) -> str:
    return "-" if fraction is None else f"{100 * fraction:.1f} %"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _bytes(count: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count:.0f} B"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _first_line(text: str) -> str:
    return text.partition("\n")[0]
