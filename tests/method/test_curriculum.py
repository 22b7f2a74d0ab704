"""The warm-up of epsilon, a pure function of the round."""

from __future__ import annotations

import pytest

from common.config import AttackSpec
from worker.attacks import GradientAttack, make_attack
from worker.curriculum import Curriculum


def test_epsilon_and_step_size_rise_linearly_and_stay() -> None:
    spec = AttackSpec(epsilon=0.2, steps=10, warmup=0.25)
    attacks = [Curriculum(spec, rounds=16).attack(round_) for round_ in range(16)]
    factors = [0.25, 0.5, 0.75] + [1.0] * 13
    assert [attack.epsilon for attack in attacks] == pytest.approx([0.2 * factor for factor in factors])
    assert [attack.resolved_step_size for attack in attacks] == pytest.approx([0.05 * factor for factor in factors])
    assert all(attack is spec for attack in attacks[4:])


def test_a_given_step_size_grows_too_and_nothing_else_changes() -> None:
    spec = AttackSpec(epsilon=0.2, steps=3, step_size=0.1, warmup=0.5, random_start=False)
    half = Curriculum(spec, rounds=8).attack(1)
    assert half == spec.model_copy(update={"epsilon": 0.1, "step_size": 0.05})
    attack = make_attack(half)
    assert isinstance(attack, GradientAttack)
    assert (attack.epsilon, attack.step_size) == (0.1, 0.05)


@pytest.mark.parametrize(("warmup", "rounds", "expected"), [(0.0, 100, 0), (0.1, 100, 10), (0.1, 4, 0), (0.5, 7, 4)])
def test_the_fraction_is_rounded_to_whole_rounds(warmup: float, rounds: int, expected: int) -> None:
    curriculum = Curriculum(AttackSpec(warmup=warmup), rounds=rounds)
    assert curriculum.warmup_rounds == expected
    assert curriculum.attack(expected) == AttackSpec(warmup=warmup)
