"""LAMB, Algorithm A2 of the paper, with the layerwise adaptive learning rate of equation (3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from common.config import OptimizerSpec
from worker.optimizers.base import Optimizer
from worker.optimizers.flat import Layer
from worker.optimizers.shares import PIECE, LayerNorms, Shares

__all__ = ["PIECE", "Lamb"]


class Lamb(Optimizer):
    """theta_i <- theta_i - eta_t * tau(||theta_i||) / ||u_i|| * u_i for every layer i, equations (3) and (A30).

    Source: Algorithm A2 (You et al. 2019). What it leaves open, and the deviations:
    - weight decay is decoupled: u = m / sqrt(v + zeta) + weight_decay * theta (LAMB's own definition; training details,
      supplement 4.1, name only its size);
    - the moments that are carried on are the uncorrected ones; the correction applies to the ratio (Adam, LAMB);
    - the trust ratio is 1 where either norm is 0 (a bias starts at 0 and would never move);
    - the paper's code has no bias correction and puts zeta outside the root; `bias_correction=false` gives the former.
    """

    def __init__(
        self,
        spec: OptimizerSpec,
        layers: Sequence[Layer],
        device: torch.device | str = "cpu",
        shares: Shares | None = None,
    ) -> None:
        super().__init__(spec, layers, device, shares)
        self._adapted = torch.tensor([rule.adapted for rule in self.rules], device=device)
        self._norms = LayerNorms([layer.length for layer in layers], self._shares, device)

    @staticmethod
    def moment_names(spec: OptimizerSpec) -> tuple[str, ...]:  # noqa: ARG004 (LAMB always has both)
        return ("m", "v")

    @torch.no_grad()
    def update(self, theta: Tensor, gradient: Tensor, learning_rate: float) -> None:
        spec, m, v, u = self.spec, self._moments["m"], self._moments["v"], self._scratch
        own, gradient = self._shares.own(theta), self._shares.own(gradient)
        self.t += 1
        m.lerp_(gradient, 1 - spec.beta1)  # m_t = beta_1 m_{t-1} + (1 - beta_1) g_t
        v.mul_(spec.beta2).addcmul_(gradient, gradient, value=1 - spec.beta2)
        # u_t = m_t / sqrt(v_t + zeta), in one vector of scratch
        torch.div(v, self._correction(spec.beta2), out=u).add_(spec.stability_eps).sqrt_()
        torch.div(m, u, out=u).div_(self._correction(spec.beta1))
        self._add_decay(own)
        step_sizes = self._trust_ratios(theta).mul_(learning_rate)
        torch._foreach_mul_(self._scratch_layers, step_sizes.unbind())
        own.sub_(u)

    def _correction(self, beta: float) -> float:
        """1 - beta^t, or 1 without bias correction."""
        return 1 - beta**self.t if self.spec.bias_correction else 1.0

    def _trust_ratios(self, theta: Tensor) -> Tensor:
        """tau(||theta_i||) / ||u_i|| per layer, float32 [h]; tau clamps to [c_l, c_u]."""
        theta_norms = self._norms.of_vector(theta)
        update_norms = self._norms.of_slices(self._scratch)
        tau = theta_norms.clamp(self.spec.trust_low, self.spec.trust_high)
        adapted = self._adapted & (theta_norms > 0) & (update_norms > 0)
        return torch.where(adapted, tau / update_norms, 1.0)
