"""The part of the job spec that is the outer minimization (A4): the optimizer and its learning rate."""

from __future__ import annotations

from enum import StrEnum
from typing import Self

from pydantic import Field, model_validator

from common.errors import refusal
from common.section import Number, Section


class OptimizerName(StrEnum):
    LAMB = "lamb"
    LARS = "lars"
    SGD = "sgd"
    ADAMW = "adamw"


class ScheduleName(StrEnum):
    PIECEWISE = "piecewise"
    COSINE = "cosine"
    CYCLIC = "cyclic"


class OptimizerSpec(Section):
    """The outer minimization of equation (A4)."""

    name: OptimizerName = OptimizerName.LAMB
    """`lamb` is Algorithm A2; `sgd` with momentum is the paper's "w/o LALR", with `base_batch` its DAT-LSGD; `lars` is
    momentum SGD with layerwise adaptive rates; `adamw` has no such rates."""
    learning_rate: Number = Field(default=0.01, gt=0)
    """eta_1, before warm-up and decay."""
    base_batch: int | None = Field(default=None, ge=1)
    """Linear scaling rule: `learning_rate` is meant for so many samples a round, and used times M B / base_batch."""
    beta1: Number = Field(default=0.9, ge=0, lt=1)
    """LAMB, AdamW: decay of the first moment."""
    beta2: Number = Field(default=0.999, ge=0, lt=1)
    """LAMB, AdamW: decay of the second moment."""
    stability_eps: Number = Field(default=1e-12, gt=0)
    """LAMB: zeta of Algorithm A2, added to the second moment under the square root; AdamW: added to the root."""
    bias_correction: bool = True
    """LAMB, AdamW: divide the moments by 1 - beta^t, as Algorithm A2 does."""
    trust_low: Number = Field(default=0.0, ge=0)
    """LAMB, LARS: c_l of equation (3), lower bound of tau."""
    trust_high: Number = Field(default=10.0, gt=0)
    """LAMB, LARS: c_u of equation (3), upper bound of tau."""
    trust_coefficient: Number = Field(default=1e-3, gt=0)
    """LARS: by which fraction of its weights' norm a layer moves where the learning rate is 1."""
    momentum: Number = Field(default=0.9, ge=0, lt=1)
    """SGD, LARS: momentum."""
    nesterov: bool = False
    """SGD: Nesterov's momentum."""
    weight_decay: Number = Field(default=1e-4, ge=0)
    """Decay of the weights: inside LAMB's update, added to the gradient by SGD and LARS, apart from it by AdamW."""
    decay_one_dimensional: bool = True
    """Decay biases and normalization parameters too, as the paper's code does."""
    adapt_one_dimensional: bool = True
    """LAMB, LARS: adapt the learning rate of biases and normalization parameters too, as the paper's code does."""
    clip_norm: Number | None = Field(default=None, gt=0)
    """Upper bound of the l2 norm of the average gradient (A3); a longer one is shortened to it before the update."""
    ema_decay: Number | None = Field(default=None, gt=0, lt=1)
    """Keep an exponential moving average of weights and batch-norm statistics with this decay, and judge it."""

    @model_validator(mode="after")
    def _trust_bounds_are_ordered(self) -> Self:
        if self.trust_low > self.trust_high:
            raise ValueError(refusal(f"trust_low <= trust_high={self.trust_high}", "trust_low", self.trust_low))
        return self

    @model_validator(mode="after")
    def _nesterov_needs_momentum(self) -> Self:
        if self.name is OptimizerName.SGD and self.nesterov and self.momentum == 0:
            raise ValueError(refusal("momentum > 0 (nesterov)", "momentum", self.momentum))
        return self


class ScheduleSpec(Section):
    """Length of the training and the learning rate over it."""

    name: ScheduleName = ScheduleName.PIECEWISE
    """`piecewise` decay; `cosine`: down to 0 along half a wave; `cyclic`: from 0 up to the full rate and down to 0."""
    epochs: int = Field(default=30, ge=1)
    """Passes over the training data."""
    warmup: Number = Field(default=0.0, ge=0, lt=1)
    """Fraction of all rounds over which the learning rate rises linearly: from 0, or with `optimizer.base_batch` from
    the unscaled one. Not with `cyclic`, which rises by itself."""
    decay_at: tuple[Number, ...] = (2 / 3, 9 / 10)
    """Piecewise: fractions of all rounds after which the rate is multiplied by `decay_factor`, in rising order."""
    decay_factor: Number = Field(default=0.1, gt=0, le=1)
    """Piecewise: factor of each decay."""
    peak_at: Number = Field(default=0.5, gt=0, lt=1)
    """Cyclic: fraction of all rounds at which the learning rate is full."""

    @model_validator(mode="after")
    def _decay_points_rise(self) -> Self:
        points = self.decay_at
        if list(points) != sorted(set(points)) or any(not 0 < point < 1 for point in points):
            raise ValueError(refusal("rising fractions between 0 and 1", "decay_at", list(points)))
        return self

    @model_validator(mode="after")
    def _cyclic_rises_by_itself(self) -> Self:
        if self.name is ScheduleName.CYCLIC and self.warmup:
            raise ValueError(refusal("warmup=0 (schedule cyclic)", "warmup", self.warmup))
        return self
