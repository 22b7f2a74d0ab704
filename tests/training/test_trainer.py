"""Whole trainings over real gRPC, compared with plain PyTorch loops that are written out here."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.config import JobSpec
from common.layout import plan_layout
from common.wire.v1 import ps_pb2 as wire
from tests.support import in_threads, introduce, job, ready, running_servers, silent
from worker.attacks import make_attack
from worker.data import BatchPlan, Dataset
from worker.datasets import load_dataset
from worker.evaluation import Evaluation
from worker.exchange.coordination import End
from worker.exchange.ps import ParameterServerExchange
from worker.metrics import RoundMetrics
from worker.models import build_model
from worker.randomness import Purpose, round_generator
from worker.readiness import backward_order
from worker.replica import Replica
from worker.schedules import Schedule
from worker.trainer import RoundReport, Trainer

ATTACK = ("attack.epsilon=0.2", "attack.steps=2", "attack.step_size=0.1")


class Recording:
    """A recorder that keeps what it is told."""

    def __init__(self) -> None:
        self.reports: list[RoundReport] = []
        self.evaluations: list[tuple[int, Evaluation]] = []
        self.saved: list[int] = []
        self.best: list[int] = []

    def round_closed(self, report: RoundReport) -> None:
        self.reports.append(report)

    def evaluated(self, round_: int, evaluation: Evaluation) -> None:
        self.evaluations.append((round_, evaluation))

    def save(self, round_: int) -> None:
        self.saved.append(round_)

    def save_best(self, round_: int) -> None:
        self.best.append(round_)


def model_for(spec: JobSpec, dataset: Dataset) -> nn.Module:
    return build_model(
        spec.model,
        in_channels=dataset.in_channels,
        image_size=dataset.image_size,
        classes=len(dataset.classes),
        mean=dataset.mean,
        std=dataset.std,
        seed=spec.seed,
    )


def plan_for(spec: JobSpec, dataset: Dataset) -> BatchPlan:
    return BatchPlan(
        samples_by_worker=(len(dataset.train.labels),) * spec.workers,
        split=spec.data.split,
        batch_per_worker=spec.data.batch_per_worker,
        workers=spec.workers,
        seed=spec.seed,
    )


def train_one(
    spec: JobSpec, address: str, number: int, rounds: int, prepare: Callable[[nn.Module], object]
) -> tuple[Replica, Recording]:
    """One worker of a thread: joins, trains for a few rounds, leaves."""
    dataset = load_dataset(spec.data, root=None)
    channel, coordination, _ = introduce(address, f"worker-{number}")
    model = model_for(spec, dataset)
    prepare(model)
    order = backward_order(model, dataset.train.images(torch.arange(2)))
    replica = Replica(model, spec.optimizer, order)
    layout = plan_layout(replica.tensors, spec)
    admission = coordination.get_ready(ready(layout, replica_digest=replica.replica_digest()), 20.0)
    exchange = ParameterServerExchange(layout=layout, spec=spec, admission=admission, first_round=0, emit=silent())
    recording = Recording()
    trainer = Trainer(
        spec=spec,
        replica=replica,
        dataset=dataset,
        plan=plan_for(spec, dataset),
        worker_index=admission.worker_index,
        exchange=exchange,
        layout=layout,
        device=torch.device("cpu"),
        recorder=recording,
        stop_requested=lambda: False,
    )
    trainer.rounds = rounds
    trainer.run()
    end = End(ending=wire.ENDING_COMPLETED)
    exchange.close(end)
    coordination.leave(end, replica.replica_digest())
    channel.close()
    return replica, recording


def train(spec: JobSpec, rounds: int, prepare: Callable[[nn.Module], object] = id) -> list[tuple[Replica, Recording]]:
    """All workers of a job in threads, over real servers."""
    with running_servers(spec) as servers:
        address = servers[0].address
        return in_threads([lambda n=n: train_one(spec, address, n, rounds, prepare) for n in range(spec.workers)])


def plain_lamb(
    spec: JobSpec, parameters: list[Tensor], learning_rates: list[float]
) -> Callable[[list[Tensor], int], None]:
    """Algorithm A2, written as a loop over the parameter tensors."""
    o = spec.optimizer
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in parameters]

    @torch.no_grad()
    def update(gradients: list[Tensor], round_: int) -> None:
        t = round_ + 1
        for theta, g, (m, v) in zip(parameters, gradients, moments, strict=True):
            m.lerp_(g, 1 - o.beta1)
            v.mul_(o.beta2).addcmul_(g, g, value=1 - o.beta2)
            u = (v / (1 - o.beta2**t) + o.stability_eps).sqrt()
            u = m / u / (1 - o.beta1**t)
            u = u.add(theta, alpha=o.weight_decay)
            norm, update_norm = piecewise_norm(theta), piecewise_norm(u)
            if norm > 0 and update_norm > 0:
                rate = (norm.clamp(o.trust_low, o.trust_high) / update_norm) * learning_rates[round_]
            else:
                rate = torch.tensor(1.0) * learning_rates[round_]
            theta.sub_(u * rate)

    return update


def piecewise_norm(x: Tensor) -> Tensor:
    """The l2 norm by pieces of 16,384 elements, as the optimizer documents it."""
    return torch.stack([piece.norm() for piece in x.reshape(-1).split(1 << 14)]).norm()


@pytest.mark.parametrize(
    "settings",
    [
        ("optimizer.name=lamb", "optimizer.learning_rate=0.03"),
        ("optimizer.name=sgd", "optimizer.learning_rate=0.1", "objective.clean_weight=1"),
        (
            "optimizer.name=sgd",
            "optimizer.learning_rate=0.1",
            "model.name=resnet8",
            "model.width=4",
            "attack.name=fgsm",
        ),
    ],
    ids=["DAT-PGD with LAMB", "clean and adversarial loss with SGD", "DAT-FGSM on a ResNet with SGD"],
)
def test_one_worker_without_codec_is_bitwise_a_plain_pytorch_loop(settings: tuple[str, ...]) -> None:
    rounds = 8
    spec = job("workers=1", "codec.name=none", "schedule.epochs=2", "schedule.warmup=0.1", *ATTACK, *settings)
    ((replica, recording),) = train(spec, rounds)

    dataset = load_dataset(spec.data, root=None)
    model, plan, attack = model_for(spec, dataset), plan_for(spec, dataset), make_attack(spec.attack)
    total = spec.schedule.epochs * plan.rounds_per_epoch
    schedule = Schedule(spec.schedule, learning_rate=spec.optimizer.learning_rate, rounds=total)
    rates = [schedule.learning_rate(round_) for round_ in range(rounds)]
    parameters = list(model.parameters())
    lamb = plain_lamb(spec, parameters, rates)
    o = spec.optimizer
    sgd = torch.optim.SGD(parameters, lr=1.0, momentum=o.momentum, weight_decay=o.weight_decay)
    model.train()
    losses = []
    for round_ in range(rounds):
        indices = plan.indices(round_, 0)
        images, labels = dataset.train.images(indices), dataset.train.labels[indices]
        perturbed = attack(model, images, labels, round_generator(spec.seed, round_, 0, Purpose.ATTACK))
        model.zero_grad()
        if spec.objective.clean_weight:
            clean_logits, logits = model(torch.cat([images, perturbed])).chunk(2)
            loss = spec.objective.clean_weight * F.cross_entropy(clean_logits, labels) + F.cross_entropy(logits, labels)
        else:
            loss = F.cross_entropy(model(perturbed), labels)
        loss.backward()
        if spec.optimizer.name == "lamb":
            lamb([p.grad for p in parameters], round_)
        else:
            sgd.param_groups[0]["lr"] = rates[round_]
            sgd.step()
        losses.append(loss.item())

    assert [report.loss for report in recording.reports] == losses
    ours, plain = replica.model.state_dict(), model.state_dict()
    assert all(torch.equal(ours[name], plain[name]) for name in plain)


def freeze_batch_norm(model: nn.Module) -> None:
    """Keeps batch norm in eval mode whatever mode the model is put into."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
            module.train = lambda *_, module=module: module  # type: ignore[method-assign]


@pytest.mark.parametrize("model", ["small_cnn", "resnet8"])
def test_four_workers_without_codec_are_one_process_on_the_union_batch(model: str) -> None:
    common = (
        "codec.name=none",
        f"model.name={model}",
        "optimizer.learning_rate=0.03",
        *ATTACK,
        "attack.random_start=false",
    )
    rounds = 3
    four = job("workers=4", "data.batch_per_worker=16", *common)
    replicas = [replica for replica, _ in train(four, rounds, freeze_batch_norm)]
    ((one, _),) = train(job("workers=1", "data.batch_per_worker=64", *common), rounds, freeze_batch_norm)
    assert len({replica.replica_digest() for replica in replicas}) == 1
    ours, union = replicas[0].parameters.theta, one.parameters.theta
    assert float((ours - union).norm() / union.norm()) < 1e-6
    start = build_start(four)
    assert float((ours - start).norm() / start.norm()) > 1e-2  # it has moved: the comparison means something


def build_start(spec: JobSpec) -> Tensor:
    dataset = load_dataset(spec.data, root=None)
    return torch.cat([parameter.detach().reshape(-1) for parameter in model_for(spec, dataset).parameters()])


@pytest.mark.parametrize(
    "codec",
    [
        ("codec.name=none",),
        ("codec.name=fp16", "codec.two_sided=true"),
        ("codec.name=bf16", "codec.two_sided=true"),
        ("codec.bits=8", "codec.two_sided=true"),
        ("codec.bits=4", "codec.two_sided=true", "codec.block=layer"),
        ("codec.bits=2", "codec.scale=l2", "codec.block=64"),
        ("codec.bits=16", "codec.block=all", "codec.two_sided=true"),
        ("codec.name=paper", "codec.two_sided=true"),
    ],
    ids=" ".join,
)
def test_replicas_stay_bitwise_equal_and_a_second_run_gives_the_same_parameters(codec: tuple[str, ...]) -> None:
    settings = ("workers=3", "servers=2", "data.batch_per_worker=8", "model.name=resnet8", "model.width=4")
    spec = job(*settings, "exchange.bucket_bytes=1024", *ATTACK, *codec)
    first, second = train(spec, 3), train(spec, 3)
    digests = {replica.replica_digest() for replica, _ in [*first, *second]}
    assert len(digests) == 1
    by_round = [tuple(report.parameter_digest for report in recording.reports) for _, recording in [*first, *second]]
    assert len(set(by_round)) == 1
    assert len(set(by_round[0])) == 3  # every round changed the parameters


def test_batch_norm_statistics_are_the_average_over_the_workers() -> None:
    spec = job("workers=2", "codec.name=none", "model.name=resnet8", "model.width=4", "attack.name=none")
    (replica, _), _ = train(spec, 1)
    dataset = load_dataset(spec.data, root=None)
    plan = plan_for(spec, dataset)
    means = []
    for worker in range(2):
        model = model_for(spec, dataset).train()
        indices = plan.indices(0, worker)
        model(dataset.train.images(indices))
        means.append({n: b.clone() for n, b in model.named_buffers() if n.endswith(("running_mean", "running_var"))})
    ours = dict(replica.model.named_buffers())
    assert means[0]
    for name in means[0]:
        assert torch.allclose(ours[name], (means[0][name] + means[1][name]) / 2, rtol=1e-6, atol=1e-7)
        assert not torch.equal(means[0][name], means[1][name])


def test_the_evaluation_shared_by_the_workers_covers_every_test_sample_once() -> None:
    settings = ("workers=3", "evaluation.every_epochs=1", "evaluation.batch=50", "evaluation.attack.steps=1")
    spec = job(*settings, "data.batch_per_worker=100", *ATTACK)
    results = train(spec, 5)
    plan = plan_for(spec, load_dataset(spec.data, root=None))
    assert plan.rounds_per_epoch == 4
    evaluations = [recording.evaluations for _, recording in results]
    assert [round_ for round_, _ in evaluations[0]] == [4]
    assert evaluations[0][0][1].samples == 360
    assert evaluations[0] == evaluations[1] == evaluations[2]


def test_a_worker_that_is_asked_to_stop_stops_all_of_them_after_the_same_round() -> None:
    spec = job("workers=2", "data.batch_per_worker=32", *ATTACK)
    asked = iter([False, False, True])

    def run(number: int) -> int:
        dataset = load_dataset(spec.data, root=None)
        channel, coordination, _ = introduce(address, f"worker-{number}")
        replica = Replica(model_for(spec, dataset), spec.optimizer)
        layout = plan_layout(replica.tensors, spec)
        admission = coordination.get_ready(ready(layout, replica_digest=replica.replica_digest()), 20.0)
        exchange = ParameterServerExchange(layout=layout, spec=spec, admission=admission, first_round=0, emit=silent())
        recording = Recording()
        trainer = Trainer(
            spec=spec,
            replica=replica,
            dataset=dataset,
            plan=plan_for(spec, dataset),
            worker_index=admission.worker_index,
            exchange=exchange,
            layout=layout,
            device=torch.device("cpu"),
            recorder=recording,
            stop_requested=(lambda: next(asked)) if number == 1 else (lambda: False),
        )
        assert trainer.run() is False
        assert recording.saved == [3]
        end = End(ending=wire.ENDING_STOPPED)
        exchange.close(end)
        coordination.leave(end, replica.replica_digest())
        channel.close()
        return trainer.round

    with running_servers(spec) as servers:
        address = servers[0].address
        assert in_threads([lambda n=n: run(n) for n in range(2)]) == [3, 3]
        assert servers[0].outcome.result(10).exit_code == 143


def test_metrics_come_back_as_sums_over_the_workers() -> None:
    own = [RoundMetrics(loss=1.5, train_samples=64, train_correct=n, stop=n == 2) for n in (7, 3, 2)]
    average = (np.sum([m.to_vector() for m in own], axis=0, dtype=np.float32) / np.float32(3)).astype(np.float32)
    total = RoundMetrics.from_average(average, 3)
    assert round(total.train_samples) == 192
    assert round(total.train_correct) == 12
    assert total.stop > 0
    assert total.evaluation is None
