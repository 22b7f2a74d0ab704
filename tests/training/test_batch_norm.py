"""Batch-norm statistics of several workers, computed anew in NumPy (docs/batch-norm.md)."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from common.config import JobSpec
from tests.support import job
from tests.training.test_trainer import ATTACK, model_for, plan_for, train
from worker.attacks import make_attack
from worker.data import Dataset
from worker.datasets import load_dataset
from worker.randomness import Purpose, round_generator

MOMENTUM = 0.1
"""Of PyTorch's batch norm: how much of a batch's statistics the running ones take over."""
RESNET = ("codec.name=none", "model.name=resnet8", "model.width=4", "data.batch_per_worker=12", *ATTACK)


class Recorded:
    """What goes into each batch norm and comes out of it in train mode, in order of the layers."""

    def __init__(self, model: nn.Module) -> None:
        self.seen: list[tuple[str, nn.BatchNorm2d, np.ndarray, np.ndarray]] = []
        for name, module in model.named_modules():
            if isinstance(module, nn.BatchNorm2d):
                module.register_forward_hook(self._hook(name))

    def _hook(self, name: str) -> object:
        def record(module: nn.BatchNorm2d, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if module.training:
                entry = (name, module, inputs[0].detach().double().numpy(), output.detach().double().numpy())
                self.seen.append(entry)

        return record


def batch_of(spec: JobSpec, dataset: Dataset, model: nn.Module, worker: int) -> Tensor:
    """The perturbed images of one worker's first round."""
    indices = plan_for(spec, dataset).indices(0, worker)
    images, labels = dataset.train.images(indices), dataset.train.labels[indices]
    return make_attack(spec.attack)(model, images, labels, round_generator(spec.seed, 0, worker, Purpose.ATTACK))


def moved(before: np.ndarray, of_batch: np.ndarray) -> np.ndarray:
    return (1 - MOMENTUM) * before + MOMENTUM * of_batch


def statistics_alone(spec: JobSpec, worker: int) -> dict[str, np.ndarray]:
    """What one worker would have after its first round without the others: mean and unbiased variance over N, H, W."""
    dataset = load_dataset(spec.data, root=None)
    model = model_for(spec, dataset).train()
    perturbed = batch_of(spec, dataset, model, worker)
    start = {name: buffer.clone().double().numpy() for name, buffer in model.named_buffers()}
    recorded = Recorded(model)
    model(perturbed)
    statistics = {}
    for name, _, x_NCHW, _ in recorded.seen:
        per_channel = x_NCHW.transpose(1, 0, 2, 3).reshape(x_NCHW.shape[1], -1)
        statistics[f"{name}.running_mean"] = moved(start[f"{name}.running_mean"], per_channel.mean(1))
        statistics[f"{name}.running_var"] = moved(start[f"{name}.running_var"], per_channel.var(1, ddof=1))
    return statistics


def buffers_of(model: nn.Module) -> Iterator[tuple[str, np.ndarray]]:
    for name, buffer in model.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            yield name, buffer.double().numpy()


@pytest.mark.parametrize("attack", ["pgd", "fgsm"])
def test_after_a_round_all_workers_have_the_mean_of_what_each_would_have_had(attack: str) -> None:
    """FGSM attacks in train mode: that its passes leave no trace is part of this."""
    spec = job("workers=3", f"attack.name={attack}", *RESNET)
    replicas = [replica for replica, _ in train(spec, 1)]
    alone = [statistics_alone(spec, worker) for worker in range(3)]
    for replica in replicas:
        found = dict(buffers_of(replica.model))
        assert found.keys() == alone[0].keys()
        for name, ours in found.items():
            expected = np.mean([statistics[name] for statistics in alone], axis=0)
            np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)
            assert np.abs(alone[0][name] - expected).max() > 1e-4  # the workers' own differ
    digests = {replica.parameter_digest() for replica in replicas}
    assert len(digests) == 1


def test_the_mean_is_not_that_of_the_union_batch_whose_variance_knows_how_far_the_means_are_apart() -> None:
    spec = job("workers=3", "attack.name=none", *RESNET)
    dataset = load_dataset(spec.data, root=None)
    model = model_for(spec, dataset).train()
    model(torch.cat([batch_of(spec, dataset, model, worker) for worker in range(3)]))
    union = dict(buffers_of(model))
    alone = [statistics_alone(spec, worker) for worker in range(3)]
    first = next(name for name in union if name.endswith("running_mean"))
    np.testing.assert_allclose(np.mean([s[first] for s in alone], axis=0), union[first], rtol=1e-5, atol=1e-7)
    variance = first.replace("running_mean", "running_var")
    assert np.abs(np.mean([s[variance] for s in alone], axis=0) / union[variance] - 1).max() > 1e-5


def test_training_normalizes_by_the_statistics_of_each_workers_own_batch() -> None:
    spec = job("workers=3", "attack.name=none", *RESNET)
    recorded: list[Recorded] = []
    train(spec, 2, lambda model: recorded.append(Recorded(model)))
    layers = len(recorded[0].seen) // 2
    assert layers > 5
    for worker in recorded:
        assert len(worker.seen) == 2 * layers
        for _, module, x, y in worker.seen[:layers]:  # of the first round, whose gains and shifts are known
            mean, variance = x.mean((0, 2, 3), keepdims=True), x.var((0, 2, 3), keepdims=True)
            np.testing.assert_allclose(y, (x - mean) / np.sqrt(variance + module.eps), rtol=1e-4, atol=1e-5)
    means = [worker.seen[0][2].mean((0, 2, 3)) for worker in recorded]
    assert np.abs(means[0] - means[1]).max() > 1e-3
