"""What published repositories call the tensors of networks that are here sequences of numbered layers."""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import nn

from worker.models.preact import PreActBlock

_STAGE = re.compile(r"(layer|block)\d+\.")
_SHORTCUT = "shortcut"


@dataclass(frozen=True, kw_only=True)
class _Style:
    """One family of repositories: blocks in each stage, the names of a block and of what is around the blocks."""

    stages: tuple[int, ...]
    block: str
    shortcut: str
    norm: str
    head: str
    stem: str = "conv1"


_STYLES = (
    _Style(stages=(2, 2, 2, 2), block="layer{}.{}", shortcut="shortcut.0", norm="bn", head="linear"),
    _Style(stages=(4, 4, 4), block="block{}.layer.{}", shortcut="convShortcut", norm="bn1", head="fc"),
)
"""PreAct ResNet-18 with a batch norm before its head (Wong et al. 2020, Rice et al. 2020), and Wide ResNet-28 (Zhang et
al. 2019, TRADES)."""


def published_names(network: nn.Module) -> dict[str, str]:
    """Their name of each of a network's tensors, by ours; nothing for networks that are published under our names.

    What names do not tell: whether the shortcut of a block with another shape starts behind its first activation (He et
    al. 2016b) or at the block's input, as in some repositories with the same names; `model.shortcut` has to say so.
    """
    numbers = [number for number, layer in enumerate(network.children()) if isinstance(layer, PreActBlock)]
    style = next((style for style in _STYLES if sum(style.stages) == len(numbers)), None)
    if style is None:
        return {}
    places = [(stage, block) for stage, blocks in enumerate(style.stages, start=1) for block in range(blocks)]
    layers = {number: style.block.format(*place) for number, place in zip(numbers, places, strict=True)}
    head = next(number for number, layer in enumerate(network.children()) if isinstance(layer, nn.Linear))
    layers |= {0: style.stem, numbers[-1] + 1: style.norm, head: style.head}
    names: dict[str, str] = {}
    for name in network.state_dict():
        number, _, within = name.partition(".")
        if within.startswith(f"{_SHORTCUT}."):
            within = style.shortcut + within.removeprefix(_SHORTCUT)
        names[name] = f"{layers[int(number)]}.{within}"
    return names


def lies_in_a_stage(name: str) -> bool:
    """Whether a tensor of theirs is part of a block: a network without a place for it is another network."""
    return _STAGE.match(name) is not None
