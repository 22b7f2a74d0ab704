"""A training's figures as TensorBoard events, beside whatever else shows it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from common.errors import SpecError, refusal
from deploy.display import Display
from deploy.progress import LEAD, RunView

OF_ROUNDS = (
    *("loss", "train_accuracy", "learning_rate", "attack_s", "compute_s", "communication_s", "exchange_s", "round_s"),
    *("pushed_bytes", "pulled_bytes"),
)
OF_EVALUATIONS = ("clean_accuracy", "robust_accuracy")


class TensorBoardDisplay:
    """Hands everything on to another display, and writes the leading worker's rounds and evaluations.

    The events of the cluster in run folder F are in F/tensorboard; a resumed run adds a file to those that are there.
    """

    def __init__(self, display: Display) -> None:
        """
        Raises:
            SpecError: the package tensorboard is not installed.
        """
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            rule = "the package tensorboard (pip install 'datps[report]')"
            raise SpecError(refusal(rule, "--tensorboard", "true", str(error))) from None
        self._display = display
        self._make_writer = SummaryWriter
        self._writer: Any = None

    def __enter__(self) -> Self:
        self._display.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()
        self._display.__exit__(kind, error, trace)

    def open(self, view: RunView) -> None:
        """See `Display`."""
        self._close()
        self._writer = self._make_writer(str(Path(view.folder) / "tensorboard"))
        self._display.open(view)

    def observe(self, event: dict[str, Any]) -> None:
        """See `Display`."""
        if self._writer is not None and event.get("process") == LEAD:
            for name in {"round": OF_ROUNDS, "evaluation": OF_EVALUATIONS}.get(event["event"], ()):
                if name in event:
                    self._writer.add_scalar(name, event[name], event["round"])
        self._display.observe(event)

    def say(self, event: str, text: str, **fields: Any) -> None:
        """See `Display`."""
        self._display.say(event, text, **fields)

    def result(self, title: str, folder: str, result: Mapping[str, Any], robust_name: str) -> None:
        """See `Display`."""
        self._display.result(title, folder, result, robust_name)

    def _close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None
