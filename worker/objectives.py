"""The local cost f_i of equation (2), whose gradient is equation (A2)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.config import ObjectiveName, ObjectiveSpec
from worker.smoothing import noisy_copies


@dataclass(frozen=True, kw_only=True)
class LocalCost:
    """The cost of one batch and what is logged about it, without further forward passes or host synchronization."""

    loss: Tensor
    """Scalar with its graph; `loss.backward()` gives g_t^(i) of (A2)."""
    samples: int
    """N, the samples of the batch, or its noisy copies."""
    perturbed_correct: Tensor
    """int64 scalar on the device: correct on perturbed images."""
    clean_correct: Tensor | None
    """int64 scalar on the device: correct on clean images; absent where lambda is 0 and they were not forwarded."""


def local_cost(
    spec: ObjectiveSpec,
    model: nn.Module,
    images_NCHW: Tensor,
    perturbed_NCHW: Tensor,
    labels_N: Tensor,
    *,
    noise_NSCHW: Tensor | None = None,
) -> LocalCost:
    """`adversarial`: lambda * CE(clean) + CE(perturbed); `trades`: CE(clean) + beta * KL(clean || perturbed).

    Each is a mean over the batch. The model runs in the mode it is in; training calls it in train mode. With lambda = 0
    only the perturbed images are forwarded, and batch norm sees only them. Otherwise clean and perturbed images go
    through in one forward pass of 2N: both halves are normalized by the statistics of the mixture, which are also the
    ones recorded, once a round. So training normalizes by what evaluation uses later; two passes would normalize each
    half by its own statistics and record twice.

    Args:
        spec: `clean_weight` is lambda of equation (2), >= 0; `beta` is that of TRADES.
        model: logits [N, K] of images.
        images_NCHW: clean images, float32 in [0, 1].
        perturbed_NCHW: perturbed images, of the same shape; no gradient flows on to the attack.
        labels_N: int64 class numbers.
        noise_NSCHW: S noise samples for each image: everything is a mean over N * S noisy copies, of clean images too,
            and they are what is counted.

    Source: equations (2), (A2). The paper's code has lambda = 1 for PGD and 0 for FGSM; here it is the job spec's.
    TRADES: Zhang et al. 2019; the divergence's gradient flows through both predictions. Their code has two passes, or
    three. Noisy copies: Salman et al. 2019, whose update has the mean of the copies' cross-entropies (their code's
    `train_multi_noise`), where the attack has -log of the mean softmax; the paper does not say.
    """
    trades, weight = spec.name is ObjectiveName.TRADES, spec.clean_weight
    halves = [images_NCHW, perturbed_NCHW] if trades or weight > 0 else [perturbed_NCHW]
    if noise_NSCHW is not None:
        halves = [noisy_copies(half, noise_NSCHW) for half in halves]
        labels_N = labels_N.repeat_interleave(noise_NSCHW.shape[1])
    if len(halves) == 1:
        logits_NK = model(halves[0])
        loss = F.cross_entropy(logits_NK, labels_N)
        return _cost(loss, labels_N, perturbed=logits_NK, clean=None)
    clean_NK, perturbed_NK = model(torch.cat(halves)).chunk(2)
    if trades:
        loss = F.cross_entropy(clean_NK, labels_N) + spec.beta * divergence(clean_NK, perturbed_NK)
    else:
        loss = weight * F.cross_entropy(clean_NK, labels_N) + F.cross_entropy(perturbed_NK, labels_N)
    return _cost(loss, labels_N, perturbed=perturbed_NK, clean=clean_NK)


def divergence(clean_NK: Tensor, perturbed_NK: Tensor) -> Tensor:
    """KL(p || p'), a mean over the batch, of the predictions with logits clean_NK and perturbed_NK.

    Of logarithms of both: with plain probabilities, one that underflows to 0 would give a gradient of 0 / 0.
    """
    clean, perturbed = F.log_softmax(clean_NK, dim=1), F.log_softmax(perturbed_NK, dim=1)
    return F.kl_div(perturbed, clean, reduction="batchmean", log_target=True)


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
