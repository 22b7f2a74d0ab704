"""The learning rate over the rounds: linear warm-up, then piecewise decay or a cosine; or a triangle."""

from __future__ import annotations

import math
from typing import Self

from common.config import JobSpec, ScheduleName, ScheduleSpec


class Schedule:
    """eta_t of equation (A4), a pure function of the round; the same bits on every machine.

    Sources:
    - piecewise: supplement 4.1: warm-up epoch k of 5 has (k / 5) eta_1, decay by 1/10 at fixed epochs. Deviation: here
      the warm-up rises every round, not every epoch;
    - cosine: Loshchilov and Hutter 2017 (SGDR), without restarts, down to 0;
    - cyclic: the triangle of Fast AT (Wong et al. 2020), whose peak is in the middle: `peak_at=0.5`;
    - warm-up from another rate than 0, and the linear scaling rule (`JobSpec.peak_learning_rate`): Goyal et al. 2017.
    """

    def __init__(self, spec: ScheduleSpec, *, learning_rate: float, rounds: int, warmup_from: float = 0.0) -> None:
        """
        Args:
            spec: fractions of all rounds; each is rounded to the nearest whole round.
            learning_rate: eta_1, the rate after warm-up and before the first decay; cyclic: at the peak.
            rounds: T, all rounds of the training.
            warmup_from: the rate that warm-up starts from, before its first round.
        """
        self._name = spec.name
        self._learning_rate = learning_rate
        self._rounds = rounds
        self._warmup_from = warmup_from
        self._decay_factor = spec.decay_factor
        self.warmup_rounds = round(spec.warmup * rounds)
        self.decay_rounds = tuple(round(point * rounds) for point in spec.decay_at)
        self.peak_round = min(round(spec.peak_at * rounds), rounds - 1)

    @classmethod
    def of_job(cls, spec: JobSpec, rounds: int) -> Self:
        """The schedule of a job; with the linear scaling rule, warm-up starts from the rate that is not scaled."""
        peak, optimizer = spec.peak_learning_rate, spec.optimizer
        start = 0.0 if optimizer.base_batch is None else min(optimizer.learning_rate, peak)
        return cls(spec.schedule, learning_rate=peak, rounds=rounds, warmup_from=start)

    def learning_rate(self, round_: int) -> float:
        """The rate of one round.

        Args:
            round_: completed rounds before this one, 0 to T - 1 (iteration t of Algorithm A1 is round t - 1).

        Returns:
            With W warm-up rounds, x = (round_ + 1) / W in them: (1 - x) * warmup_from + x * eta_1. Afterwards:
            - piecewise: eta_1 * decay_factor^k, with k decay points passed (also where they lie in the warm-up);
            - cosine: eta_1 * (1 + cos(pi * (round_ - W) / (T - W))) / 2;
            - cyclic: eta_1 * round_ / P up to the peak's round P, then eta_1 * (T - round_) / (T - P).
            Cosine and cyclic would be 0 in round T, the one after the last; cyclic is 0 in round 0.
        """
        rate = self._learning_rate
        if round_ < self.warmup_rounds:
            x = (round_ + 1) / self.warmup_rounds
            rate = (1 - x) * self._warmup_from + x * rate
        match self._name:
            case ScheduleName.PIECEWISE:
                return self._decayed(rate, round_)
            case ScheduleName.COSINE:
                passed, wave = round_ - self.warmup_rounds, self._rounds - self.warmup_rounds
                return rate if passed < 0 else rate * (1 + cosine_of_half_turns(passed, wave)) / 2
            case ScheduleName.CYCLIC:
                rises = round_ < self.peak_round
                return rate * (
                    round_ / self.peak_round if rises else (self._rounds - round_) / (self._rounds - self.peak_round)
                )

    def _decayed(self, rate: float, round_: int) -> float:
        for decay_round in self.decay_rounds:
            # multiplied one by one: exact in IEEE arithmetic, where pow may differ between C libraries
            if round_ >= decay_round:
                rate *= self._decay_factor
        return rate


def cosine_of_half_turns(numerator: int, denominator: int) -> float:
    """cos(pi * numerator / denominator) for 0 <= numerator <= denominator, the same bits on every machine.

    C libraries differ in the last bit of a cosine, and replicas must not. This is 12 terms of the Taylor series in the
    first quadrant, by Horner's rule; exact at 0, a half and 1.
    """
    if 2 * numerator == denominator:
        return 0.0
    if 2 * numerator > denominator:
        return -cosine_of_half_turns(denominator - numerator, denominator)
    square = (math.pi * numerator / denominator) ** 2
    total = 0.0
    for k in range(12, 0, -1):  # 1 - x^2 / (1 * 2) * (1 - x^2 / (3 * 4) * (1 - ...)); the 12th term is below 2^-53
        total = square / ((2 * k - 1) * (2 * k)) * (1 - total)
    return 1 - total
