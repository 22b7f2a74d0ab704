"""One replica of the training state: model, optimizer and the vectors that are exchanged.

All replicas of a job start equal, and stay equal because every update is a function of bytes that all of them decode.
"""

from __future__ import annotations

from collections.abc import Mapping

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
from worker.optimizers import FlatParameters, make_optimizer

METRICS_NAME = "@metrics"


class Replica:
    """Parameters, buffers and optimizer state of one worker."""

    def __init__(self, model: nn.Module, spec: OptimizerSpec) -> None:
        """`model`: on its device; its parameters become views of one flat vector."""
        self.model = model
        self.parameters = FlatParameters(model)
        self.optimizer = make_optimizer(spec, self.parameters)
        self._buffers = averaged_buffers(model)
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

    def gradient_vector(self) -> Float32:
        """The gradient on the host, float32 of shape (d,); on the CPU it is the gradient's own memory."""
        gradient = self.parameters.gradient
        if gradient.device.type == "cpu":
            return gradient.numpy()
        torch.from_numpy(self._gradient).copy_(gradient)
        return self._gradient

    def take_gradient(self, average: Float32) -> Tensor:
        """The average on the model's device, float32 [d]."""
        gradient = self.parameters.gradient
        if gradient.device.type != "cpu":
            gradient.copy_(torch.from_numpy(average))
        return gradient

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
        """XXH3-128 of parameters and averaged buffers: 16 bytes."""
        return self._digest(self.parameters.theta, *self._buffers.values())

    def replica_digest(self) -> bytes:
        """XXH3-128 of parameters, all buffers and optimizer state: what replicas share when they join and leave."""
        state = self.optimizer.state_tensors()
        return self._digest(
            self.parameters.theta, *self._buffers.values(), *self._counters.values(), *(state[n] for n in sorted(state))
        )

    def state_tensors(self) -> dict[str, Tensor]:
        """Everything a checkpoint holds, by name, on the CPU: `model.*` as in the model's state_dict, `optimizer.*`."""
        model = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        optimizer = {f"optimizer.{name}": tensor for name, tensor in self.optimizer.state_tensors().items()}
        return {name: tensor.detach().cpu().contiguous() for name, tensor in (model | optimizer).items()}

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes over what `state_tensors` gave.

        Raises:
            CheckpointError: a checkpoint of another model or optimizer.
        """
        load_model(self.model, tensors)
        prefix = "optimizer."
        self.optimizer.load_state({n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)})

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
