"""Traces: what happened to a state machine and what it did, one event or effect per line, for people to read.

    # a comment                                       kept
    rounds view=1 worker_ids=ann,bob ...              which machine, and what it is told at its start
    at 5 s                                            the time from here on
    HelloReceived worker_index=0 view=1 round=0       an event
      Welcome worker_index=0 round=0 missing=4,5      an effect of it

`replay` runs the events and writes the effects anew; a trace that is right stays as it is. To see what a trace would
be now: `python -m tests.protocol.trace tests/protocol/traces/NAME.txt`.
"""

from __future__ import annotations

import shlex
import sys
import typing
from collections.abc import Callable
from dataclasses import fields
from enum import Enum
from pathlib import Path
from types import ModuleType
from typing import Any

from ps import membership, rounds
from worker import session

MACHINES: dict[str, ModuleType] = {"rounds": rounds, "membership": membership, "session": session}


def replay(text: str) -> str:
    """The same trace with the effects that its events have now."""
    lines: list[str] = []
    handle: Callable[[Any, float], list[Any]] | None = None
    module, now_s = rounds, 0.0
    for line in text.splitlines():
        if line.startswith("  "):
            continue  # an effect of last time
        lines.append(line)
        word, *assignments = shlex.split(line, comments=True) or [""]
        if not word:
            continue
        if word == "at":
            now_s = float(assignments[0])
        elif handle is None:
            module = MACHINES[word]
            handle = start(word, assignments, now_s)
        else:
            effects = handle(read(getattr(module, word), assignments), now_s)
            lines += [f"  {write(effect)}" for effect in effects] or ["  nothing"]
    return "\n".join(lines) + "\n"


def start(name: str, assignments: list[str], now_s: float) -> Callable[[Any, float], list[Any]]:
    """A new machine's `handle(event, now_s)`."""
    if name == "rounds":
        return rounds.Rounds(read(rounds.RoundsConfig, assignments), now_s).handle
    if name == "membership":
        return membership.Membership(read(membership.MembershipConfig, assignments)).handle
    values = dict(assignment.split("=", 1) for assignment in assignments)
    machine = session.Session(
        parse(values["shard_of"], tuple[int, ...]),
        first_round=int(values["first_round"]),
        reconnects=parse(values.get("reconnects", "false"), bool),
    )
    return lambda event, _: machine.handle(event)


def read(kind: type[Any], assignments: list[str]) -> Any:
    """An event or configuration from `name=value` words."""
    hints = typing.get_type_hints(kind)
    values = dict(assignment.split("=", 1) for assignment in assignments)
    return kind(**{name: parse(value, hints[name]) for name, value in values.items()})


def write(effect: object) -> str:
    """The line of an effect; what has its default is left out."""
    shown = [(column, getattr(effect, column.name)) for column in fields(effect)]  # type: ignore[arg-type]
    words = [f"{column.name}={show(value)}" for column, value in shown if value != column.default]
    return " ".join([type(effect).__name__, *words])


def parse(text: str, hint: Any) -> Any:
    """A value of a field's type; `-` is an empty tuple or set."""
    if typing.get_origin(hint) in (tuple, frozenset):
        item = typing.get_args(hint)[0]
        return typing.get_origin(hint)(parse(part, item) for part in text.split(",") if text != "-")
    if issubclass(hint, Enum):
        return hint[text.upper()]
    if hint is bool:
        return {"true": True, "false": False}[text]
    if hint is bytes:
        return bytes.fromhex(text)
    return hint(text)


def show(value: object) -> str:
    """The inverse of `parse`."""
    match value:
        case tuple() | frozenset():
            return ",".join(map(show, value)) or "-"
        case Enum():
            return value.name.lower()
        case bool():
            return str(value).lower()
        case bytes():
            return value.hex()
        case float():
            return f"{value:g}"
        case str():
            return shlex.quote(value)
    return str(value).lower()


if __name__ == "__main__":
    for path in sys.argv[1:]:
        print(replay(Path(path).read_text()), end="")
