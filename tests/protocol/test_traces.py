"""Golden traces: `traces/*.txt` tell what the state machines do; a person can read them, and they must stay true."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.protocol.trace import replay

TRACES = sorted((Path(__file__).parent / "traces").glob("*.txt"))


@pytest.mark.parametrize("path", TRACES, ids=lambda path: path.stem)
def test_machine_does_what_the_trace_says(path: Path) -> None:
    expected = path.read_text()
    assert replay(expected) == expected


def test_there_are_traces_of_all_three_machines() -> None:
    assert {path.stem.split("_")[0] for path in TRACES} == {"rounds", "membership", "session"}


def test_replay_corrects_a_trace_that_is_wrong() -> None:
    path = TRACES[0]
    wrong = "\n".join(line for line in path.read_text().splitlines() if not line.startswith("  ")) + "\n"
    assert wrong != path.read_text() == replay(wrong)
