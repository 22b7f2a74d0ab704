"""One replica of the training state: model, optimizer and the vectors that are exchanged.

All replicas of a job start equal, and stay equal because every update is a function of bytes that all of them decode.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
import xxhash
from torch import Tensor, nn

from common.codecs import Float32
from common.config import OptimizerSpec
from common.errors import CheckpointError, refusal
from common.layout import TensorSpec
from worker.metrics import METRICS
from worker.models import averaged_buffers
from worker.optimizers import Averages, FlatParameters, MovingAverage, Shares, make_optimizer
from worker.selection import Selection

METRICS_NAME = "@metrics"
MODEL, OPTIMIZER, EMA = "model.", "optimizer.", "ema."
"""What the names of a checkpoint's tensors begin with."""


class Replica:
    """Parameters, buffers and optimizer state of one worker."""

    def __init__(
        self,
        model: nn.Module,
        spec: OptimizerSpec,
        order: Sequence[str] | None = None,
        divide: Callable[[Sequence[TensorSpec]], Shares] | None = None,
        frozen: frozenset[str] = frozenset(),
    ) -> None:
        """
        Args:
            model: on its device; its parameters become views of one flat vector.
            spec: of its optimizer.
            order: of the parameters in that vector; where absent the model's own.
            divide: tells from `tensors` which part of the optimizer is this process's; where absent all of it.
            frozen: names of parameters that stay as they are: they are in digests and checkpoints, and nowhere else.
        """
        self.model = model
        self.parameters = FlatParameters(model, order, frozen)
        self._frozen = [parameter for name, parameter in model.named_parameters() if name in frozen]
        self._buffers = averaged_buffers(model)
        theta = self.parameters.theta
        shares = divide(self.tensors) if divide else Shares.undivided(theta.numel())
        self.optimizer = make_optimizer(spec, self.parameters, shares)
        self.average: MovingAverage | None = None
        if spec.ema_decay is not None:
            self.average = MovingAverage(spec.ema_decay, theta, self._buffers, shares)
        persistent = model.state_dict(keep_vars=True)
        self._counters = {n: b for n, b in model.named_buffers() if n in persistent and n not in self._buffers}
        self.selection = Selection()
        self._judged_buffers: list[Tensor] = []

    @property
    def tensors(self) -> tuple[TensorSpec, ...]:
        """The layout's input: parameters, averaged buffers, and the round's metrics as one more buffer."""
        layers = self.parameters.layers
        return (
            *(TensorSpec(name=layer.name, shape=layer.shape, buffer=False) for layer in layers),
            *(TensorSpec(name=name, shape=tuple(b.shape), buffer=True) for name, b in self._buffers.items()),
            TensorSpec(name=METRICS_NAME, shape=(METRICS,), buffer=True),
        )

    def state_vector(self, metrics: Float32) -> Float32:
        """Averaged buffers, then the metrics: float32 of shape (e,), new memory."""
        parts = [buffer.detach().reshape(-1).cpu().numpy() for buffer in self._buffers.values()]
        return np.concatenate([*parts, metrics]).astype(np.float32, copy=False)

    @torch.no_grad()
    def take_state(self, average: Float32) -> Float32:
        """Sets the buffers to the average; returns the average metrics."""
        offset = 0
        for buffer in self._buffers.values():
            part = average[offset : offset + buffer.numel()]
            buffer.copy_(torch.from_numpy(part).view(buffer.shape))
            offset += buffer.numel()
        return average[offset:]

    def update(self, learning_rate: float) -> None:
        """Updates this process's slice of the parameters with the average gradient, (A4), and of their average."""
        theta = self.parameters.theta
        self.optimizer.update(theta, self.parameters.gradient, learning_rate)
        if self.average:
            self.average.update(theta, self._buffers, self.optimizer.t)

    @contextmanager
    def judged(self) -> Iterator[nn.Module]:
        """The model that is judged: with the averaged weights and statistics while in here, if they are kept.

        Local processes gather them: all of them enter, unless the last update has been followed by such a gathering.
        """
        if not self.average:
            yield self.model
            return
        averages = self.average.whole()
        own = [self.parameters.theta, *self._buffers.values()]
        before = [tensor.clone() for tensor in own]
        try:
            _copy(own, [averages.theta, *averages.buffers.values()])
            yield self.model
        finally:
            _copy(own, before)

    def mark_judged(self) -> None:
        """Remembers the buffers as they are judged: a round moves them before its result is known."""
        self._judged_buffers = [buffer.clone() for buffer in self._all_buffers]

    @contextmanager
    def as_judged(self) -> Iterator[None]:
        """While in here, before the update of the round, the state is that of `mark_judged`."""
        before = [buffer.clone() for buffer in self._all_buffers]
        try:
            _copy(self._all_buffers, self._judged_buffers)
            yield
        finally:
            _copy(self._all_buffers, before)

    @property
    def _all_buffers(self) -> list[Tensor]:
        return [*self._buffers.values(), *self._counters.values()]

    def parameter_digest(self) -> bytes:
        """XXH3-128 of parameters, frozen ones included, and averaged buffers: 16 bytes."""
        return self._digest(self.parameters.theta, *self._frozen, *self._buffers.values())

    def replica_digest(self) -> bytes:
        """XXH3-128 of parameters, all buffers, optimizer state, averages and selection: what replicas have in common.

        Where local processes share the optimizer, this and `state_tensors` gather its state: all of them call it.
        """
        state = self.optimizer.state_tensors()
        tensors = [self.parameters.theta, *self._frozen, *self._all_buffers, *(state[name] for name in sorted(state))]
        if self.average:
            averages = self.average.whole()
            tensors += [averages.theta, *averages.buffers.values()]
        if counts := self.selection.to_json():
            tensors.append(torch.tensor(list(counts.values())))
        return self._digest(*tensors)

    def state_tensors(self) -> dict[str, Tensor]:
        """Everything a checkpoint holds, by name, on the CPU.

        `model.*` as in the model's state_dict; `optimizer.<moment>/<parameter>` in the parameter's shape and
        `optimizer.t`; `ema.<parameter>` and `ema.<buffer>`: nothing of it depends on the order of the flat vector.
        """
        tensors = {f"{MODEL}{name}": tensor for name, tensor in self.model.state_dict().items()}
        for moment, vector in self.optimizer.state_tensors().items():
            if vector.dim() == 0:
                tensors[f"{OPTIMIZER}{moment}"] = vector
            else:
                tensors |= self._by_layer(f"{OPTIMIZER}{moment}/", vector)
        if self.average:
            averages = self.average.whole()
            tensors |= self._by_layer(EMA, averages.theta)
            tensors |= {f"{EMA}{name}": buffer for name, buffer in averages.buffers.items()}
        return {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}

    def gather(self) -> None:
        """Takes part in what `state_tensors` gathers: another local process keeps it."""
        self.optimizer.state_tensors()
        if self.average:
            self.average.whole()

    def _by_layer(self, prefix: str, vector: Tensor) -> dict[str, Tensor]:
        """The parts of a vector in the shapes of the parameters, views."""
        return {
            f"{prefix}{layer.name}": vector[layer.offset : layer.offset + layer.length].view(layer.shape)
            for layer in self.parameters.layers
        }

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes over what `state_tensors` gave.

        Raises:
            CheckpointError: a checkpoint of another model or optimizer.
        """
        load_model(self.model, tensors)
        state: dict[str, Tensor] = {}
        parts: dict[str, dict[str, Tensor]] = {}
        for name, tensor in _with_prefix(tensors, OPTIMIZER).items():
            moment, _, layer = name.partition("/")
            if layer:
                parts.setdefault(moment, {})[layer] = tensor
            else:
                state[moment] = tensor
        self.optimizer.load_state(state | {moment: self._joined(moment, of) for moment, of in parts.items()})
        self._load_average(_with_prefix(tensors, EMA))

    def _load_average(self, tensors: Mapping[str, Tensor]) -> None:
        if not self.average:
            return
        buffers = {name: tensor for name, tensor in tensors.items() if name in self._buffers}
        for name, buffer in self._buffers.items():
            got = tuple(buffers[name].shape) if name in buffers else None
            if got != tuple(buffer.shape):
                rule = f"average of {name} of shape {tuple(buffer.shape)}"
                raise CheckpointError(refusal(rule, "shape", got, "averaged weights"))
        theta = self._joined("average", {name: t for name, t in tensors.items() if name not in buffers})
        self.average.load(Averages(theta=theta, buffers=buffers))

    def _joined(self, moment: str, parts: Mapping[str, Tensor]) -> Tensor:
        """One vector of the optimizer's state, or of the averages, from its parts by parameter."""
        layers = self.parameters.layers
        expected = {layer.name: layer.shape for layer in layers}
        got = {name: tuple(tensor.shape) for name, tensor in parts.items()}
        for name in sorted(expected.keys() | got.keys()):
            if expected.get(name) != got.get(name):
                rule = f"{moment} of {name} of shape {expected.get(name)}"
                raise CheckpointError(refusal(rule, "shape", got.get(name), "optimizer state"))
        return torch.cat([parts[layer.name].reshape(-1) for layer in layers])

    def _digest(self, *tensors: Tensor) -> bytes:
        state = xxhash.xxh3_128()
        for tensor in tensors:
            state.update(np.ascontiguousarray(tensor.detach().cpu().numpy()).data)
        return state.digest()


def has_average(tensors: Mapping[str, Tensor]) -> bool:
    """Whether a checkpoint holds averaged weights."""
    return any(name.startswith(EMA) for name in tensors)


def model_tensors(tensors: Mapping[str, Tensor], *, averaged: bool) -> dict[str, Tensor]:
    """A checkpoint's tensors by the model's names, averaged weights and statistics in place of the others or not."""
    return _with_prefix(tensors, MODEL) | (_with_prefix(tensors, EMA) if averaged else {})


@torch.no_grad()
def load_model(model: nn.Module, tensors: Mapping[str, Tensor], *, averaged: bool = False) -> None:
    """Copies a checkpoint's model into `model`, in place.

    Args:
        model: of the checkpoint's architecture.
        tensors: of the checkpoint.
        averaged: with its averaged weights and statistics, which it must have.

    Raises:
        CheckpointError: a checkpoint of another model; it names the first tensor that differs.
    """
    own, given = model.state_dict(), model_tensors(tensors, averaged=averaged)
    for name in sorted(set(own) | set(given)):
        expected = tuple(own[name].shape) if name in own else None
        got = tuple(given[name].shape) if name in given else None
        if expected != got:
            rule = f"no tensor {name}" if expected is None else f"{name} of shape {expected}"
            found = "none" if got is None else got
            raise CheckpointError(refusal(rule, "shape", found, "checkpoint of another model"))
    for name, tensor in own.items():
        tensor.copy_(given[name])


def _with_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin so, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


@torch.no_grad()
def _copy(to: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for tensor, value in zip(to, values, strict=True):
        tensor.copy_(value)
