"""What the comparison with others computes itself: the direct CERTIFY, and when figures agree."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench.agreement import ALPHA, N0, Attacked, Certified, N, certification, direct_radius
from common.config import JobSpec
from deploy.report.paper import RADII
from tests.support import job
from worker.certification import CertificationSettings
from worker.data import Dataset
from worker.datasets import load_dataset
from worker.trained import TrainedModel

SIGMA = 0.25


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load_dataset(JobSpec().data, root=None)


class Always(nn.Module):
    """One answer, whatever the image is."""

    def __init__(self, answer: int) -> None:
        super().__init__()
        self._answer = answer

    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.one_hot(torch.full((len(images),), self._answer), 10).float()


class Brightest(nn.Module):
    """The brightest of ten pixels."""

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)[:, 25:35]


def opened(module: nn.Module, digits: Dataset) -> TrainedModel:
    spec = job(f"smoothing.noise_std={SIGMA}", "attack.norm=l2")
    return TrainedModel(name="m", module=module, spec=spec, dataset=digits, device=torch.device("cpu"), checkpoint=None)


def test_a_constant_answer_has_the_greatest_radius_where_it_is_right(digits: Dataset) -> None:
    settings = CertificationSettings(noise_std=SIGMA, n0=N0, n=N, alpha=ALPHA, seed=0)
    model = opened(Always(3), digits)
    for index, label in enumerate(digits.test.labels[:30].tolist()):
        expected = settings.maximal_radius if label == 3 else -1.0
        assert direct_radius(model, index, SIGMA, seed=0) == pytest.approx(expected)


def test_both_computations_agree_on_a_model_that_noise_confuses(digits: Dataset) -> None:
    found = certification("brightest", opened(Brightest(), digits), limit=40)
    assert found.samples == 40
    assert len(found.ours) == len(found.direct) == len(RADII)
    assert max(abs(a - b) for a, b in zip(found.ours, found.direct, strict=True)) <= 1 / 40


@pytest.mark.parametrize(
    ("figures", "holds"),
    [
        ({}, True),
        ({"foolbox": 0.712}, False),
        ({"foolbox": 0.688}, False),
        ({"fewer": (60, 0.7, 0.701)}, False),
        ({"fewer": None}, True),
    ],
)
def test_when_attacks_agree(figures: dict[str, Any], holds: bool) -> None:
    values: dict[str, Any] = {"clean": 0.9, "ours": 0.7, "foolbox": 0.705, "fewer": (60, 0.7, 0.7)} | figures
    row = Attacked(name="run", samples=360, **values)
    assert row.holds is holds
    assert row.row().endswith("| yes |" if holds else "| NO |")


def test_when_certificates_agree() -> None:
    assert Certified(name="run", samples=360, ours=[0.5, 0.4], direct=[0.492, 0.409]).holds
    assert not Certified(name="run", samples=360, ours=[0.5, 0.4], direct=[0.5, 0.412]).holds
