"""The digits, two models of them, and a module in the working directory that a user might bring."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from common.config import DataSpec
from tests.judging.support import MODULE, nearest_mean
from tests.method.support import generator, randomize
from worker.data import Dataset
from worker.datasets import load_dataset


@pytest.fixture(scope="session")
def digits() -> Dataset:
    return load_dataset(DataSpec(), root=None)


@pytest.fixture(scope="session")
def linear(digits: Dataset) -> nn.Sequential:
    return nearest_mean(digits)


@pytest.fixture(scope="session")
def two_layers(digits: Dataset) -> nn.Sequential:
    """A network with one hidden layer, trained for 80 steps on noisy images: a fifth of a second."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10))
    randomize(model)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    images, labels = digits.train.images(torch.arange(len(digits.train.labels))), digits.train.labels
    for step in range(80):
        noise = torch.randn(images.shape, generator=generator(step)) * 0.3
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images + noise), labels).backward()
        optimizer.step()
    optimizer.zero_grad()
    return model.eval()


@pytest.fixture
def module_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """A module in the working directory, of a name that no other test has imported."""
    name = "judged_" + "".join(c if c.isalnum() else "_" for c in request.node.name)
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    return name
