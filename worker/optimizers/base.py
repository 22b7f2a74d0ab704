"""What the outer minimization oracles (A4) have in common: rules per layer, clipping, and a state that can be saved."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from common.config import OptimizerSpec
from common.errors import CheckpointError, refusal
from worker.optimizers.flat import Layer
from worker.optimizers.shares import LayerNorms, Shares

_COUNT = "t"


@dataclass(frozen=True, kw_only=True)
class LayerRule:
    """Whether one layer's weights are decayed and, with LAMB and LARS, its learning rate adapted."""

    name: str
    decayed: bool
    adapted: bool


def layer_rules(spec: OptimizerSpec, layers: Sequence[Layer]) -> tuple[LayerRule, ...]:
    """The explicit table: one rule per layer; only tensors of at most one dimension can be exempt."""
    return tuple(
        LayerRule(
            name=layer.name,
            decayed=spec.weight_decay > 0 and (spec.decay_one_dimensional or not layer.one_dimensional),
            adapted=spec.adapt_one_dimensional or not layer.one_dimensional,
        )
        for layer in layers
    )


class Optimizer(ABC):
    """Updates a flat parameter vector in place; same state, parameters, gradient and learning rate give the same bits.

    The order of operations is fixed and none of them depends on the number of threads, so replicas on like hardware
    stay identical. Where processes share the vector, each keeps the state of its slice and updates that; `update` and
    `state_tensors` gather, so all of them call these in the same order.
    """

    rules: tuple[LayerRule, ...]
    t: int
    """Updates made so far."""

    def __init__(
        self,
        spec: OptimizerSpec,
        layers: Sequence[Layer],
        device: torch.device | str = "cpu",
        shares: Shares | None = None,
    ) -> None:
        """
        Args:
            spec: which rule, with its numbers.
            layers: of the flat vector.
            device: of the parameters; the state is allocated there.
            shares: which slice of the vector is this process's; all of it if None.
        """
        self.spec = spec
        self.rules = layer_rules(spec, layers)
        self.t = 0
        self._d = sum(layer.length for layer in layers)
        self._shares = shares or Shares.undivided(self._d)
        start, stop = self._shares.start, self._shares.stop
        self._lengths = [
            max(min(layer.offset + layer.length, stop) - max(layer.offset, start), 0) for layer in layers
        ]  # of what lies in this process's slice
        self._decayed = [index for index, rule in enumerate(self.rules) if rule.decayed]
        self._adapted = torch.tensor([rule.adapted for rule in self.rules], device=device)
        self._norms = LayerNorms([layer.length for layer in layers], self._shares, device)
        self._scratch = torch.zeros(stop - start, dtype=torch.float32, device=device)
        self._scratch_layers = torch.split(self._scratch, self._lengths)
        self._moments = {name: torch.zeros_like(self._scratch) for name in self.moment_names(spec)}

    @staticmethod
    @abstractmethod
    def moment_names(spec: OptimizerSpec) -> tuple[str, ...]:
        """Names of the vectors that the state consists of, besides the count."""

    @torch.no_grad()
    def update(self, theta: Tensor, gradient: Tensor, learning_rate: float) -> None:
        """One update (A4).

        Args:
            theta: float32 [d]; this process's slice is updated in place.
            gradient: float32 [d], the average of (A3); only this process's slice is read, and clipped in place.
            learning_rate: eta_t of this round.
        """
        own = self._shares.own(gradient)
        if self.spec.clip_norm is not None:
            self._clip(own, self.spec.clip_norm)
        self.t += 1
        self._update(theta, own, learning_rate)

    @abstractmethod
    def _update(self, theta: Tensor, gradient: Tensor, learning_rate: float) -> None:
        """Update `t`.

        Args:
            theta: float32 [d]; this process's slice is updated in place.
            gradient: this process's slice of it, clipped.
            learning_rate: eta_t of this round.
        """

    def state_tensors(self) -> dict[str, Tensor]:
        """The whole state: vectors of d float32 (the live ones unless shared) and the count `t` as an int64 scalar."""
        whole = {name: self._shares.joined(moment) for name, moment in self._moments.items()}
        return {**whole, _COUNT: torch.tensor(self.t, dtype=torch.int64)}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Takes over what `state_tensors` gave, copying what this process keeps.

        Raises:
            CheckpointError: another set of names, shapes or dtypes; nothing has been taken over then.
        """
        expected = {**dict.fromkeys(self._moments, ((self._d,), torch.float32)), _COUNT: ((), torch.int64)}
        if set(state) != set(expected):
            raise CheckpointError(refusal(f"tensors {sorted(expected)}", "tensors", sorted(state), "optimizer state"))
        for name, (shape, dtype) in expected.items():
            given = (tuple(state[name].shape), state[name].dtype)
            if given != (shape, dtype):
                rule = f"shape {shape} and {dtype}"
                raise CheckpointError(refusal(rule, name, given, "optimizer state"))
        count = int(state[_COUNT])
        if count < 0:
            raise CheckpointError(refusal("a count >= 0", _COUNT, count, "optimizer state"))
        for name, moment in self._moments.items():
            moment.copy_(self._shares.own(state[name]))
        self.t = count

    def _clip(self, gradient: Tensor, clip_norm: float) -> None:
        """g <- g * min(1, clip_norm / ||g||) for a gradient of which each process has its slice. Gathers.

        The norm is that of the layers' norms, which are the same bits however the vector is divided.
        """
        norm = torch.linalg.vector_norm(self._norms.of_slices(gradient))
        gradient.mul_((clip_norm / norm).clamp_(max=1.0))

    def _correction(self, beta: float) -> float:
        """1 - beta^t, or 1 without bias correction."""
        return 1 - beta**self.t if self.spec.bias_correction else 1.0

    def _trust_ratios(self, theta_norms: Tensor, denominators: Tensor) -> Tensor:
        """tau(||theta_i||) / denominator per layer, float32 [h]; tau clamps to [c_l, c_u].

        It is 1 in layers that are not adapted, and where tau or the denominator is 0: with c_l = 0 a bias that starts
        at 0 would never move.
        """
        tau = theta_norms.clamp(self.spec.trust_low, self.spec.trust_high)
        applies = self._adapted & (tau > 0) & (denominators > 0)
        return torch.where(applies, tau / denominators, 1.0)

    def _add_decay(self, theta: Tensor) -> None:
        """Adds weight_decay * theta onto the scratch vector, in the layers that are decayed; both are slices."""
        if self._decayed:
            theta_layers = torch.split(theta, self._lengths)
            torch._foreach_add_(
                [self._scratch_layers[index] for index in self._decayed],
                [theta_layers[index] for index in self._decayed],
                alpha=self.spec.weight_decay,
            )
