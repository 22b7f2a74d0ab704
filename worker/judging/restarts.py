"""PGD and FGSM on one batch, with restarts; and what every attack here does to a model: nothing that stays."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from common.config import AttackNorm
from worker.attacks import make_attack
from worker.evaluation import eval_mode, random_starts
from worker.judging.requests import Request
from worker.judging.verdicts import CLEAN, Verdict


@contextmanager
def left_alone(model: nn.Module) -> Iterator[None]:
    """Eval mode and frozen parameters; on leaving, each module has its own mode and each parameter its flag again."""
    asking = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with eval_mode(model):
        try:
            for parameter in asking:
                parameter.requires_grad_(False)
            yield
        finally:
            for parameter in asking:
                parameter.requires_grad_(True)


def predict(model: nn.Module, images_NCHW: Tensor) -> Tensor:
    """Class numbers, int64 [N] on the device."""
    with torch.no_grad():
        logits_NK: Tensor = model(images_NCHW)
        return logits_NK.argmax(dim=1)


def distances(perturbed_NCHW: Tensor, images_NCHW: Tensor, norm: AttackNorm) -> Tensor:
    """Of each image from its clean one, float32 [N]."""
    difference = (perturbed_NCHW - images_NCHW).flatten(1)
    return difference.abs().amax(dim=1) if norm is AttackNorm.LINF else difference.norm(dim=1)


def attack_batch(
    request: Request,
    model: nn.Module,
    images_NCHW: Tensor,
    labels_N: Tensor,
    *,
    indices_N: Tensor,
    seed: int,
    device: torch.device,
) -> Verdict:
    """The verdict of PGD or FGSM: a sample resists if it is right after every restart.

    Later restarts attack the samples that have resisted so far. The first one starts where `worker.evaluation` does,
    so that RA without restarts is the RA that training reports. The device is waited for between restarts only.

    Args:
        request: of PGD or FGSM.
        model: logits [N, K], `left_alone`.
        images_NCHW: float32 in [0, 1], on the CPU, where the starts are drawn.
        labels_N: int64, on the CPU.
        indices_N: int64, of the samples in the test data: their random starts belong to them.
        seed: the job's.
        device: where the model is.

    Returns:
        In the samples' order; its seconds are 0.
    """
    attack = make_attack(request.spec)
    images, labels = images_NCHW.to(device), labels_N.to(device)
    predicted = labels_N.clone()
    distance: list[float | None] = [None] * len(labels_N)
    found_by: list[str | None] = [None] * len(labels_N)
    left = torch.arange(len(labels_N))
    for restart, stage in enumerate(request.stages):
        starts = random_starts(attack, images_NCHW[left], indices_N[left], seed, restart).to(device)
        there = left.to(device)
        perturbed = attack.perturb(model, images[there], labels[there], starts)
        now = predict(model, perturbed)
        far = distances(perturbed, images[there], request.norm).tolist()
        wrong = (now != labels[there]).cpu()
        predicted[left[wrong]] = now.cpu()[wrong]
        for position in wrong.nonzero().flatten().tolist():
            sample = int(left[position])
            distance[sample], found_by[sample] = far[position], stage
        left = left[~wrong]
        if len(left) == 0:
            break
    return Verdict(predicted=tuple(predicted.tolist()), distance=tuple(distance), found_by=tuple(found_by), seconds=0.0)


def clean_batch(model: nn.Module, images_NCHW: Tensor, labels_N: Tensor, device: torch.device) -> Verdict:
    """The verdict on the clean images, on the CPU as their labels are; its seconds are 0."""
    predicted = predict(model, images_NCHW.to(device)).tolist()
    wrong = [now != label for now, label in zip(predicted, labels_N.tolist(), strict=True)]
    return Verdict(
        predicted=tuple(predicted),
        distance=tuple(0.0 if each else None for each in wrong),
        found_by=tuple(CLEAN if each else None for each in wrong),
        seconds=0.0,
    )
