"""The attack over the rounds: the ball grows during the warm-up."""

from __future__ import annotations

from common.config import AttackSpec


class Curriculum:
    """The attack of each round, a pure function of the round.

    Epsilon and the step size of round t are those of the job spec times min(1, (t + 1) / W), with W warm-up rounds, as
    the learning rate's warm-up has it. After the warm-up the attack is that of the job spec, to the bit.
    """

    def __init__(self, spec: AttackSpec, *, rounds: int) -> None:
        """`rounds`: T, all rounds of the training; `spec.warmup` of them, rounded, are W."""
        self._spec = spec
        self.warmup_rounds = round(spec.warmup * rounds)

    def attack(self, round_: int) -> AttackSpec:
        """The attack of one round, 0 to T - 1."""
        if round_ >= self.warmup_rounds:
            return self._spec
        factor = (round_ + 1) / self.warmup_rounds
        changes = {"epsilon": factor * self._spec.epsilon, "step_size": factor * self._spec.resolved_step_size}
        return self._spec.model_copy(update=changes)
