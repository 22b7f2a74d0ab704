"""Free replays, TRADES, noisy copies and the epsilon warm-up in whole trainings over real gRPC."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.config import BatchNormMode, JobSpec
from common.wire.v1 import ps_pb2 as wire
from tests.local.support import SMALL, dataset_of
from tests.local.support import train as train_local
from tests.support import checkpoint_of, in_threads, introduce, job, ready, running_servers, silent
from tests.training.test_trainer import Recording, model_for, plan_for, train
from worker.attacks import GradientSignAttack
from worker.exchange.coordination import End
from worker.exchange.ps import ParameterServerExchange
from worker.randomness import Purpose, round_generator, stream_generator
from worker.replays import Replays
from worker.workplace import Workplace

SGD = ("optimizer.name=sgd", "optimizer.learning_rate=0.1", "codec.name=none")
FREE = ("attack.name=fgsm", "attack.epsilon=0.2", "attack.replays=3")
SMOOTH = ("attack.norm=l2", "attack.epsilon=0.5", "attack.steps=2", "smoothing.noise_std=0.25", "smoothing.samples=3")
TRADES = ("objective.name=trades", "attack.loss=kl", "attack.epsilon=0.2", "attack.steps=2")
LocalLoss = Callable[[nn.Module, Tensor, Tensor, int], Tensor]


def plain_sgd(spec: JobSpec, rounds: int, loss_of: LocalLoss, batch_of: Callable[[int], int]) -> nn.Module:
    """One process with torch.optim; `loss_of(model, images, labels, round)` attacks as it likes."""
    dataset = dataset_of(spec)
    model, plan, o = model_for(spec, dataset), plan_for(spec, dataset), spec.optimizer
    sgd = torch.optim.SGD(model.parameters(), lr=o.learning_rate, momentum=o.momentum, weight_decay=o.weight_decay)
    model.train()
    for round_ in range(rounds):
        indices = plan.indices(batch_of(round_), 0)
        loss = loss_of(model, dataset.train.images(indices), dataset.train.labels[indices], round_)
        sgd.zero_grad()
        loss.backward()
        sgd.step()
    return model


def distance(replica_theta: Tensor, model: nn.Module, names: list[str]) -> float:
    parameters = dict(model.named_parameters())
    theirs = torch.cat([parameters[name].detach().reshape(-1) for name in names])
    return float((replica_theta - theirs).norm() / theirs.norm())


# Free replays


@pytest.mark.parametrize("settings", [(), ("model.name=resnet8", "objective.clean_weight=1")])
def test_free_replays_are_a_plain_loop_with_one_backward_pass_a_round(settings: tuple[str, ...]) -> None:
    spec = job("workers=1", *SMALL, *SGD, *FREE, *settings)
    ((replica, _),) = train(spec, 8)
    state: dict[str, Tensor] = {}

    def loss_of(model: nn.Module, images: Tensor, labels: Tensor, round_: int) -> Tensor:
        """The gradient of the round before moves the perturbation, as that round left it."""
        if round_ % 3 == 0:
            generator = round_generator(spec.seed, round_ // 3, 0, Purpose.ATTACK)
            delta = torch.empty_like(images).uniform_(-0.2, 0.2, generator=generator)
        else:
            assert state["x"].grad is not None
            delta = (state["x"] - images).detach() + 0.2 * state["x"].grad.sign()
        x = (images + delta.clamp(-0.2, 0.2)).clamp(0, 1).detach().requires_grad_()
        state["x"] = x
        if not spec.objective.clean_weight:
            return F.cross_entropy(model(x), labels)
        clean, perturbed = model(torch.cat([images, x])).chunk(2)
        return F.cross_entropy(clean, labels) + F.cross_entropy(perturbed, labels)

    plain = plain_sgd(spec, 8, loss_of, lambda round_: round_ // 3)
    names = [layer.name for layer in replica.parameters.layers]
    assert distance(replica.parameters.theta, plain, names) < 1e-5
    means = {name: b for name, b in plain.named_buffers() if name.endswith("running_mean")}
    ours = dict(replica.model.named_buffers())
    assert all(torch.allclose(ours[name], mean, rtol=1e-3, atol=1e-5) for name, mean in means.items())
    fgsm = job("workers=1", *SMALL, *SGD, "attack.name=fgsm", "attack.epsilon=0.2", *settings)
    ((other, _),) = train(fgsm, 8)
    assert distance(other.parameters.theta, plain, names) > 1e-3


@pytest.mark.parametrize("sizes", [[1, 1], [2, 1]], ids=["two processes", "a worker of two processes"])
def test_a_free_training_resumed_between_two_batches_is_identical_to_one_that_went_on(sizes: list[int]) -> None:
    spec = job("workers=2", *SMALL, *FREE, "codec.bits=8", "codec.two_sided=true", "data.augment=true")
    undisturbed = train_local(spec, sizes, 8)
    saved = train_local(spec, sizes, 6)[0][0]
    checkpoint = checkpoint_of(spec, saved.workplace.dataset, saved.state, 6)
    resumed = train_local(spec, sizes, 8, checkpoint)
    digests = {share.replica_digest for workers in (undisturbed, resumed) for shares in workers for share in shares}
    assert len(digests) == 1
    assert digests != {saved.replica_digest}


def test_a_free_worker_of_two_processes_is_identical_to_two_workers() -> None:
    settings = (*SMALL, *FREE, *SGD, "attack.random_start=false")
    one = train_local(job("workers=1", *settings, "data.batch_per_worker=16"), [2], 5)
    two = train_local(job("workers=2", *settings, "data.batch_per_worker=8"), [1, 1], 5)
    assert len({share.replica_digest for shares in [*one, *two] for share in shares}) == 1


def test_a_free_training_is_saved_and_stopped_between_two_batches_only() -> None:
    """Asked in round 2 (from 1), stopped after round 3; an epoch of 7 rounds ends within the batch of rounds 7 to 9."""
    stopped, recording = run_alone(job("workers=1", *FREE, "data.batch_per_worker=200"), stop_at=2)
    assert (stopped, recording.saved) == (False, [3])
    settings = ("schedule.epochs=2", "checkpoint.every_epochs=1", "overfitting.check_every_epochs=0")
    complete, recording = run_alone(job("workers=1", *FREE, "data.batch_per_worker=200", *settings), stop_at=None)
    assert (complete, recording.saved) == (True, [9, 14])


def run_alone(spec: JobSpec, stop_at: int | None) -> tuple[bool, Recording]:
    """One worker to the end, or asked to stop during a round counted from 1."""
    recording = Recording()

    def run() -> bool:
        workplace = Workplace.build(spec, dataset_of(spec), torch.device("cpu"), None, None)
        channel, coordination, _ = introduce(server.address, "worker-0")
        digest, samples = workplace.replica.replica_digest(), len(workplace.dataset.train.labels)
        said = ready(workplace.layout, replica_digest=digest, samples=samples)
        admission = coordination.get_ready(said, 20.0)
        exchange = ParameterServerExchange(
            layout=workplace.layout, spec=spec, admission=admission, first_round=0, emit=silent()
        )
        trainer = workplace.trainer(exchange, admission, recording, lambda: trainer.round + 1 == stop_at)
        complete = trainer.run()
        end = End(ending=wire.ENDING_COMPLETED if complete else wire.ENDING_STOPPED)
        exchange.close(end)
        coordination.leave(end, workplace.replica.replica_digest())
        channel.close()
        return complete

    with running_servers(spec) as (server, *_):
        (complete,) = in_threads([run])
    return complete, recording


def test_nothing_is_kept_after_the_last_replay_of_a_batch() -> None:
    attack = GradientSignAttack(epsilon=0.2, steps=1, step_size=0.2, random_start=False, batch_norm=BatchNormMode.TRAIN)
    replays, model = Replays(2), nn.Flatten()
    images, labels = torch.full((1, 1, 2, 2), 0.5), torch.zeros(1, dtype=torch.int64)
    first = replays.perturb(attack, model, images, labels, images)
    assert torch.equal(first, images)
    first.sum().backward()
    replays.after_backward(attack, 0, images, first)
    second = replays.perturb(attack, model, images, labels, images)
    torch.testing.assert_close(second.detach(), images + 0.2)
    second.sum().backward()
    replays.after_backward(attack, 1, images, second)
    assert torch.equal(replays.perturb(attack, model, images, labels, images), images)
    assert [replays.batch(round_) for round_ in range(5)] == [0, 0, 1, 1, 2]
    assert [replays.between_batches(round_) for round_ in range(4)] == [True, False, True, False]


# TRADES


def test_trades_is_a_plain_loop_of_its_definition() -> None:
    """Roundings turn the sign of a few vanishing gradients of the attack."""
    spec = job("workers=1", *SMALL, *SGD, *TRADES)
    ((replica, recording),) = train(spec, 4)
    losses = []

    def loss_of(model: nn.Module, images: Tensor, labels: Tensor, round_: int) -> Tensor:
        noise = torch.empty_like(images).normal_(
            0, 0.001, generator=round_generator(spec.seed, round_, 0, Purpose.ATTACK)
        )
        x = images + noise
        for _ in range(2):
            x = x.detach().requires_grad_()
            p = torch.softmax(model(images), 1).detach()
            value = F.kl_div(torch.log_softmax(model(x), 1), p, reduction="sum")
            (gradient,) = torch.autograd.grad(value, x)
            x = x.detach() + spec.attack.resolved_step_size * gradient.sign()
            x = torch.minimum(torch.maximum(x, images - 0.2), images + 0.2).clamp(0, 1)
        p = torch.softmax(model(images), 1)
        divergence = F.kl_div(torch.log_softmax(model(x), 1), p, reduction="batchmean")
        loss = F.cross_entropy(model(images), labels) + 6 * divergence
        losses.append(loss.item())
        return loss

    plain = plain_sgd(spec, 4, loss_of, lambda round_: round_)
    names = [layer.name for layer in replica.parameters.layers]
    assert [report.loss for report in recording.reports] == pytest.approx(losses, rel=1e-3)
    assert distance(replica.parameters.theta, plain, names) < 5e-5
    ((other, _),) = train(job("workers=1", *SMALL, *SGD, *TRADES, "objective.beta=3"), 4)
    assert distance(other.parameters.theta, plain, names) > 3e-4


# Noisy copies


def test_smoothadv_is_a_plain_loop_with_the_noise_of_each_sample_in_attack_and_update() -> None:
    spec = job("workers=1", *SMALL, *SGD, *SMOOTH, "data.batch_per_worker=24", "attack.random_start=false")
    ((replica, recording),) = train(spec, 4)
    plan, losses = plan_for(spec, dataset_of(spec)), []

    def loss_of(model: nn.Module, images: Tensor, labels: Tensor, round_: int) -> Tensor:
        noise = []
        for index in plan.indices(round_, 0).tolist():
            draws = stream_generator(spec.seed, Purpose.SMOOTHING, round_, index)
            noise.append(torch.empty(3, *images.shape[1:]).normal_(0, 0.25, generator=draws))
        copies = torch.stack(noise).unbind(1)
        x = images
        for _ in range(2):
            x = x.detach().requires_grad_()
            mean = torch.stack([torch.softmax(model(x + copy_), 1) for copy_ in copies]).mean(0)
            (gradient,) = torch.autograd.grad(-mean.gather(1, labels[:, None]).log().sum(), x)
            offset = x.detach() + 0.625 * gradient / gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
            x = images + torch.renorm(offset.clamp(0, 1) - images, p=2, dim=0, maxnorm=0.5)
        loss = torch.stack([F.cross_entropy(model(x.detach() + copy_), labels) for copy_ in copies]).mean()
        losses.append(loss.item())
        return loss

    plain = plain_sgd(spec, 4, loss_of, lambda round_: round_)
    names = [layer.name for layer in replica.parameters.layers]
    assert [report.loss for report in recording.reports] == pytest.approx(losses, rel=1e-4)
    assert distance(replica.parameters.theta, plain, names) < 1e-5


def test_a_sample_has_the_same_noisy_copies_whoever_computes_them() -> None:
    """Two workers of one process, and one worker of two: the same samples, parts and order of sums."""
    settings = (*SMALL, *SGD, *SMOOTH, "attack.random_start=false")
    one = train_local(job("workers=1", *settings, "data.batch_per_worker=16"), [2], 3)
    two = train_local(job("workers=2", *settings, "data.batch_per_worker=8"), [1, 1], 3)
    assert len({share.replica_digest for shares in [*one, *two] for share in shares}) == 1
    ((alone,),) = train_local(job("workers=1", *settings, "data.batch_per_worker=16"), [1], 3)
    theta = one[0][0].theta
    assert float((alone.theta - theta).norm() / theta.norm()) < 1e-6  # the sums have another order
    ((quiet,),) = train_local(
        job("workers=1", *settings, "data.batch_per_worker=16", "smoothing.noise_std=0.24"), [1], 3
    )
    assert float((quiet.theta - theta).norm() / theta.norm()) > 1e-4


# Warm-up of epsilon


def test_the_attack_of_each_round_has_the_epsilon_of_its_round(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[float, float]] = []
    perturb = GradientSignAttack.perturb

    def recorded(self: GradientSignAttack, *arguments: Tensor) -> Tensor:
        found = perturb(self, *arguments)  # type: ignore[arg-type]
        seen.append((self.epsilon, float((found - arguments[1]).abs().max())))
        return found

    monkeypatch.setattr(GradientSignAttack, "perturb", recorded)
    spec = job(
        "workers=1",
        "model.width=4",
        *SGD,
        "attack.epsilon=0.2",
        "attack.steps=3",
        "schedule.epochs=1",
        "attack.warmup=0.2",
    )
    train(spec, 6)  # of 22
    assert [epsilon for epsilon, _ in seen] == pytest.approx([0.05, 0.1, 0.15, 0.2, 0.2, 0.2])
    assert [reached for _, reached in seen] == pytest.approx([0.05, 0.1, 0.15, 0.2, 0.2, 0.2], abs=1e-6)


# The check for overfitting


def test_the_check_adds_up_all_workers_and_changes_no_parameter() -> None:
    settings = ("workers=2", *SMALL, "attack.name=fgsm", "attack.epsilon=0.2", "data.batch_per_worker=300")
    checked = train_local(job(*settings), [2, 1], 4)
    recordings = [share.recording for shares in checked for share in shares]
    assert [round_ for round_, *_ in recordings[0].checks] == [2, 4]
    assert [check.samples for _, check, *_ in recordings[0].checks] == [600, 600]
    assert all(recording.checks == recordings[0].checks for recording in recordings)
    assert 0 < recordings[0].checks[1][1].pgd_correct <= recordings[0].checks[1][1].attacked_correct
    without = train_local(job(*settings, "overfitting.check_every_epochs=0"), [2, 1], 4)
    assert without[0][0].recording.checks == []
    assert without[0][0].replica_digest == checked[0][0].replica_digest


def test_the_check_of_a_free_training_attacks_with_the_parameters_of_its_round() -> None:
    """An epoch ends with the first replay of a batch, which trains on images that no gradient has moved."""
    settings = ("workers=1", *SMALL, *FREE, "data.batch_per_worker=200", "optimizer.learning_rate=0.05")
    ((share,),) = train_local(job(*settings, "schedule.epochs=4"), [1], 28)
    round_, check, *_ = share.recording.checks[3]
    assert round_ == 28
    assert check.attacked_accuracy < share.recording.reports[27].train_accuracy - 0.1
    assert check.pgd_correct <= check.attacked_correct


def test_overfitting_ends_the_training_of_all_workers_in_the_same_round_with_the_state_saved() -> None:
    """At the ratio 1 any difference is one: FGSM's images are the easier ones after some rounds."""
    settings = ("workers=2", *SMALL, "attack.name=fgsm", "attack.epsilon=0.2", "data.batch_per_worker=100")
    spec = job(*settings, "overfitting.least_ratio=1", "overfitting.stop=true", "optimizer.learning_rate=0.05")
    recordings = [share.recording for shares in train_local(spec, [1, 1], 100) for share in shares]
    *before, (round_, check, overfits, ends) = recordings[0].checks
    assert (overfits, ends, check.pgd_correct < check.attacked_correct) == (True, True, True)
    assert all(not ends for *_, ends in before)
    assert [recording.saved for recording in recordings] == [[round_]] * 2
    assert [len(recording.reports) for recording in recordings] == [round_] * 2
    assert round_ < 100
