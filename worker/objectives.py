"""The local cost f_i of equation (2), whose gradient is equation (A2)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.config import ObjectiveSpec


@dataclass(frozen=True, kw_only=True)
class LocalCost:
    """The cost of one batch and what is logged about it, without further forward passes or host synchronization."""

    loss: Tensor
    """Scalar with its graph; `loss.backward()` gives g_t^(i) of (A2)."""
    samples: int
    """N, the samples of the batch."""
    perturbed_correct: Tensor
    """int64 scalar on the device: correct on perturbed images."""
    clean_correct: Tensor | None
    """int64 scalar on the device: correct on clean images; absent where lambda is 0 and they were not forwarded."""


def local_cost(
    spec: ObjectiveSpec, model: nn.Module, images_NCHW: Tensor, perturbed_NCHW: Tensor, labels_N: Tensor
) -> LocalCost:
    """lambda * CE(clean) + CE(perturbed), each a mean over the batch.

    The model runs in the mode it is in; training calls it in train mode. With lambda = 0 only the perturbed images are
    forwarded, and batch norm sees only them. With lambda > 0 clean and perturbed images go through in one forward pass
    of 2N: both halves are normalized by the statistics of the mixture, which are also the ones recorded, once a
    round. So training normalizes by what evaluation uses later; two passes would normalize each half by its own
    statistics and record twice.

    Args:
        spec: `clean_weight` is lambda of equation (2), >= 0.
        model: logits [N, K] of images.
        images_NCHW: clean images, float32 in [0, 1].
        perturbed_NCHW: perturbed images, of the same shape, detached.
        labels_N: int64 class numbers.

    Source: equations (2), (A2). The paper's code has lambda = 1 for PGD and 0 for FGSM; here it is the job spec's.
    """
    weight = spec.clean_weight
    if weight == 0:
        logits_NK = model(perturbed_NCHW)
        loss = F.cross_entropy(logits_NK, labels_N)
        return _cost(loss, labels_N, perturbed=logits_NK, clean=None)
    clean_NK, perturbed_NK = model(torch.cat([images_NCHW, perturbed_NCHW])).chunk(2)
    loss = weight * F.cross_entropy(clean_NK, labels_N) + F.cross_entropy(perturbed_NK, labels_N)
    return _cost(loss, labels_N, perturbed=perturbed_NK, clean=clean_NK)


def correct(logits_NK: Tensor, labels_N: Tensor) -> Tensor:
    """How many samples have their label as the greatest logit: int64 scalar on the device."""
    return (logits_NK.detach().argmax(dim=1) == labels_N).sum()


def _cost(loss: Tensor, labels_N: Tensor, *, perturbed: Tensor, clean: Tensor | None) -> LocalCost:
    return LocalCost(
        loss=loss,
        samples=len(labels_N),
        perturbed_correct=correct(perturbed, labels_N),
        clean_correct=None if clean is None else correct(clean, labels_N),
    )
