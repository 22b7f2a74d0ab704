"""The job spec's inner maximization: defaults that depend on other keys, and combinations that make no sense."""

from __future__ import annotations

import pytest

from common.config import AttackSpec, BatchNormMode, JobSpec
from common.errors import SpecError
from common.spec_sources import load_job_spec
from tests.test_config import FORM

FREE = ("attack.name=fgsm", "attack.replays=4")


def spec_of(*settings: str) -> JobSpec:
    return load_job_spec(settings=settings)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (
            ("attack.replays=4",),
            "expected name=fgsm with replays=4, got name=pgd (the step of replays is that of training's own backward "
            "pass) (attack, job spec)",
        ),
        ((*FREE, "attack.loss=kl"), "expected loss=cross_entropy with replays=4, got loss=kl (the step of"),
        ((*FREE, "attack.batch_norm=eval"), "expected batch_norm=train with replays=4, got batch_norm=eval (the step"),
        ((*FREE, "objective.name=trades"), "expected objective.name=adversarial with attack.replays=4, got objective"),
        ((*FREE, "smoothing.noise_std=0.1"), "expected smoothing.noise_std=0 with attack.replays=4, got smoothing."),
        (
            ("attack.name=none", "objective.name=trades"),
            "expected an attack (objective trades), got attack.name=none (",
        ),
        (
            ("attack.name=none", "overfitting.check_every_epochs=1"),
            "expected overfitting.check_every_epochs=0 without an attack to overfit to, got overfitting.",
        ),
        (("smoothing.samples=2",), "expected noise_std above 0 with samples=2, got noise_std=0.0 (without noise all"),
        (("attack.epsilon=1.5",), "expected at most 1, in pixel units (norm linf), got epsilon=1.5 (attack.epsilon, "),
        (
            ("evaluation.attack.epsilon=1.5",),
            "expected at most 1, in pixel units (norm linf), got evaluation.attack.epsilon=1.5 (",
        ),
    ],
)
def test_combinations_that_make_no_sense_are_refused(settings: tuple[str, ...], expected: str) -> None:
    with pytest.raises(SpecError) as caught:
        spec_of(*settings)
    assert str(caught.value).startswith(expected)
    assert FORM.fullmatch(str(caught.value))


def test_an_l2_ball_may_be_wider_than_a_pixel_also_in_the_evaluation() -> None:
    spec = spec_of("attack.norm=l2", "attack.epsilon=3", "evaluation.attack.epsilon=5")
    attack = spec.evaluation_attack
    assert (attack.norm, attack.epsilon, attack.step_size) == ("l2", 5.0, 0.625)
    assert spec_of("attack.norm=l2", "attack.epsilon=3").evaluation_attack.epsilon == 3


def test_step_sizes_and_batch_norm_modes_where_they_are_absent() -> None:
    def attack(**values: object) -> AttackSpec:
        return AttackSpec.model_validate({"epsilon": 0.2, **values})

    assert attack(name="pgd", norm="l2", steps=5).resolved_step_size == pytest.approx(0.1)
    assert attack(name="fgsm", norm="l2").resolved_step_size == 0.25
    assert attack(name="fgsm", replays=4).resolved_step_size == 0.2
    assert attack(name="fgsm", replays=4, step_size=0.1).resolved_step_size == 0.1
    assert attack(name="fgsm", loss="kl").resolved_batch_norm is BatchNormMode.EVAL
    assert attack(name="pgd", loss="kl", batch_norm="train").resolved_batch_norm is BatchNormMode.TRAIN


def test_training_is_checked_for_overfitting_every_epoch_where_the_attack_has_one_step() -> None:
    epochs = [
        spec_of("attack.name=fgsm").overfitting_check_epochs,
        spec_of("attack.name=fgsm", "overfitting.check_every_epochs=0").overfitting_check_epochs,
        spec_of("attack.name=pgd").overfitting_check_epochs,
        spec_of("attack.name=pgd", "overfitting.check_every_epochs=3").overfitting_check_epochs,
        spec_of("attack.name=none").overfitting_check_epochs,
    ]
    assert epochs == [1, 0, 0, 3, 0]
