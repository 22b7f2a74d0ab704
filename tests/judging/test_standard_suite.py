"""AutoAttack's whole standard suite, once: some 10 s on a core, whatever the number of images."""

from __future__ import annotations

import torch
from torch import nn

from tests.judging.support import exactly_robust, request
from worker.data import Dataset
from worker.judging import autoattack
from worker.judging.restarts import attack_batch, left_alone


def test_it_finds_all_that_can_be_found_and_no_less_than_pgd(linear: nn.Sequential, digits: Dataset) -> None:
    images, labels, cpu = digits.test.images(torch.arange(20)), digits.test.labels[:20], torch.device("cpu")
    radius = "epsilon=0.1"
    with left_alone(linear):
        suite = autoattack.attack_batch(request(f"autoattack,{radius}"), linear, images, labels, seed=0, device=cpu)
        pgd = attack_batch(
            request(f"pgd:20,{radius}"), linear, images, labels, indices_N=torch.arange(20), seed=0, device=cpu
        )
    robust = suite.right(labels.tolist())
    assert robust == exactly_robust(linear, images, labels, 0.1)
    assert sum(robust) <= sum(pgd.right(labels.tolist()))
    assert 3 <= sum(robust) <= 15
