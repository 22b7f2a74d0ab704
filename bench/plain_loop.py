"""The yardstick of `datps bench throughput`: adversarial training as a plain PyTorch loop, written out.

Same model, samples, PGD and update as the worker's, in the same order, and no exchange: with one worker and codec
`none` the average is the gradient, so both must end at the same parameters, bit for bit.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.config import AttackSpec, JobSpec
from worker.data import BatchPlan, Dataset
from worker.optimizers import FlatParameters, make_optimizer
from worker.randomness import Purpose, round_generator
from worker.schedules import Schedule


class PlainLoop:
    """Trains a model on this process alone."""

    def __init__(self, spec: JobSpec, model: nn.Module, dataset: Dataset, plan: BatchPlan) -> None:
        self.model = model.train()
        self._spec, self._dataset, self._plan = spec, dataset, plan
        self._flat = FlatParameters(model)  # so that the update is the very same
        self._optimizer = make_optimizer(spec.optimizer, self._flat)
        rounds = spec.schedule.epochs * plan.rounds_per_epoch
        self._schedule = Schedule.of_job(spec, rounds)
        self._round = 0
        self.loss = 0.0

    def run(self, rounds: int) -> None:
        """Trains for so many rounds."""
        for _ in range(rounds):
            indices = self._plan.indices(self._round, 0)
            images, labels = self._dataset.train.images(indices), self._dataset.train.labels[indices]
            generator = round_generator(self._spec.seed, self._round, 0, Purpose.ATTACK)
            perturbed = pgd(self.model, images, labels, self._spec.attack, generator)
            self._flat.gradient.zero_()
            loss = F.cross_entropy(self.model(perturbed), labels)
            loss.backward()
            rate = self._schedule.learning_rate(self._round)
            self._optimizer.update(self._flat.theta, self._flat.gradient, rate)
            self.loss = loss.item()
            self._round += 1


def pgd(model: nn.Module, images: Tensor, labels: Tensor, spec: AttackSpec, generator: torch.Generator) -> Tensor:
    """PGD in the l-infinity ball, batch norm in eval mode; leaves the model in train mode."""
    model.eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    lower, upper = (images - spec.epsilon).clamp(min=0.0), (images + spec.epsilon).clamp(max=1.0)
    x = images + torch.empty_like(images).uniform_(-spec.epsilon, spec.epsilon, generator=generator)
    x = x.clamp(0.0, 1.0)
    for _ in range(spec.steps):
        x.requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(model(x), labels, reduction="sum"), x)
        x = torch.clamp(x.detach() + spec.resolved_step_size * gradient.sign(), lower, upper)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    model.train()
    return x
