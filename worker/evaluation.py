"""Standard accuracy (TA) and robust accuracy (RA) of a model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from common.config import AttackSpec
from worker.attacks import Attack, make_attack
from worker.data import Samples
from worker.objectives import correct
from worker.randomness import Purpose, stream_generator


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Counts, not rates, so that the parts of several workers add up to the whole."""

    samples: int
    clean_correct: int
    robust_correct: int
    """Correct on the perturbed image, the usual RA: whether the clean image was correct too is not asked."""

    @property
    def clean_accuracy(self) -> float:
        """TA, a fraction; 0 without samples."""
        return self.clean_correct / self.samples if self.samples else 0.0

    @property
    def robust_accuracy(self) -> float:
        """RA, a fraction; 0 without samples."""
        return self.robust_correct / self.samples if self.samples else 0.0

    def __add__(self, other: Evaluation) -> Evaluation:
        return Evaluation(
            samples=self.samples + other.samples,
            clean_correct=self.clean_correct + other.clean_correct,
            robust_correct=self.robust_correct + other.robust_correct,
        )


def evaluate(
    model: nn.Module,
    samples: Samples,
    spec: AttackSpec,
    *,
    batch: int,
    seed: int,
    worker_index: int = 0,
    workers: int = 1,
    device: torch.device | str = "cpu",
) -> Evaluation:
    """Counts what the model gets right, over exactly the samples there are (the last batch is a partial one).

    The samples are cut into batches; of M workers, worker i evaluates batches i, i + M, ... The batches are the same
    whatever M is, so the sum over the workers equals the evaluation by one worker exactly, on like hardware.

    A random start is keyed by (seed, sample index). So the result depends on parameters, samples, attack and seed; on
    `batch` and device only as far as float rounding does when kernels see other shapes.

    Args:
        model: on `device`; runs in eval mode and is put back into its modes, also on an exception.
        samples: all of them, on every worker.
        spec: the evaluation attack; `none` makes RA equal TA.
        batch: images per forward pass.
        seed: the job's.
        worker_index, workers: which share of the batches to evaluate.
        device: where the model is.
    """
    attack = make_attack(spec)
    labels, total = samples.labels, len(samples.labels)
    clean = torch.zeros((), dtype=torch.int64, device=device)
    robust = torch.zeros_like(clean)
    seen = 0
    with eval_mode(model), torch.no_grad():
        for start in range(worker_index * batch, total, workers * batch):
            indices = torch.arange(start, min(start + batch, total))
            images = samples.images(indices)
            starts = random_starts(attack, images, indices, seed).to(device)
            images, targets = images.to(device), labels[indices].to(device)
            clean += correct(model(images), targets)
            robust += correct(model(attack.perturb(model, images, targets, starts)), targets)
            seen += len(indices)
    return Evaluation(samples=seen, clean_correct=int(clean), robust_correct=int(robust))


def random_starts(attack: Attack, images_NCHW: Tensor, indices: Tensor, seed: int, restart: int = 0) -> Tensor:
    """Each sample's start from its own stream, drawn on the CPU: the same on every device and in every batch.

    Restarts are counted from 0, and each has a stream of its own.
    """
    counters = (restart,) if restart else ()
    starts = [
        attack.start(image, stream_generator(seed, Purpose.EVALUATION, index, *counters))
        for image, index in zip(torch.split(images_NCHW, 1), indices.tolist(), strict=True)
    ]
    return torch.cat(starts)


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode for all modules; restores each one's own mode."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
