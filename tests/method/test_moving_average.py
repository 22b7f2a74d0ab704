"""The average of weights and statistics: PyTorch's, its closed form, in slices, and the model that is judged."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from common.config import OptimizerName, OptimizerSpec
from common.errors import CheckpointError
from tests.local.support import with_groups
from tests.method.support import batch, batch_norm_model, state_of
from worker.local.group import LocalGroup
from worker.models import averaged_buffers
from worker.optimizers import Averages, MovingAverage, Shares
from worker.replica import Replica, has_average, load_model

DECAY = 0.6
"""Reached by (1 + t) / (10 + t) in update 13."""
UPDATES = 20
SGD = OptimizerSpec(name=OptimizerName.SGD, ema_decay=DECAY)


def decay_of(t: int) -> float:
    return min(DECAY, (1 + t) / (10 + t))


def one_round(replica: Replica, round_: int) -> None:
    """A forward and backward pass, which moves the batch-norm statistics too, and the update."""
    images, labels = batch(seed=round_)
    replica.parameters.zero_gradient()
    nn.functional.cross_entropy(replica.model(images), labels).backward()
    replica.update(0.05)


def trained(rounds: int, spec: OptimizerSpec = SGD) -> Replica:
    replica = Replica(batch_norm_model(), spec)
    for round_ in range(rounds):
        one_round(replica, round_)
    return replica


def averaged_by_pytorch(rounds: int) -> nn.Module:
    """The same training, averaged by torch.optim.swa_utils; its first call copies, the others average."""
    replica = Replica(batch_norm_model(), SGD.model_copy(update={"ema_decay": None}))
    updates = iter(range(1, rounds + 1))

    def average(averages: list[Tensor], values: list[Tensor], _count: object) -> None:
        torch._foreach_lerp_(averages, values, 1 - decay_of(t))

    theirs = AveragedModel(replica.model, multi_avg_fn=average)
    theirs.update_parameters(replica.model)
    statistics = {name: buffer.clone() for name, buffer in averaged_buffers(replica.model).items()}
    for round_ in range(rounds):
        one_round(replica, round_)
        t = next(updates)
        theirs.update_parameters(replica.model)
        for name, buffer in averaged_buffers(replica.model).items():
            statistics[name] = decay_of(t) * statistics[name].double() + (1 - decay_of(t)) * buffer.double()
    for name, buffer in averaged_buffers(theirs.module).items():
        buffer.copy_(statistics[name])
    return theirs.module


def test_the_average_is_that_of_pytorch_with_our_decay() -> None:
    replica, theirs = trained(UPDATES), averaged_by_pytorch(UPDATES)
    with replica.judged() as model:
        for ours, reference in zip(model.parameters(), theirs.parameters(), strict=True):
            assert torch.equal(ours, reference)
        for name, buffer in averaged_buffers(model).items():
            torch.testing.assert_close(buffer, dict(theirs.named_buffers())[name], rtol=1e-5, atol=1e-6)


def test_the_average_is_its_closed_form() -> None:
    """The sum over k of (1 - d_k) d_{k+1} ... d_t theta_k, and d_1 ... d_t of the start."""
    random = torch.Generator().manual_seed(3)
    values = torch.randn(UPDATES + 1, 50, generator=random)
    average = MovingAverage(DECAY, values[0], {"mean": values[0, :3]}, Shares.undivided(50))
    for t in range(1, UPDATES + 1):
        average.update(values[t], {"mean": values[t, :3]}, t)
    decays = [1.0, *(decay_of(t) for t in range(1, UPDATES + 1))]
    after = list(accumulate(reversed(decays[1:]), lambda product, decay: product * decay, initial=1.0))[::-1]
    weights = torch.tensor([after[0], *((1 - decays[t]) * after[t] for t in range(1, UPDATES + 1))])
    assert float(weights.sum()) == pytest.approx(1.0)
    expected = (weights.double()[:, None] * values.double()).sum(0)
    torch.testing.assert_close(average.whole().theta.double(), expected, rtol=0, atol=2e-6)
    torch.testing.assert_close(average.whole().buffers["mean"].double(), expected[:3], rtol=0, atol=2e-6)


@pytest.mark.parametrize("edges", [(0, 13, 50), (0, 20, 20, 50)], ids=["two", "three, one slice empty"])
def test_slices_are_averaged_to_the_bits_of_the_whole(edges: tuple[int, ...]) -> None:
    values = torch.randn(UPDATES + 1, 50, generator=torch.Generator().manual_seed(3))
    whole = MovingAverage(DECAY, values[0], {}, Shares.undivided(50))
    for t in range(1, UPDATES + 1):
        whole.update(values[t], {}, t)

    def run(group: LocalGroup, rank: int) -> Tensor:
        average = MovingAverage(DECAY, values[0], {}, Shares(edges=edges, index=rank, gather=group.gather))
        assert average._own.numel() == edges[rank + 1] - edges[rank]
        for t in range(1, UPDATES + 1):
            average.update(values[t], {}, t)
        return average.whole().theta

    for theta in with_groups(len(edges) - 1, run):
        assert torch.equal(theta, whole.whole().theta)


# The model that is judged


def test_the_averaged_model_is_judged_and_training_goes_on_from_its_own_weights() -> None:
    replica = trained(3)
    before = dict(state_of(replica.model))
    images, _ = batch()
    with replica.judged() as model:
        averaged = model(images)
        assert model is replica.model
    with pytest.raises(KeyError, match="in the evaluation"), replica.judged():
        raise KeyError("in the evaluation")
    after = dict(state_of(replica.model))
    counters = {name for name in after if name.endswith("num_batches_tracked")}  # the forward pass above counts
    assert {name: after[name] for name in after.keys() - counters} == {
        name: before[name] for name in before.keys() - counters
    }
    assert not torch.equal(averaged, replica.model(images))


def test_without_averaging_the_model_is_judged_as_it_is() -> None:
    replica = trained(1, SGD.model_copy(update={"ema_decay": None}))
    with replica.judged() as model:
        assert model is replica.model
    assert not has_average(replica.state_tensors())


# Saved and loaded


def test_a_checkpoint_holds_both_models() -> None:
    replica = trained(3)
    tensors = replica.state_tensors()
    raw, averaged = batch_norm_model(seed=7), batch_norm_model(seed=8)
    load_model(raw, tensors)
    load_model(averaged, tensors, averaged=True)
    own = replica.model.state_dict()
    assert all(torch.equal(tensor, own[name]) for name, tensor in raw.state_dict().items())
    with replica.judged() as model:
        judged = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert all(torch.equal(tensor, judged[name]) for name, tensor in averaged.state_dict().items())
    assert not torch.equal(own["0.weight"], judged["0.weight"])
    assert not torch.equal(own["1.running_mean"], judged["1.running_mean"])
    assert torch.equal(own["1.num_batches_tracked"], judged["1.num_batches_tracked"])


def test_a_loaded_replica_goes_on_as_if_there_had_been_no_break_and_the_average_is_part_of_its_digest() -> None:
    whole, first = trained(6), trained(3)
    restored = Replica(batch_norm_model(seed=5), SGD)
    restored.model[5].train(first.model[5].training)
    restored.load_state(first.state_tensors())
    assert restored.replica_digest() == first.replica_digest()
    for round_ in range(3, 6):
        one_round(restored, round_)
    assert restored.replica_digest() == whole.replica_digest()
    average = restored.average
    assert average is not None
    average.load(Averages(theta=average.whole().theta * 2, buffers=average.whole().buffers))
    assert restored.parameter_digest() == whole.parameter_digest()
    assert restored.replica_digest() != whole.replica_digest()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: [t.pop(n) for n in list(t) if n.startswith("ema.")], r"expected average of 1.running_mean of shape"),
        (lambda t: t.pop("ema.0.weight"), r"expected average of 0.weight of shape .*got shape=None"),
        (lambda t: t.update({"ema.0.bias": torch.zeros(6)}), r"expected average of 0.bias of shape \(5,\), got shape="),
        (lambda t: t.update({"ema.1.running_var": torch.zeros(4)}), r"average of 1.running_var of shape \(5,\)"),
    ],
    ids=["no averages", "one missing", "another shape", "statistics of another shape"],
)
def test_averages_that_do_not_fit_are_refused(change: object, message: str) -> None:
    tensors = trained(1).state_tensors()
    change(tensors)  # type: ignore[operator]
    with pytest.raises(CheckpointError, match=message):
        Replica(batch_norm_model(), SGD).load_state(tensors)
