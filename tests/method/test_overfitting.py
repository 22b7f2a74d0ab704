"""The check for catastrophic overfitting: what it counts, what it finds, and that it leaves no trace."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from common.config import AttackName, AttackSpec, BatchNormMode
from tests.method.support import batch, batch_norm_model, fgsm, generator, state_of
from tests.support import job
from worker.attacks import make_attack
from worker.data import Dataset
from worker.overfitting import OverfittingCheck, check_attack, check_overfitting


class Overfitted(nn.Module):
    """Right at the centre of the ball of radius 0.2 and on its surface, where one step ends; wrong in between."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(1)

    def forward(self, images: Tensor) -> Tensor:
        margin = torch.cos((images - 0.5) * torch.pi / 0.1).flatten(1).mean(1) - 0.3
        return torch.stack([margin, -margin], dim=1)


def check_of(model: nn.Module, images: Tensor, labels: Tensor, spec: AttackSpec) -> OverfittingCheck:
    perturbed = make_attack(spec)(model, images, labels, generator(1))
    pgd = make_attack(check_attack(job("attack.name=fgsm"), spec))
    return check_overfitting(model, images, perturbed, labels, pgd, pgd.start(images, generator(2)))


def test_a_model_that_is_right_only_where_one_step_ends_is_found_out() -> None:
    images, labels = torch.full((64, 1, 1, 1), 0.51), torch.zeros(64, dtype=torch.int64)
    one_step = fgsm(0.2).model_copy(update={"random_start": False})
    check = check_of(Overfitted().eval(), images, labels, one_step)
    assert check.attacked_accuracy == 1
    assert check.pgd_accuracy < 0.1
    assert check.overfits(0.5)


def test_a_model_trained_with_random_starts_on_digits_is_not(trained_model: nn.Module, digits: Dataset) -> None:
    indices = torch.arange(256)
    check = check_of(trained_model, digits.train.images(indices), digits.train.labels[indices], fgsm(0.15))
    assert check.samples == 256
    assert 0.6 * check.attacked_accuracy < check.pgd_accuracy < check.attacked_accuracy
    assert not check.overfits(0.5)


@pytest.mark.parametrize(
    ("trained", "pgd", "ratio", "expected"),
    [(80, 40, 0.5, False), (80, 39, 0.5, True), (0, 0, 0.5, False), (80, 79, 1.0, True), (80, 0, 0.0, False)],
)
def test_it_overfits_where_the_accuracy_under_pgd_is_below_the_ratio(
    trained: int, pgd: int, ratio: float, expected: bool
) -> None:
    assert OverfittingCheck(samples=100, attacked_correct=trained, pgd_correct=pgd).overfits(ratio) is expected


def test_the_check_attacks_in_the_ball_that_the_round_trains_in() -> None:
    spec = job("attack.name=fgsm", "attack.norm=l2", "attack.epsilon=2", "overfitting.steps=20")
    attack = check_attack(spec, spec.attack.model_copy(update={"epsilon": 0.5}))
    assert (attack.name, attack.norm, attack.epsilon, attack.steps) == (AttackName.PGD, "l2", 0.5, 20)
    assert attack.resolved_step_size == 2.5 * 0.5 / 20
    assert attack.resolved_batch_norm is BatchNormMode.EVAL


def test_counts_are_those_of_eval_mode_and_the_model_is_left_as_it_was() -> None:
    model = batch_norm_model()
    images, labels = batch()
    perturbed = (images + 0.05).clamp(0, 1).requires_grad_()
    pgd = make_attack(check_attack(job(), AttackSpec(epsilon=0.1)))
    start = pgd.start(images, generator(2))
    before = dict(state_of(model))
    check = check_overfitting(model, images, perturbed, labels, pgd, start)
    assert dict(state_of(model)) == before
    assert perturbed.grad is None
    model.eval()
    expected = [
        int((model(x).argmax(1) == labels).sum()) for x in (perturbed, pgd.perturb(model, images, labels, start))
    ]
    assert [check.attacked_correct, check.pgd_correct] == expected
    assert check.in_words(10).startswith("accuracy on 16 training images 0.")
