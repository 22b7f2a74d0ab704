"""The learning rate over the rounds: linear warm-up, then piecewise decay."""

from __future__ import annotations

from common.config import ScheduleSpec


class Schedule:
    """eta_t of equation (A4), a pure function of the round.

    Source: supplement 4.1: warm-up epoch k of 5 has (k / 5) eta_1, decay by 1/10 at fixed epochs. Deviation: here the
    warm-up rises every round, not every epoch.
    """

    def __init__(self, spec: ScheduleSpec, *, learning_rate: float, rounds: int) -> None:
        """
        Args:
            spec: fractions of all rounds; each is rounded to the nearest whole round.
            learning_rate: eta_1, the rate after warm-up and before the first decay.
            rounds: T, all rounds of the training.
        """
        self._learning_rate = learning_rate
        self._decay_factor = spec.decay_factor
        self.warmup_rounds = round(spec.warmup * rounds)
        self.decay_rounds = tuple(round(point * rounds) for point in spec.decay_at)

    def learning_rate(self, round_: int) -> float:
        """The rate of one round.

        Args:
            round_: completed rounds before this one, 0 to T - 1 (iteration t of Algorithm A1 is round t - 1).

        Returns:
            eta_1 * min(1, (round_ + 1) / W) * decay_factor^k, with W warm-up rounds and k decay points passed.
        """
        rate = self._learning_rate
        if round_ < self.warmup_rounds:
            rate *= (round_ + 1) / self.warmup_rounds
        for decay_round in self.decay_rounds:
            # multiplied one by one: exact in IEEE arithmetic, where pow may differ between C libraries
            if round_ >= decay_round:
                rate *= self._decay_factor
        return rate
