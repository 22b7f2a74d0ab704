"""Early stopping: which of the models that were judged on validation data is the best, and when to look no further."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from worker.evaluation import Evaluation


@dataclass(frozen=True, kw_only=True)
class Selection:
    """What is remembered of all evaluations so far; a function of what all workers know, so alike on all of them.

    Source: Rice et al. 2020, which the paper follows (section 6.1): of all models take the one with the highest robust
    accuracy on data that is neither trained on nor tested on. To end training with it is ours (`evaluation.patience`).

    Attributes:
        round: after how many rounds the best model was judged; None before the first evaluation.
        best: its evaluation.
        since: evaluations since, none of them better.
    """

    round: int | None = None
    best: Evaluation | None = None
    since: int = 0

    def after(self, round_: int, evaluation: Evaluation) -> Selection:
        """With one more model, judged after `round_` rounds; of equally good ones the first stays the best."""
        if self.best is None or evaluation.robust_accuracy > self.best.robust_accuracy:
            return Selection(round=round_, best=evaluation)
        return replace(self, since=self.since + 1)

    def is_over(self, patience: int | None) -> bool:
        """Whether `patience` evaluations in a row have brought nothing better; never if it is None."""
        return patience is not None and self.since >= patience

    def to_json(self) -> dict[str, int] | None:
        """For a checkpoint's description; None if nothing has been judged."""
        if self.best is None or self.round is None:
            return None
        counts = self.best
        return {
            "round": self.round,
            "samples": counts.samples,
            "clean_correct": counts.clean_correct,
            "robust_correct": counts.robust_correct,
            "since": self.since,
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any] | None) -> Selection:
        """The inverse of `to_json`.

        Raises:
            KeyError, TypeError, ValueError: it is something else.
        """
        if content is None:
            return cls()
        names = ("samples", "clean_correct", "robust_correct")
        best = Evaluation(**{name: int(content[name]) for name in names})
        return cls(round=int(content["round"]), best=best, since=int(content["since"]))


@dataclass(frozen=True, kw_only=True)
class Best:
    """The best model on validation data.

    Attributes:
        round: after how many rounds.
        validation: what it got right there.
        test: on the test data; None if its checkpoint is gone.
    """

    round: int
    validation: Evaluation
    test: Evaluation | None


@dataclass(frozen=True, kw_only=True)
class Conclusion:
    """The end of a training.

    Attributes:
        round: after how many rounds.
        test: of the last model.
        best: if there is validation data, and evaluations during training.
        validation: of the last model; then too, but for `split=own`, where no worker has all validation data.
    """

    round: int
    test: Evaluation
    best: Best | None
    validation: Evaluation | None = None
