"""A linear classifier of the digits, whose robust samples are known exactly, and a module that a user might bring."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from worker.data import Dataset
from worker.judging.requests import Request, parse_attack, resolve

MODULE = """
import torch
from torch import nn

from tests.judging.support import nearest_mean
from common.config import DataSpec
from worker.datasets import load_dataset

def linear():
    return nearest_mean(load_dataset(DataSpec(), root=None))

class WithBatchNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.norm = linear(), nn.BatchNorm1d(10)

    def forward(self, images):
        return self.norm(self.inner(images))

def any_weights():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))

def four_classes():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 4))

def other_images():
    return nn.Sequential(nn.Flatten(), nn.Linear(3072, 10))

class Detached(nn.Module):
    def forward(self, images):
        return images.detach().flatten(1)[:, :10]

class Fails(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, images):
        if len(images) > 2:
            raise KeyError("no such layer")
        return images.flatten(1)[:, :10] * self.weight
"""


def nearest_mean(digits: Dataset) -> nn.Sequential:
    """Logits that are greatest for the class whose mean image is nearest: linear, without any training."""
    images, labels = digits.train.images(torch.arange(len(digits.train.labels))), digits.train.labels
    means = torch.stack([images[labels == label].flatten(1).mean(0) for label in range(10)])
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    with torch.no_grad():
        model[1].weight.copy_(means)
        model[1].bias.copy_(-means.square().sum(1) / 2)
    return model


def exactly_robust(model: nn.Sequential, images: Tensor, labels: Tensor, epsilon: float) -> list[bool]:
    """Which samples a linear model gets right on every image of [0, 1] within l-infinity distance epsilon.

    For each other class the worst image takes, pixel by pixel, the end of its interval that favours that class.
    """
    flat, weight, bias = images.flatten(1), model[1].weight, model[1].bias
    low, high = (flat - epsilon).clamp(min=0), (flat + epsilon).clamp(max=1)
    robust = []
    with torch.no_grad():
        for sample, label in enumerate(labels.tolist()):
            others = [other for other in range(10) if other != label]
            towards = weight[others] - weight[label]
            worst = torch.where(towards > 0, high[sample], low[sample])
            robust.append(bool(((towards * worst).sum(1) + bias[others] - bias[label] < 0).all()))
    return robust


def request(text: str, *settings: str) -> Request:
    """An attack of a job with settings."""
    from common.spec_sources import load_job_spec

    return resolve(parse_attack(text), load_job_spec(settings=settings))
