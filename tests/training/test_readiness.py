"""When gradients are ready: the order of backward, and which buckets that completes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from common.layout import BucketKind, TensorSpec, plan_layout
from tests.support import job
from worker.models import build_model
from worker.readiness import BucketReadiness, backward_order, watch_layers


def test_backward_order_is_the_reverse_of_a_chain() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 2))
    order = backward_order(model, torch.zeros(2, 4))
    assert [name.split(".")[0] for name in order] == ["4", "4", "2", "2", "0", "0"]
    assert set(order) == {name for name, _ in model.named_parameters()}


def test_an_unused_parameter_comes_last() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 2))
    model.register_parameter("unused", nn.Parameter(torch.zeros(3)))
    assert backward_order(model, torch.zeros(2, 4))[-1] == "unused"


@pytest.mark.parametrize("name", ["small_cnn", "resnet8", "preact_resnet18"])
def test_trying_leaves_the_model_as_it_was_and_finds_the_order_of_training(name: str) -> None:
    spec = job(f"model.name={name}").model
    shape = {"in_channels": 3, "image_size": 32, "classes": 10, "mean": (0.5,) * 3, "std": (0.2,) * 3, "seed": 0}
    model = build_model(spec, **shape)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    order = backward_order(model, torch.zeros(2, 3, 32, 32))
    assert model.training
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    names, seen = [key for key, _ in model.named_parameters()], []
    end = watch_layers(list(model.parameters()), lambda index: seen.append(names[index]))
    nn.functional.cross_entropy(model(torch.rand(2, 3, 32, 32)), torch.tensor([1, 2])).backward()
    end()
    assert tuple(seen) == order


def test_a_bucket_is_ready_when_the_last_layer_in_it_is() -> None:
    sizes = [300, 8, 0, 512, 2000, 5]
    tensors = [TensorSpec(name=f"p{i}", shape=(size,), buffer=False) for i, size in enumerate(sizes)]
    layout = plan_layout(tensors, job("codec.name=none", "exchange.bucket_bytes=1024"))
    buckets = {bucket.number: bucket for bucket in layout.of_kind(BucketKind.GRADIENT)}
    told: list[int] = []
    readiness = BucketReadiness(layout, told.extend)
    for order in ([0, 1, 2, 3, 4, 5], [5, 3, 4, 0, 2, 1]):
        told.clear()
        readiness.begin()
        final = set()
        for layer in order:
            readiness.layer_done(layer)
            final |= set(range(layout.layer_edges[layer], layout.layer_edges[layer + 1]))
            expected = {n for n, bucket in buckets.items() if final.issuperset(range(bucket.start, bucket.stop))}
            assert set(told) == expected
        assert sorted(told) == sorted(buckets)
        readiness.finish()
        assert len(told) == len(buckets)


def test_what_backward_never_touches_is_ready_when_it_is_over() -> None:
    tensors = [TensorSpec(name="used", shape=(600,), buffer=False), TensorSpec(name="not", shape=(600,), buffer=False)]
    layout = plan_layout(tensors, job("codec.name=none", "exchange.bucket_bytes=1024"))
    told: list[int] = []
    readiness = BucketReadiness(layout, told.extend)
    readiness.begin()
    readiness.layer_done(0)
    assert told == [0, 1]
    readiness.finish()
    assert told == [0, 1, 2, 3, 4]
