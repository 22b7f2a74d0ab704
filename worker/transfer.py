"""Starting from another training's parameters, with a new head if need be, and freezing a part of them.

Users meet the names within the network (`1.conv1.weight`), not those of the model around it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from common.config import Head
from common.errors import DataError, SpecError, refusal
from common.transfer_spec import ALL_BUT_HEAD
from worker.models.fixed_norm import fix_batch_norms
from worker.published import lies_in_a_stage, published_names

NETWORK = "1."
"""Of the names of a model of ours, which is a sequence of normalization (0) and network (1)."""
_SHOWN = 12


@dataclass(frozen=True, kw_only=True)
class Initialized:
    """What a model took from a file.

    Attributes:
        taken: how many tensors.
        new: names of those of the head, if it was drawn anew.
        absent: names of counters that the file lacks; they start at 0.
        unexpected: names of the file's tensors that the network has no place for.
        published: the file has the names of other repositories (see `published_names`).
        averaged: of a run that kept averaged weights, these.
    """

    taken: int
    new: tuple[str, ...]
    absent: tuple[str, ...]
    unexpected: tuple[str, ...]
    published: bool = False
    averaged: bool = False

    def __str__(self) -> str:
        parts = [f"{self.taken} tensors taken"]
        parts += ["weights and statistics averaged over the training (optimizer.ema_decay)"] if self.averaged else []
        parts += (
            ["by published names (they do not tell model.shortcut: is it that of the file?)"] if self.published else []
        )
        parts += [f"head drawn anew: {listed(self.new)}"] if self.new else []
        parts += [f"missing, counted from 0: {listed(self.absent)}"] if self.absent else []
        parts += [f"not used: {listed(self.unexpected)}"] if self.unexpected else []
        return "; ".join(parts)


@torch.no_grad()
def initialize(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    head: Head,
    *,
    other_classes: bool,
    source: str,
    averaged: bool = False,
) -> Initialized:
    """Copies weights into a model of ours, in place.

    Args:
        model: as `build_model` makes it; what is not taken keeps its values.
        weights: by name, of the model or of its network alone; or by the names of `published_names`.
        head: see `TransferSpec.head`.
        other_classes: whether the weights are known to tell other classes than the model.
        source: what errors call them.
        averaged: whether they are averaged weights; it is only told.

    Raises:
        DataError: a tensor that is missing (but the head's, if it is drawn anew, and counters), has another shape or
            kind, or holds infinities or NaN, or a block of published names that the network lacks; all of them are
            named.
    """
    own = model.state_dict()
    given, shown = _under_own_names(weights, model)
    of_head = [name for name in own if name.startswith(f"{head_of(model)}.")]
    fits = all(name in given and given[name].shape == own[name].shape for name in of_head)
    drawn = head is Head.NEW or (head is Head.AUTO and (other_classes or not fits))
    new = tuple(of_head) if drawn else ()
    absent = tuple(name for name in own if name not in given and not own[name].is_floating_point())
    wrong = [
        problem
        for name in own
        if name not in new
        and name not in absent
        and (problem := _problem(shown.get(name, name), own[name], given.get(name)))
    ]
    unexpected = tuple(name for name in given if name not in own)
    wrong += [f"{name} has no place" for name in unexpected if shown and lies_in_a_stage(name)]
    if wrong:
        rule = "every tensor of the model" + (" but its head" if new else " (transfer.head=new draws the head anew)")
        raise DataError(refusal(rule, "tensors", listed(wrong), source))
    for name, tensor in own.items():
        if name in given and name not in new:
            tensor.copy_(given[name])
    return Initialized(
        taken=len(own) - len(new) - len(absent),
        new=new,
        absent=absent,
        unexpected=unexpected,
        published=bool(shown),
        averaged=averaged,
    )


def freeze(model: nn.Module, patterns: Sequence[str]) -> frozenset[str]:
    """Freezes parameters in place, and with them every batch norm that has no others.

    Args:
        model: as `build_model` makes it.
        patterns: `all-but-head`, or glob patterns of names within the network.

    Returns:
        The frozen parameters' names.

    Raises:
        SpecError: a pattern that no parameter has, or that nothing is left to train.
    """
    parameters, head = dict(model.named_parameters()), head_of(model)
    frozen: set[str] = set()
    for pattern in patterns:
        if pattern == ALL_BUT_HEAD:
            found = [name for name in parameters if not name.startswith(f"{head}.")]
        else:
            found = [name for name in parameters if fnmatchcase(name.removeprefix(NETWORK), pattern)]
        if not found:
            rule = f"{ALL_BUT_HEAD} or a pattern of parameters' names ({listed(list(parameters))})"
            raise SpecError(refusal(rule, "transfer.freeze", pattern))
        frozen.update(found)
    if len(frozen) == len(parameters):
        raise SpecError(refusal("at least one parameter to train", "transfer.freeze", ", ".join(patterns)))
    for name in frozen:
        parameters[name].requires_grad_(False)
    fix_batch_norms(model, frozenset(frozen))
    return frozenset(frozen)


def head_of(model: nn.Module) -> str:
    """Name of a model's last linear layer, which gives the logits."""
    linear: list[str] = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return linear[-1]


def listed(names: Sequence[str]) -> str:
    """The names within the network, or the first few and how many more there are."""
    rest = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(name.removeprefix(NETWORK) for name in names[:_SHOWN]) + rest


def _under_own_names(weights: Mapping[str, Tensor], model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The weights under the model's names: as they are, as its network's, or as published, whichever finds most.

    Returns:
        The weights, those without a place by their old names; of published ones also what to call each of the model's.
    """
    own, theirs = model.state_dict().keys(), published_names(model.get_submodule(NETWORK.rstrip(".")))
    ours = {published: f"{NETWORK}{name}" for name, published in theirs.items()}
    network = {f"{NETWORK}{name}": tensor for name, tensor in weights.items()}
    published = {ours.get(name, name): tensor for name, tensor in weights.items()}
    best = max((dict(weights), network, published), key=lambda found: len(found.keys() & own))
    if best is not published:
        return best, {}
    return published, {name: f"{old} ({name.removeprefix(NETWORK)} here)" for old, name in ours.items()}


def _problem(name: str, own: Tensor, given: Tensor | None) -> str | None:
    """Why a tensor cannot be taken, in words; None if it can."""
    if given is None:
        return f"{name} missing"
    if given.shape != own.shape:
        return f"{name} of shape {list(given.shape)} instead of {list(own.shape)}"
    if given.is_floating_point() != own.is_floating_point() or given.is_complex():
        return f"{name} of {given.dtype}"
    if given.is_floating_point() and not bool(torch.isfinite(given).all()):
        return f"{name} not finite"
    return None
