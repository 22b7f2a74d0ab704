"""LARS: SGD with momentum and a layerwise adaptive learning rate, equation (3) with the gradient as the direction."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from common.config import OptimizerSpec
from worker.optimizers.base import Optimizer
from worker.optimizers.flat import Layer
from worker.optimizers.shares import Shares


class Lars(Optimizer):
    """b <- momentum * b + eta_t * lambda_i * (g_i + weight_decay * theta_i); theta_i <- theta_i - b, for every layer i.

    lambda_i = trust_coefficient * tau(||theta_i||) / (||g_i|| + weight_decay * ||theta_i||).

    Source: You et al. 2017 (arXiv 1708.03888), Algorithm 1. What is not in it:
    - tau of equation (3), which clamps the norm of the weights to [c_l, c_u], as in LAMB; there it is the norm itself;
    - lambda_i is 1 where numerator or denominator is 0, and in layers that are exempt.
    As there, momentum carries on what is scaled by the learning rate: its decay takes effect over some rounds.
    """

    def __init__(
        self,
        spec: OptimizerSpec,
        layers: Sequence[Layer],
        device: torch.device | str = "cpu",
        shares: Shares | None = None,
    ) -> None:
        super().__init__(spec, layers, device, shares)
        decays = [spec.weight_decay if rule.decayed else 0.0 for rule in self.rules]
        self._decays = torch.tensor(decays, dtype=torch.float32, device=device)

    @staticmethod
    def moment_names(spec: OptimizerSpec) -> tuple[str, ...]:
        return ("b",) if spec.momentum else ()

    def _update(self, theta: Tensor, gradient: Tensor, learning_rate: float) -> None:
        own, direction = self._shares.own(theta), self._scratch
        direction.copy_(gradient)
        self._add_decay(own)
        torch._foreach_mul_(self._scratch_layers, self._local_rates(theta, gradient).mul_(learning_rate).unbind())
        if self.spec.momentum:
            direction = self._moments["b"].mul_(self.spec.momentum).add_(direction)
        own.sub_(direction)

    def _local_rates(self, theta: Tensor, gradient: Tensor) -> Tensor:
        """lambda_i per layer, float32 [h]."""
        theta_norms = self._norms.of_vector(theta)
        denominators = self._norms.of_slices(gradient) + self._decays * theta_norms
        return self._trust_ratios(theta_norms, denominators / self.spec.trust_coefficient)
