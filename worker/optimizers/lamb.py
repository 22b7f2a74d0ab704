"""LAMB, Algorithm A2 of the paper, with the layerwise adaptive learning rate of equation (3)."""

from __future__ import annotations

import torch
from torch import Tensor

from common.config import OptimizerSpec
from worker.optimizers.base import Optimizer
from worker.optimizers.shares import PIECE

__all__ = ["PIECE", "Lamb"]


class Lamb(Optimizer):
    """theta_i <- theta_i - eta_t * tau(||theta_i||) / ||u_i|| * u_i for every layer i, equations (3) and (A30).

    Source: Algorithm A2 (You et al. 2019). What it leaves open, and the deviations:
    - weight decay is decoupled: u = m / sqrt(v + zeta) + weight_decay * theta (LAMB's own definition; training details,
      supplement 4.1, name only its size);
    - the moments that are carried on are the uncorrected ones; the correction applies to the ratio (Adam, LAMB);
    - the trust ratio is 1 where tau or ||u_i|| is 0 (with c_l = 0 a bias that starts at 0 would never move);
    - the paper's code has no bias correction and puts zeta outside the root; `bias_correction=false` gives the former.
    """

    @staticmethod
    def moment_names(spec: OptimizerSpec) -> tuple[str, ...]:  # noqa: ARG004 (LAMB always has both)
        return ("m", "v")

    def _update(self, theta: Tensor, gradient: Tensor, learning_rate: float) -> None:
        spec, m, v, u = self.spec, self._moments["m"], self._moments["v"], self._scratch
        own = self._shares.own(theta)
        m.lerp_(gradient, 1 - spec.beta1)  # m_t = beta_1 m_{t-1} + (1 - beta_1) g_t
        v.mul_(spec.beta2).addcmul_(gradient, gradient, value=1 - spec.beta2)
        # u_t = m_t / sqrt(v_t + zeta), in one vector of scratch
        torch.div(v, self._correction(spec.beta2), out=u).add_(spec.stability_eps).sqrt_()
        torch.div(m, u, out=u).div_(self._correction(spec.beta1))
        self._add_decay(own)
        step_sizes = self._trust_ratios(self._norms.of_vector(theta), self._norms.of_slices(u)).mul_(learning_rate)
        torch._foreach_mul_(self._scratch_layers, step_sizes.unbind())
        own.sub_(u)
