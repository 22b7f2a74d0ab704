"""What the workers tell each other each round, averaged with the buffers: a few float32 numbers.

Sums over the workers come back from averages: the average times M. Counts below 2^24 survive that exactly once rounded.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

from common.codecs import Float32
from worker.evaluation import Evaluation
from worker.overfitting import OverfittingCheck


@dataclass(frozen=True, kw_only=True)
class RoundMetrics:
    """One worker's numbers of one round, or the sums of all workers'."""

    loss: float = 0.0
    """Mean loss of the batch; as a sum, M times the mean over the workers."""
    train_samples: float = 0.0
    train_correct: float = 0.0
    """Training samples of the round, and how many were right under the attack."""
    evaluation_samples: float = 0.0
    clean_correct: float = 0.0
    robust_correct: float = 0.0
    """Test samples of this round's evaluation, if there was one, and how many were right without and under attack."""
    stop: float = 0.0
    """1 if this worker has been asked to stop: all workers see it in the same round, and stop after it."""
    checked_samples: float = 0.0
    attacked_correct: float = 0.0
    pgd_correct: float = 0.0
    """Training samples of this round's check for overfitting, if there was one, and how many were right under
    the training's attack, and under PGD."""

    @property
    def evaluation(self) -> Evaluation | None:
        """The evaluation that these numbers hold, if any."""
        if not self.evaluation_samples:
            return None
        return Evaluation(
            samples=round(self.evaluation_samples),
            clean_correct=round(self.clean_correct),
            robust_correct=round(self.robust_correct),
        )

    @property
    def check(self) -> OverfittingCheck | None:
        """The check for overfitting that these numbers hold, if any."""
        if not self.checked_samples:
            return None
        return OverfittingCheck(
            samples=round(self.checked_samples),
            attacked_correct=round(self.attacked_correct),
            pgd_correct=round(self.pgd_correct),
        )

    def to_vector(self) -> Float32:
        """float32 of shape (METRICS,)."""
        return np.array([getattr(self, field.name) for field in fields(self)], np.float32)

    @classmethod
    def from_average(cls, average: Float32, workers: int) -> RoundMetrics:
        """The sums over M workers whose average is given."""
        names = [field.name for field in fields(cls)]
        return cls(**dict(zip(names, (average.astype(np.float64) * workers).tolist(), strict=True)))


METRICS = len(fields(RoundMetrics))
COUNTS = METRICS - 1
"""All but the first, the loss, which is a mean."""
