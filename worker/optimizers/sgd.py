"""SGD with momentum: the paper's baseline "w/o LALR"."""

from __future__ import annotations

import torch
from torch import Tensor

from common.config import OptimizerSpec
from worker.optimizers.base import Optimizer


class Sgd(Optimizer):
    """b <- momentum * b + (g + weight_decay * theta); theta <- theta - eta_t * b.

    Operation for operation what `torch.optim.SGD` does (no dampening, no Nesterov), and so bitwise equal to it.
    """

    @staticmethod
    def moment_names(spec: OptimizerSpec) -> tuple[str, ...]:
        return ("b",) if spec.momentum else ()

    @torch.no_grad()
    def update(self, theta: Tensor, gradient: Tensor, learning_rate: float) -> None:
        own = self._shares.own(theta)
        self._scratch.copy_(self._shares.own(gradient))
        self._add_decay(own)
        direction = self._scratch
        if self.spec.momentum:
            direction = self._moments["b"]
            if self.t == 0:
                direction.copy_(self._scratch)
            else:
                direction.mul_(self.spec.momentum).add_(self._scratch)
        self.t += 1
        own.add_(direction, alpha=-learning_rate)
