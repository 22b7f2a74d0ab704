"""The optimizer in slices against the optimizer in one piece: the same bits, wherever layers and pieces are cut."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from common.config import OptimizerName, OptimizerSpec
from tests.local.support import with_groups
from tests.method.test_optimizers import layers_of, vector
from worker.local.group import LocalGroup
from worker.optimizers import AdamW, Lamb, Lars, Layer, Optimizer, Sgd, Shares
from worker.optimizers.shares import LayerNorms

LAYERS = layers_of()
"""Seven layers, one of them of three pieces."""
D = sum(layer.length for layer in LAYERS)
LAST = LAYERS[-1].offset
ROUNDS = 3
KINDS: dict[OptimizerName, type[Optimizer]] = {
    OptimizerName.LAMB: Lamb,
    OptimizerName.SGD: Sgd,
    OptimizerName.LARS: Lars,
    OptimizerName.ADAMW: AdamW,
}
SPECS = {
    "lamb": OptimizerSpec(weight_decay=1e-2, learning_rate=0.1),
    "sgd": OptimizerSpec(name=OptimizerName.SGD, weight_decay=1e-2, learning_rate=0.1),
    "nesterov, clipped": OptimizerSpec(name=OptimizerName.SGD, nesterov=True, learning_rate=0.1, clip_norm=0.5),
    "lars, clipped": OptimizerSpec(name=OptimizerName.LARS, weight_decay=1e-2, learning_rate=10, clip_norm=0.5),
    "adamw": OptimizerSpec(name=OptimizerName.ADAMW, decay_one_dimensional=False, weight_decay=1e-2),
}
EDGES = {
    "in the middle of a piece": (0, LAST + 20000, D),
    "where a layer begins": (0, LAST, D),
    "where a piece begins": (0, LAST + (1 << 14), D),
    "two within one piece": (0, LAST + 100, LAST + 200, D),
    "one within a layer of one element": (0, LAYERS[4].offset, LAYERS[4].offset + 1, D),
    "three, one slice empty": (0, 1000, 1000, LAST + 30000, D),
    "all in one slice": (0, 0, D),
}


def three_updates(spec: OptimizerSpec, optimizer: Optimizer, shares: Shares | None) -> Tensor:
    theta = vector(1)
    for round_ in range(ROUNDS):
        gradient = vector(10 + round_, size=0.01)
        if shares:  # what the others exchange is not for us to see
            hidden = torch.full_like(gradient, float("nan"))
            shares.own(hidden).copy_(shares.own(gradient))
            gradient = hidden
        optimizer.update(theta, gradient, spec.learning_rate)
        if shares:
            shares.gather(theta, shares.edges)
    return theta


@pytest.mark.parametrize("edges", EDGES.values(), ids=EDGES.keys())
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
def test_slices_are_updated_to_the_bits_of_the_whole(spec: OptimizerSpec, edges: tuple[int, ...]) -> None:
    whole = KINDS[spec.name](spec, LAYERS)
    expected = three_updates(spec, whole, None)

    def run(group: LocalGroup, rank: int) -> tuple[Tensor, dict[str, Tensor]]:
        shares = Shares(edges=edges, index=rank, gather=group.gather)
        optimizer = KINDS[spec.name](spec, LAYERS, shares=shares)
        assert all(len(moment) == shares.stop - shares.start for moment in optimizer._moments.values())
        assert len(optimizer._scratch) == shares.stop - shares.start
        return three_updates(spec, optimizer, shares), optimizer.state_tensors()

    for theta, state in with_groups(len(edges) - 1, run):
        assert torch.equal(theta, expected)
        assert state.keys() == whole.state_tensors().keys()
        assert all(torch.equal(state[name], tensor) for name, tensor in whole.state_tensors().items())


def test_a_whole_state_is_taken_over_in_slices() -> None:
    spec = OptimizerSpec(weight_decay=1e-2)
    whole = Lamb(spec, LAYERS)
    three_updates(spec, whole, None)
    shares = Shares(edges=(0, 1000, D), index=1)
    part = Lamb(spec, LAYERS, shares=shares)
    part.load_state(whole.state_tensors())
    assert part.t == ROUNDS
    for name, moment in part._moments.items():
        assert torch.equal(moment, whole._moments[name][1000:])


@pytest.mark.parametrize("length", [0, 1, (1 << 14) - 1, 1 << 14, (1 << 14) + 1, 3 << 14])
def test_layer_norms_of_slices_are_those_of_the_whole_for_every_length(length: int) -> None:
    lengths = [5, length, 0, 7]
    layers = tuple(Layer(name=f"p{index}", shape=(n,), offset=sum(lengths[:index])) for index, n in enumerate(lengths))
    d = sum(lengths)
    x = vector(3, d)
    expected = LayerNorms(lengths, Shares.undivided(d)).of_vector(x)
    reference = [x[layer.offset : layer.offset + layer.length].double().norm().item() for layer in layers]
    assert expected.tolist() == pytest.approx(reference, rel=1e-6)
    edges = (0, 3, d // 2 + 2, d)

    def run(group: LocalGroup, rank: int) -> tuple[Tensor, Tensor]:
        norms = LayerNorms(lengths, Shares(edges=edges, index=rank, gather=group.gather))
        return norms.of_vector(x), norms.of_slices(x[edges[rank] : edges[rank + 1]])

    for of_vector, of_slices in with_groups(3, run):
        assert torch.equal(of_vector, expected)
        assert torch.equal(of_slices, expected)
    assert all(start <= stop for start, stop in pairwise(edges))
