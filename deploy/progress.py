"""What `datps train` shows, as a pure function of the events: `view = update(view, event)`.

Events are those of the daemons (see `common.events` and the daemons' modules) and the launcher's own: `started`
(process, role, pid), `ended` (process, exit_code, killed_by), `stopping` (text), `tick`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

from deploy.supervision import STOPPED, Role

LEAD = "worker-0"
"""Whose times are shown; losses and accuracies are the same on all workers."""


_SLOW_START_S = 3.0


class ProcessState(StrEnum):
    STARTING = "starting"
    LISTENING = "listening"
    JOINED = "joined"
    TRAINING = "training"
    WAITING = "waiting"
    DONE = "done"
    STOPPED = "stopped"
    FAILED = "failed"


@dataclass(frozen=True, kw_only=True)
class ProcessView:
    """One row of the table of processes."""

    name: str
    role: Role
    pid: int
    state: ProcessState = ProcessState.STARTING
    place: str = ""
    """A server's address, a worker's index and device."""
    note: str = ""
    """An error or refusal."""
    started_s: float = 0.0


@dataclass(frozen=True, kw_only=True)
class RunView:
    """All that is shown of one cluster."""

    title: str
    folder: str
    job: str = ""
    """What is trained and how, in a line."""
    now_s: float = 0.0
    processes: Mapping[str, ProcessView] = field(default_factory=dict)
    round: int = 0
    rounds: int = 0
    epoch: float = 0.0
    loss: float | None = None
    train_accuracy: float | None = None
    learning_rate: float | None = None
    clean_accuracy: float | None = None
    robust_accuracy: float | None = None
    evaluated_round: int = 0
    evaluated_on: str = "test"
    """`test` or `validation` data."""
    pushed_bytes: int = 0
    pulled_bytes: int = 0
    """In the last round, of one worker."""
    pushed_total_bytes: int = 0
    pulled_total_bytes: int = 0
    """Since the start of these processes, of all workers."""
    attack_s: float = 0.0
    compute_s: float = 0.0
    communication_s: float = 0.0
    """Of one worker, since the start of these processes."""
    seconds: float = 0.0
    seconds_per_round: float | None = None
    waiting_for: tuple[str, ...] = ()
    waited_s: float = 0.0
    message: str = ""
    parameters: int = 0
    checkpoint_round: int | None = None
    result: Mapping[str, Any] | None = None

    @property
    def slow_starters(self) -> tuple[str, ...]:
        """Processes that still start after a while, and are waited for."""
        starting = (p for p in self.processes.values() if p.state is ProcessState.STARTING)
        return tuple(p.name for p in starting if self.now_s - p.started_s >= _SLOW_START_S)

    @property
    def remaining_s(self) -> float | None:
        """Estimated from the rounds so far."""
        if self.seconds_per_round is None or not self.rounds:
            return None
        return self.seconds_per_round * (self.rounds - self.round)


def update(view: RunView, event: Mapping[str, Any]) -> RunView:
    """The view after an event; events that show nothing, or lack something, leave it as it was.

    What cannot be shown must not end a training.
    """
    handler = _HANDLERS.get(str(event.get("event")))
    try:
        return view if handler is None else handler(view, event)
    except (KeyError, TypeError, ValueError):
        return view


def _started(view: RunView, event: Mapping[str, Any]) -> RunView:
    role, started_s = Role(event["role"]), event["time"]
    process = ProcessView(name=event["process"], role=role, pid=event["pid"], started_s=started_s)
    return replace(view, processes={**view.processes, process.name: process})


def _tick(view: RunView, event: Mapping[str, Any]) -> RunView:
    return replace(view, now_s=event["time"])


def _listening(view: RunView, event: Mapping[str, Any]) -> RunView:
    return _with(view, event["process"], state=ProcessState.LISTENING, place=event["address"])


def _joined(view: RunView, event: Mapping[str, Any]) -> RunView:
    return _with(view, event["worker_id"], state=ProcessState.JOINED)


def _view_formed(view: RunView, _event: Mapping[str, Any]) -> RunView:
    for process in view.processes.values():
        if process.role is Role.SERVER:
            view = _with(view, process.name, state=ProcessState.TRAINING)
    return replace(view, waiting_for=())


def _admitted(view: RunView, event: Mapping[str, Any]) -> RunView:
    place = f"worker_index {event['worker_index']}, {event['device']}"
    view = _with(view, event["process"], state=ProcessState.TRAINING, place=place)
    return replace(view, rounds=event["rounds"], parameters=event["parameters"], waiting_for=())


def _round(view: RunView, event: Mapping[str, Any]) -> RunView:
    view = _with(view, event["process"], state=ProcessState.TRAINING)
    view = replace(
        view,
        pushed_total_bytes=view.pushed_total_bytes + event["pushed_bytes"],
        pulled_total_bytes=view.pulled_total_bytes + event["pulled_bytes"],
    )
    if event["round"] > view.round:
        names = ("round", "rounds", "epoch", "loss", "train_accuracy", "learning_rate", "pushed_bytes", "pulled_bytes")
        view = replace(view, waiting_for=(), **{name: event[name] for name in names})
    if event["process"] != LEAD:
        return view
    return replace(
        view,
        attack_s=view.attack_s + event["attack_s"],
        compute_s=view.compute_s + event["compute_s"],
        communication_s=view.communication_s + event["communication_s"],
        seconds=event["seconds"],
        seconds_per_round=event["seconds"] / event["round"],
    )


def _evaluation(view: RunView, event: Mapping[str, Any]) -> RunView:
    if event["round"] < view.evaluated_round:
        return view
    return replace(
        view,
        clean_accuracy=event["clean_accuracy"],
        robust_accuracy=event["robust_accuracy"],
        evaluated_round=event["round"],
        evaluated_on=event.get("data", "test"),
    )


def _waiting(view: RunView, event: Mapping[str, Any]) -> RunView:
    process = view.processes.get(event["process"])
    if process is not None and process.role is Role.WORKER and process.state is ProcessState.TRAINING:
        view = _with(view, process.name, state=ProcessState.WAITING)
    return replace(view, waiting_for=tuple(map(str, event["missing"])), waited_s=event["waited_s"])


def _checkpoint(view: RunView, event: Mapping[str, Any]) -> RunView:
    return replace(view, checkpoint_round=event["round"])


def _refused(view: RunView, event: Mapping[str, Any]) -> RunView:
    return replace(view, message=f"{event['process']} refused {event['worker_id'] or 'a stranger'}: {event['text']}")


def _stopping(view: RunView, event: Mapping[str, Any]) -> RunView:
    return replace(view, message=f"{event['process']}: {event['text']}")


def _error(view: RunView, event: Mapping[str, Any]) -> RunView:
    return _with(view, event["process"], note=event["text"])


def _ended(view: RunView, event: Mapping[str, Any]) -> RunView:
    code = event["exit_code"]
    state = ProcessState.DONE if code == 0 else ProcessState.STOPPED if code in STOPPED else ProcessState.FAILED
    process = view.processes.get(event["process"])
    said = process.note if process else ""
    note = said or ("" if state is not ProcessState.FAILED else event["killed_by"] or f"exit code {code}")
    view = _with(view, event["process"], state=state, note=note)
    running = (p for p in view.processes.values() if p.role is Role.WORKER)
    ended = (ProcessState.DONE, ProcessState.STOPPED, ProcessState.FAILED)
    return replace(view, waiting_for=()) if all(p.state in ended for p in running) else view


def _result(view: RunView, event: Mapping[str, Any]) -> RunView:
    return replace(
        view,
        result=event,
        clean_accuracy=event["clean_accuracy"],
        robust_accuracy=event["robust_accuracy"],
        evaluated_round=event["rounds"],
        evaluated_on="test",
    )


_HANDLERS: dict[str, Callable[[RunView, Mapping[str, Any]], RunView]] = {
    "tick": _tick,
    "started": _started,
    "listening": _listening,
    "joined": _joined,
    "view": _view_formed,
    "admitted": _admitted,
    "round": _round,
    "evaluation": _evaluation,
    "waiting": _waiting,
    "checkpoint": _checkpoint,
    "refused": _refused,
    "stopping": _stopping,
    "early_stop": _stopping,
    "error": _error,
    "ended": _ended,
    "result": _result,
}


def _with(view: RunView, name: str, **changes: Any) -> RunView:
    """The view with one process changed; an unknown process changes nothing."""
    process = view.processes.get(name)
    if process is None:
        return view
    return replace(view, processes={**view.processes, name: replace(process, **changes)})
