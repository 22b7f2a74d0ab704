"""The part of the job spec that is the inner maximization (A1) and the local cost (2) that it serves."""

from __future__ import annotations

from enum import StrEnum
from typing import Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from common.errors import refusal
from common.section import Number, Section


class AttackName(StrEnum):
    NONE = "none"
    FGSM = "fgsm"
    PGD = "pgd"


class AttackNorm(StrEnum):
    LINF = "linf"
    L2 = "l2"


class AttackLoss(StrEnum):
    CROSS_ENTROPY = "cross_entropy"
    KL = "kl"


class BatchNormMode(StrEnum):
    EVAL = "eval"
    TRAIN = "train"


class ObjectiveName(StrEnum):
    ADVERSARIAL = "adversarial"
    TRADES = "trades"


class AttackSpec(Section):
    """The inner maximization of equation (A1)."""

    name: AttackName = AttackName.PGD
    """Attack generator; `none` trains on clean images."""
    norm: AttackNorm = AttackNorm.LINF
    """Norm of the ball: `linf` ascends along the gradient's sign, `l2` along the gradient, normalized per sample."""
    loss: AttackLoss = AttackLoss.CROSS_ENTROPY
    """What is maximized: `cross_entropy` with the label, or `kl`, the divergence from the clean prediction (TRADES)."""
    epsilon: Number = Field(default=8 / 255, ge=0)
    """Radius of the ball, in pixel units [0, 1]; at most 1 with the norm `linf`."""
    steps: int = Field(default=10, ge=1, le=1000)
    """Attack steps of PGD; FGSM always takes one."""
    step_size: Number | None = Field(default=None, gt=0)
    """Step size in pixel units, in the ball's norm; where absent 2.5 epsilon / steps for PGD, 1.25 epsilon for FGSM,
    epsilon for replays."""
    random_start: bool = True
    """Start from a uniform draw in the ball instead of its centre; `kl` always starts beside the centre, as TRADES."""
    batch_norm: BatchNormMode | None = None
    """Batch-norm mode during the attack; where absent `eval` for PGD and `kl`, `train` for FGSM."""
    warmup: Number = Field(default=0.0, ge=0, lt=1)
    """Fraction of all rounds over which epsilon, and the step size with it, rises linearly from 0."""
    replays: int = Field(default=1, ge=1, le=100)
    """m of "free" training: each batch is trained on for m rounds in a row, each of which takes one FGSM step with the
    gradient of its own backward pass; with m above 1, FGSM only. An epoch has as many rounds as without replays."""

    @field_validator("epsilon")
    @classmethod
    def _pixels_end_at_1(cls, epsilon: float, info: ValidationInfo) -> float:
        if epsilon > 1 and info.data.get("norm") is AttackNorm.LINF:
            raise ValueError(refusal("at most 1, in pixel units (norm linf)", "epsilon", epsilon))
        return epsilon

    @model_validator(mode="after")
    def _replays_have_one_step(self) -> Self:
        if self.replays == 1:
            return self
        context = "the step of replays is that of training's own backward pass"
        for key, got, needed in (
            ("name", self.name, AttackName.FGSM),
            ("loss", self.loss, AttackLoss.CROSS_ENTROPY),
            ("batch_norm", self.batch_norm or BatchNormMode.TRAIN, BatchNormMode.TRAIN),
        ):
            if got is not needed:
                raise ValueError(refusal(f"{key}={needed} with replays={self.replays}", key, got.value, context))
        return self

    @property
    def resolved_step_size(self) -> float:
        """Step size in pixel units with the attack's default filled in."""
        if self.step_size is not None:
            return self.step_size
        if self.name is AttackName.FGSM:
            return 1.25 * self.epsilon if self.replays == 1 else self.epsilon
        return 2.5 * self.epsilon / self.steps

    @property
    def resolved_batch_norm(self) -> BatchNormMode:
        """Batch-norm mode with the attack's default filled in."""
        if self.batch_norm is not None:
            return self.batch_norm
        one_step = self.name is AttackName.FGSM and self.loss is AttackLoss.CROSS_ENTROPY
        return BatchNormMode.TRAIN if one_step else BatchNormMode.EVAL


class ObjectiveSpec(Section):
    """The local cost f_i of equation (2)."""

    name: ObjectiveName = ObjectiveName.ADVERSARIAL
    """`adversarial`: lambda times the clean loss plus the adversarial one; `trades`: the clean loss plus beta times the
    divergence of the perturbed prediction from the clean one (with `attack.loss=kl`, which maximizes it, TRADES)."""
    clean_weight: Number = Field(default=0.0, ge=0)
    """Adversarial: lambda of equation (2), weight of the loss on clean images; with `trades` that weight is 1."""
    beta: Number = Field(default=6.0, ge=0)
    """TRADES: weight of the divergence (1 / lambda in the paper of TRADES)."""


class SmoothingSpec(Section):
    """Training for randomized smoothing: Gaussian noise in pixel space, the same in the attack and in the update."""

    noise_std: Number = Field(default=0.0, ge=0)
    """sigma of the Gaussian noise, in pixel units; 0 trains without. TA and RA are of the network without noise."""
    samples: int = Field(default=1, ge=1, le=1000)
    """N: noisy copies of each sample; a worker's forward passes have N times its batch."""

    @model_validator(mode="after")
    def _copies_differ(self) -> Self:
        if self.samples > 1 and self.noise_std == 0:
            rule = f"noise_std above 0 with samples={self.samples}"
            raise ValueError(refusal(rule, "noise_std", self.noise_std, "without noise all copies are the same"))
        return self


class OverfittingSpec(Section):
    """Watches training with one attack step for catastrophic overfitting: robust to that step, and to nothing else."""

    check_every_epochs: int | None = Field(default=None, ge=0)
    """Attack the last training batches with PGD after so many epochs, 0 never; where absent 1 for FGSM, 0 for PGD."""
    steps: int = Field(default=10, ge=1, le=1000)
    """PGD steps of the check, each 2.5 epsilon / steps, in the training's ball."""
    least_ratio: Number = Field(default=0.5, ge=0, le=1)
    """Warn if the accuracy under PGD is below this fraction of that on the same images under the training's attack."""
    stop: bool = False
    """End the training, with its state saved, where it warns."""
