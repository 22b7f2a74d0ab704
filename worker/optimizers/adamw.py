"""AdamW: Adam with weight decay apart from the gradient, without layerwise adaptive learning rates."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from common.config import OptimizerSpec
from worker.optimizers.base import Optimizer


class AdamW(Optimizer):
    """theta <- (1 - eta_t * weight_decay) * theta - eta_t * m_hat / (sqrt(v_hat) + stability_eps).

    Source: Loshchilov and Hutter 2019, Algorithm 2. Operation for operation what `torch.optim.AdamW` does, and so
    bitwise equal to it. As there, and in LAMB, the moments that are carried on are the uncorrected ones.
    """

    @staticmethod
    def moment_names(spec: OptimizerSpec) -> tuple[str, ...]:  # noqa: ARG004 (it always has both)
        return ("m", "v")

    def _update(self, theta: Tensor, gradient: Tensor, learning_rate: float) -> None:
        spec, m, v, denominator = self.spec, self._moments["m"], self._moments["v"], self._scratch
        own = self._shares.own(theta)
        self._decay(own, 1 - learning_rate * spec.weight_decay)
        m.lerp_(gradient, 1 - spec.beta1)
        v.mul_(spec.beta2).addcmul_(gradient, gradient, value=1 - spec.beta2)
        torch.sqrt(v, out=denominator).div_(math.sqrt(self._correction(spec.beta2))).add_(spec.stability_eps)
        own.addcdiv_(m, denominator, value=-learning_rate / self._correction(spec.beta1))

    def _decay(self, own: Tensor, factor: float) -> None:
        """Multiplies the weights of the layers that are decayed."""
        if self._decayed:
            layers = torch.split(own, self._lengths)
            torch._foreach_mul_([layers[index] for index in self._decayed], factor)
