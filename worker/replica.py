"""One replica of the training state: model, optimizer and the vectors that are exchanged.

All replicas of a job start equal, and stay equal because every update is a function of bytes that all of them decode.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

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
from worker.optimizers import FlatParameters, Shares, make_optimizer

METRICS_NAME = "@metrics"
WHOLE = slice(None)


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
        self.optimizer = make_optimizer(spec, self.parameters, divide(self.tensors) if divide else None)
        persistent = model.state_dict(keep_vars=True)
        self._counters = {n: b for n, b in model.named_buffers() if n in persistent and n not in self._buffers}
        self._gradient = np.empty(self.parameters.theta.numel(), np.float32)

    @property
    def tensors(self) -> tuple[TensorSpec, ...]:
        """The layout's input: parameters, averaged buffers, and the round's metrics as one more buffer."""
        layers = self.parameters.layers
        return (
            *(TensorSpec(name=layer.name, shape=layer.shape, buffer=False) for layer in layers),
            *(TensorSpec(name=name, shape=tuple(b.shape), buffer=True) for name, b in self._buffers.items()),
            TensorSpec(name=METRICS_NAME, shape=(METRICS,), buffer=True),
        )

    def gradient_vector(self, part: slice = WHOLE) -> Float32:
        """The gradient on the host, float32 of shape (d,); on the CPU it is the gradient's own memory.

        Elsewhere only `part` of it is brought to the host, and no other part of that memory is touched.
        """
        gradient = self.parameters.gradient
        if gradient.device.type == "cpu":
            return gradient.numpy()
        torch.from_numpy(self._gradient)[part].copy_(gradient[part])
        return self._gradient

    def take_gradient(self, part: slice = WHOLE) -> None:
        """Brings part of the vector of `gradient_vector`, which has become the average, to the model's device."""
        gradient = self.parameters.gradient
        if gradient.device.type != "cpu":
            gradient[part].copy_(torch.from_numpy(self._gradient)[part])

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

    def parameter_digest(self) -> bytes:
        """XXH3-128 of parameters, frozen ones included, and averaged buffers: 16 bytes."""
        return self._digest(self.parameters.theta, *self._frozen, *self._buffers.values())

    def replica_digest(self) -> bytes:
        """XXH3-128 of parameters, all buffers and optimizer state: what replicas share when they join and leave.

        Where local processes share the optimizer, this and `state_tensors` gather its state: all of them call it.
        """
        state = self.optimizer.state_tensors()
        return self._digest(
            self.parameters.theta,
            *self._frozen,
            *self._buffers.values(),
            *self._counters.values(),
            *(state[n] for n in sorted(state)),
        )

    def state_tensors(self) -> dict[str, Tensor]:
        """Everything a checkpoint holds, by name, on the CPU.

        `model.*` as in the model's state_dict; `optimizer.<moment>/<parameter>` in the parameter's shape and
        `optimizer.t`: nothing of it depends on the order of the flat vector.
        """
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        for moment, vector in self.optimizer.state_tensors().items():
            if vector.dim() == 0:
                tensors[f"optimizer.{moment}"] = vector
                continue
            for layer in self.parameters.layers:
                part = vector[layer.offset : layer.offset + layer.length]
                tensors[f"optimizer.{moment}/{layer.name}"] = part.view(layer.shape)
        return {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes over what `state_tensors` gave.

        Raises:
            CheckpointError: a checkpoint of another model or optimizer.
        """
        load_model(self.model, tensors)
        state: dict[str, Tensor] = {}
        parts: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            if name.startswith("optimizer."):
                moment, _, layer = name.removeprefix("optimizer.").partition("/")
                if layer:
                    parts.setdefault(moment, {})[layer] = tensor
                else:
                    state[moment] = tensor
        self.optimizer.load_state(state | {moment: self._joined(moment, of) for moment, of in parts.items()})

    def _joined(self, moment: str, parts: Mapping[str, Tensor]) -> Tensor:
        """One vector of the optimizer's state from its parts by parameter."""
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


@torch.no_grad()
def load_model(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copies a checkpoint's model into `model`, in place.

    Raises:
        CheckpointError: a checkpoint of another model; it names the first tensor that differs.
    """
    own, prefix = model.state_dict(), "model."
    given = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    for name in sorted(set(own) | set(given)):
        expected = tuple(own[name].shape) if name in own else None
        got = tuple(given[name].shape) if name in given else None
        if expected != got:
            rule = f"no tensor {name}" if expected is None else f"{name} of shape {expected}"
            found = "none" if got is None else got
            raise CheckpointError(refusal(rule, "shape", found, "checkpoint of another model"))
    for name, tensor in own.items():
        tensor.copy_(given[name])
