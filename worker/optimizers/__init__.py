"""Outer minimization oracles (A4): they update a flat parameter vector with the average gradient."""

from __future__ import annotations

from common.config import OptimizerName, OptimizerSpec
from worker.optimizers.adamw import AdamW
from worker.optimizers.base import LayerRule, Optimizer, layer_rules
from worker.optimizers.flat import FlatParameters, Layer
from worker.optimizers.lamb import Lamb
from worker.optimizers.lars import Lars
from worker.optimizers.moving_average import Averages, MovingAverage
from worker.optimizers.sgd import Sgd
from worker.optimizers.shares import Shares

__all__ = [
    "AdamW",
    "Averages",
    "FlatParameters",
    "Lamb",
    "Lars",
    "Layer",
    "LayerRule",
    "MovingAverage",
    "Optimizer",
    "Sgd",
    "Shares",
    "layer_rules",
    "make_optimizer",
]

_OPTIMIZERS: dict[OptimizerName, type[Optimizer]] = {
    OptimizerName.LAMB: Lamb,
    OptimizerName.LARS: Lars,
    OptimizerName.SGD: Sgd,
    OptimizerName.ADAMW: AdamW,
}


def make_optimizer(spec: OptimizerSpec, parameters: FlatParameters, shares: Shares | None = None) -> Optimizer:
    """The optimizer that `spec` describes, with a fresh state beside `parameters`, for all of them or one slice."""
    return _OPTIMIZERS[spec.name](spec, parameters.layers, parameters.theta.device, shares)
