"""`datps train --tensorboard`: what is written is read back with TensorBoard's own reader."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from deploy.progress import LEAD, RunView
from deploy.tensorboard import TensorBoardDisplay

tensorboard = pytest.importorskip("tensorboard", reason="the package tensorboard is not installed")


class Recording:
    """A display that keeps the events it is shown."""

    def __init__(self) -> None:
        self.observed: list[dict[str, Any]] = []

    def __enter__(self) -> Recording:
        return self

    def __exit__(self, *_: object) -> None: ...

    def open(self, view: RunView) -> None: ...

    def observe(self, event: dict[str, Any]) -> None:
        self.observed.append(event)

    def say(self, event: str, text: str, **fields: Any) -> None: ...

    def result(self, *_: Any) -> None: ...


def test_rounds_and_evaluations_of_the_leading_worker_are_written_and_everything_is_handed_on(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    inner = Recording()
    with TensorBoardDisplay(inner) as display:
        display.open(RunView(title="t", job="j", folder=str(tmp_path)))
        for round_, loss in ((1, 2.5), (2, 1.25)):
            display.observe({"event": "round", "process": LEAD, "time": 0.0, "round": round_, "loss": loss})
            display.observe({"event": "round", "process": "worker-1", "time": 0.0, "round": round_, "loss": 9.0})
        judged = {"clean_accuracy": 0.5, "robust_accuracy": 0.25, "round": 2}
        display.observe({"event": "evaluation", "process": LEAD, "time": 0.0, **judged})

    read = EventAccumulator(str(tmp_path / "tensorboard"))
    read.Reload()
    assert [(each.step, each.value) for each in read.Scalars("loss")] == [(1, 2.5), (2, 1.25)]
    assert [(each.step, each.value) for each in read.Scalars("robust_accuracy")] == [(2, 0.25)]
    assert [event["event"] for event in inner.observed] == ["round"] * 4 + ["evaluation"]
