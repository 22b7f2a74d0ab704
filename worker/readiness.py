"""When gradients are ready: in which order backward finishes the parameters, and when all of a bucket is there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from common.layout import BucketKind, Layout


def backward_order(model: nn.Module, images_NCHW: Tensor) -> tuple[str, ...]:
    """Names of the parameters in the order in which backward finishes their gradients.

    It is found by trying: one forward and backward pass in eval mode, which leaves the model as it was. Parameters that
    get no gradient come last; frozen ones are left out. The order is a property of the model's graph, so all workers
    find the same one.

    Args:
        model: its parameters have no gradients yet.
        images_NCHW: an input of the right shape, on the model's device; its values do not matter.
    """
    finished: list[str] = []
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]

    def watch(name: str, parameter: nn.Parameter) -> torch.utils.hooks.RemovableHandle:
        return parameter.register_post_accumulate_grad_hook(lambda _: finished.append(name))

    handles = [watch(name, parameter) for name, parameter in named]
    training = model.training
    try:
        model.eval()
        model(images_NCHW).sum().backward()
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
        for _, parameter in named:
            parameter.grad = None
    done = set(finished)
    return (*finished, *(name for name, _ in named if name not in done))


class BucketReadiness:
    """Turns parameters whose gradients are final into buckets that are."""

    def __init__(self, layout: Layout, on_ready: Callable[[Iterable[int]], None]) -> None:
        """`on_ready`: told the numbers of the gradient buckets, each once a round."""
        self._on_ready = on_ready
        gradient = layout.of_kind(BucketKind.GRADIENT)
        self._all = tuple(bucket.number for bucket in gradient)
        edges = layout.layer_edges
        self._buckets_of: list[list[int]] = [[] for _ in edges[1:]]
        self._waits_for = dict.fromkeys(self._all, 0)
        for layer, (start, stop) in enumerate(pairwise(edges)):
            for bucket in gradient:
                if start < bucket.stop and bucket.start < stop:
                    self._buckets_of[layer].append(bucket.number)
                    self._waits_for[bucket.number] += 1
        self._left: dict[int, int] = {}

    def begin(self) -> None:
        """A round begins: no gradient is final."""
        self._left = dict(self._waits_for)

    def layer_done(self, layer: int) -> None:
        """The gradient of this layer is final."""
        ready = []
        for number in self._buckets_of[layer]:
            self._left[number] -= 1
            if self._left[number] == 0:
                ready.append(number)
                del self._left[number]
        if ready:
            self._on_ready(ready)

    def finish(self) -> None:
        """Backward is over: what has not been said to be final is so now, unused parameters included."""
        rest = sorted(self._left)
        self._left = {}
        if rest:
            self._on_ready(rest)


def watch_layers(parameters: Sequence[nn.Parameter], layer_done: Callable[[int], None]) -> Callable[[], None]:
    """Calls `layer_done(index)` whenever backward has finished a parameter's gradient; returns what ends that."""

    def watch(index: int, parameter: nn.Parameter) -> torch.utils.hooks.RemovableHandle:
        return parameter.register_post_accumulate_grad_hook(lambda _: layer_done(index))

    handles = [watch(index, parameter) for index, parameter in enumerate(parameters)]

    def end() -> None:
        for handle in handles:
            handle.remove()

    return end
