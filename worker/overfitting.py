"""Catastrophic overfitting: training with one attack step that becomes robust to that step only."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from common.config import AttackName, AttackSpec, BatchNormMode, JobSpec
from worker.attacks import Attack
from worker.evaluation import eval_mode
from worker.objectives import correct


@dataclass(frozen=True, kw_only=True)
class OverfittingCheck:
    """Counts over training images, of one worker or the sums of all: they are from the same round and parameters."""

    samples: int
    attacked_correct: int
    """Correct under the training's own attack."""
    pgd_correct: int
    """Correct after PGD on the same images."""

    @property
    def attacked_accuracy(self) -> float:
        """A fraction; 0 without samples."""
        return self.attacked_correct / self.samples if self.samples else 0.0

    @property
    def pgd_accuracy(self) -> float:
        """A fraction; 0 without samples."""
        return self.pgd_correct / self.samples if self.samples else 0.0

    def in_words(self, pgd_steps: int) -> str:
        """Both accuracies in a line."""
        pgd = f"{self.pgd_accuracy:.3f} under PGD-{pgd_steps}"
        return f"accuracy on {self.samples} training images {pgd}, {self.attacked_accuracy:.3f} under training's attack"

    def overfits(self, least_ratio: float) -> bool:
        """Whether the accuracy under PGD is below `least_ratio` times that under the training's attack.

        Source: Wong et al. 2020: with one attack step, within an epoch the accuracy under PGD on training images falls
        to about 0 while that under the step itself rises. Deviation: their code compares with the epoch before (a fall
        by 0.2); a ratio of the same round needs no memory, so that a resumed run decides alike.
        """
        return self.pgd_correct < least_ratio * self.attacked_correct


def check_attack(job: JobSpec, attack: AttackSpec) -> AttackSpec:
    """The PGD of the check, in the ball that the round trains in: `attack` is that of the round."""
    return AttackSpec(
        name=AttackName.PGD,
        norm=attack.norm,
        epsilon=attack.epsilon,
        steps=job.overfitting.steps,
        batch_norm=BatchNormMode.EVAL,
    )


def check_overfitting(
    model: nn.Module, images_NCHW: Tensor, perturbed_NCHW: Tensor, labels_N: Tensor, attack: Attack, start_NCHW: Tensor
) -> OverfittingCheck:
    """Judges the model, in eval mode, on a training batch; leaves it as it was.

    Args:
        model: logits [N, K] of images.
        images_NCHW: clean images of the batch.
        perturbed_NCHW: what the training's attack makes of them.
        labels_N: int64 class numbers.
        attack: of `check_attack`.
        start_NCHW: where it starts.
    """
    with eval_mode(model), torch.no_grad():
        trained = correct(model(perturbed_NCHW), labels_N)
        found = correct(model(attack.perturb(model, images_NCHW, labels_N, start_NCHW)), labels_N)
    return OverfittingCheck(samples=len(labels_N), attacked_correct=int(trained), pgd_correct=int(found))
