"""Batch norm that keeps its statistics: what a frozen batch norm becomes while the rest of a model is trained."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm


class FixedBatchNorm(nn.Module):
    """Normalizes by the running statistics of a batch norm in every mode, as that does in eval mode.

    Parameters, statistics and their names are those of the original, so that a checkpoint fits either.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, original: _BatchNorm) -> None:
        """Takes over what `original`, which has statistics, consists of."""
        super().__init__()
        self.eps = original.eps
        self.weight, self.bias = original.weight, original.bias
        for name, buffer in original.named_buffers():
            self.register_buffer(name, buffer)

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)


def fix_batch_norms(model: nn.Module, frozen: frozenset[str]) -> None:
    """Replaces every batch norm whose parameters are all among `frozen`, by name, in place."""
    for name, module in list(model.named_modules()):
        parameters = {f"{name}.{own}" for own, _ in module.named_parameters(recurse=False)}
        if isinstance(module, _BatchNorm) and module.track_running_stats and parameters and parameters <= frozen:
            parent, _, own_name = name.rpartition(".")
            setattr(model.get_submodule(parent), own_name, FixedBatchNorm(module))


def fixed_statistics(model: nn.Module) -> frozenset[str]:
    """Names of the buffers of all `FixedBatchNorm`."""
    return frozenset(
        f"{name}.{own}"
        for name, module in model.named_modules()
        if isinstance(module, FixedBatchNorm)
        for own, _ in module.named_buffers(recurse=False)
    )
