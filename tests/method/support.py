"""Small models and data that the tests of the method share."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from common.config import AttackName, AttackSpec, BatchNormMode

SIDE = 6
CLASSES = 4


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randomize(model: nn.Module, seed: int = 0) -> None:
    """Draws all parameters anew, so that a test does not depend on the global random state."""
    draws = generator(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 1.0, generator=draws)


def batch_norm_model(seed: int = 1) -> nn.Sequential:
    """Logits [N, 4] of images [N, 1, 6, 6], with batch norm and modules in different modes."""
    model = nn.Sequential(
        nn.Conv2d(1, 5, kernel_size=3),
        nn.BatchNorm2d(5),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(5 * (SIDE - 2) ** 2, 7),
        nn.BatchNorm1d(7, affine=False),
        nn.ReLU(),
        nn.Linear(7, CLASSES),
    )
    randomize(model, seed)
    model.train()
    model[5].eval()
    return model


def batch(samples: int = 16, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Images, some pixels of which are exactly 0 or 1, and labels."""
    draws = generator(seed)
    images = (torch.rand(samples, 1, SIDE, SIDE, generator=draws) * 1.4 - 0.2).clamp_(0, 1)
    return images, torch.randint(CLASSES, (samples,), generator=draws)


def pgd(
    epsilon: float = 0.1,
    steps: int = 5,
    step_size: float | None = None,
    *,
    random_start: bool = True,
    batch_norm: BatchNormMode | None = None,
) -> AttackSpec:
    return AttackSpec(
        name=AttackName.PGD,
        epsilon=epsilon,
        steps=steps,
        step_size=step_size,
        random_start=random_start,
        batch_norm=batch_norm,
    )


def fgsm(epsilon: float = 0.1) -> AttackSpec:
    return AttackSpec(name=AttackName.FGSM, epsilon=epsilon)


def state_of(model: nn.Module) -> Iterator[tuple[str, object]]:
    """Everything about a model that an attack or an evaluation must leave as it was."""
    for name, module in model.named_modules():
        yield f"{name}.training", module.training
        yield f"{name}.track_running_stats", getattr(module, "track_running_stats", None)
    for name, parameter in model.named_parameters():
        yield f"{name}.requires_grad", parameter.requires_grad
        yield f"{name}.grad", None if parameter.grad is None else parameter.grad.tolist()
        yield name, parameter.tolist()
    for name, buffer in model.named_buffers():
        yield name, buffer.tolist()
