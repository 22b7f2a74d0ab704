"""SGD with momentum: the paper's baseline "w/o LALR", and with linear scaling and warm-up its DAT-LSGD."""

from __future__ import annotations

from torch import Tensor

from common.config import OptimizerSpec
from worker.optimizers.base import Optimizer


class Sgd(Optimizer):
    """b <- momentum * b + (g + weight_decay * theta); theta <- theta - eta_t * b.

    With Nesterov's momentum theta moves by g + weight_decay * theta + momentum * b instead of b. Operation for
    operation what `torch.optim.SGD` does (no dampening), and so bitwise equal to it.
    """

    @staticmethod
    def moment_names(spec: OptimizerSpec) -> tuple[str, ...]:
        return ("b",) if spec.momentum else ()

    def _update(self, theta: Tensor, gradient: Tensor, learning_rate: float) -> None:
        own, direction = self._shares.own(theta), self._scratch
        direction.copy_(gradient)
        self._add_decay(own)
        if self.spec.momentum:
            b = self._moments["b"]
            if self.t == 1:
                b.copy_(direction)
            else:
                b.mul_(self.spec.momentum).add_(direction)
            direction = direction.add_(b, alpha=self.spec.momentum) if self.spec.nesterov else b
        own.add_(direction, alpha=-learning_rate)
