"""One flat vector for all parameters and one for their gradients: what is exchanged, and what the optimizers update."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor, nn

from common.errors import SpecError, refusal


@dataclass(frozen=True, kw_only=True)
class Layer:
    """Where one parameter tensor lies in the flat vector; a "layer" of equation (3) is one parameter tensor."""

    name: str
    shape: tuple[int, ...]
    offset: int
    """Elements before it."""

    @property
    def length(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    @property
    def one_dimensional(self) -> bool:
        """True of biases and normalization parameters (at most one dimension)."""
        return len(self.shape) <= 1


class FlatParameters:
    """Moves a model's parameters and their gradients into two contiguous vectors.

    Afterwards every parameter and every `.grad` is a view: `backward` accumulates into `gradient`, an update of `theta`
    is an update of the model. Two things would cut the tie and must not happen afterwards: moving the model to
    another device or dtype (do that before), and `zero_grad(set_to_none=True)` (call `zero_gradient` instead).
    """

    theta: Tensor
    """float32 [d], the parameters; does not require grad itself."""
    gradient: Tensor
    """float32 [d], their gradients, zero at first."""
    layers: tuple[Layer, ...]
    parameters: tuple[nn.Parameter, ...]
    """By layer."""

    def __init__(
        self, model: nn.Module, order: Sequence[str] | None = None, frozen: frozenset[str] = frozenset()
    ) -> None:
        """Takes over `model`'s parameters.

        Args:
            model: on its device.
            order: names of all parameters in the order of the vectors; that of `named_parameters()` where absent.
            frozen: names of parameters that stay out of the vectors: nothing updates them, and they do not travel.

        Raises:
            SpecError: no parameters, one that is used under two names or shares its storage, is not float32, or is
                frozen without being named so (an optimizer would decay it all the same).
        """
        named = [pair for pair in model.named_parameters(remove_duplicate=False) if pair[0] not in frozen]
        _refuse_unfit(named)
        if order is not None:
            place = {name: index for index, name in enumerate(order)}
            named.sort(key=lambda pair: place[pair[0]])
        self.parameters = tuple(parameter for _, parameter in named)
        lengths = [parameter.numel() for _, parameter in named]
        offsets = [0, *accumulate(lengths)]
        self.layers = tuple(
            Layer(name=name, shape=tuple(parameter.shape), offset=offset)
            for (name, parameter), offset in zip(named, offsets, strict=False)
        )
        self.theta = torch.cat([parameter.detach().reshape(-1) for _, parameter in named])
        self.gradient = torch.zeros_like(self.theta)
        views = zip(named, torch.split(self.theta, lengths), torch.split(self.gradient, lengths), strict=True)
        for (_, parameter), theta_view, gradient_view in views:
            parameter.data = theta_view.view(parameter.shape)
            parameter.grad = gradient_view.view(parameter.shape)

    def zero_gradient(self) -> None:
        """Sets all gradients to zero, in one call."""
        self.gradient.zero_()

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the layers, in order."""
        return tuple(layer.name for layer in self.layers)

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of the layers, in order."""
        return tuple(layer.shape for layer in self.layers)

    @property
    def edges(self) -> tuple[int, ...]:
        """Where layers begin in the flat vector, and d at the end: one more than there are layers."""
        return (*(layer.offset for layer in self.layers), self.theta.numel())


def _refuse_unfit(named: list[tuple[str, nn.Parameter]]) -> None:
    if not named:
        raise SpecError(refusal("at least one parameter", "parameters", 0, "model"))
    owner: dict[int, str] = {}
    for name, parameter in named:
        if parameter.dtype is not torch.float32:
            raise SpecError(refusal("float32 parameters", name, parameter.dtype, "model"))
        if not parameter.requires_grad:
            raise SpecError(refusal("parameters that require grad", name, "frozen", "model"))
        storage = parameter.untyped_storage().data_ptr()
        if parameter.numel() and owner.setdefault(storage, name) != name:
            raise SpecError(refusal(f"parameters that share nothing, not even with {owner[storage]}", "tied", name))
