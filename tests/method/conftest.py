"""The digits, and a model that has been trained on them a little: it takes two seconds, once."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from common.config import DataSpec, ModelSpec, ObjectiveSpec, OptimizerSpec
from tests.method.support import fgsm, generator
from worker.attacks import make_attack
from worker.data import Dataset
from worker.datasets import load_dataset
from worker.models import build_model
from worker.objectives import local_cost
from worker.optimizers import FlatParameters, make_optimizer


@pytest.fixture(scope="session")
def digits() -> Dataset:
    return load_dataset(DataSpec(), root=None)


@pytest.fixture(scope="session")
def trained_model(digits: Dataset) -> nn.Module:
    """A network of width 8 after 60 rounds of FGSM training with batches of 128, in eval mode."""
    model = build_model(
        ModelSpec(width=8), in_channels=1, image_size=8, classes=10, mean=digits.mean, std=digits.std, seed=0
    )
    parameters = FlatParameters(model)
    optimizer = make_optimizer(OptimizerSpec(), parameters)
    attack = make_attack(fgsm(0.15))
    for round_ in range(60):
        indices = torch.randint(len(digits.train.labels), (128,), generator=generator(round_))
        images, labels = digits.train.images(indices), digits.train.labels[indices]
        perturbed = attack(model, images, labels, generator(round_))
        parameters.zero_gradient()
        local_cost(ObjectiveSpec(), model, images, perturbed, labels).loss.backward()
        optimizer.update(parameters.theta, parameters.gradient, 0.05)
    return model.eval()
