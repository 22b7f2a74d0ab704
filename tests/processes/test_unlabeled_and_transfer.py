"""Workers with files of their own: unlabeled images that must be the same everywhere, and initial parameters."""

from __future__ import annotations

import json
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from common.config import JobSpec
from ps.outcome import Outcome
from tests.processes.test_worker_in_thread import FAST, TRAINING_S, error_of, image_folder, work
from tests.support import DEADLINE_S, job, running_server
from tests.training.test_trainer import model_for
from worker.checkpoint import find_checkpoint, load_checkpoint
from worker.data import BatchPlan
from worker.datasets import load_dataset
from worker.judging.evaluation import evaluate_model
from worker.labeling import HELD_BACK, pseudo_label
from worker.local.member import build
from worker.local.processes import Order, built
from worker.local_files import sha256_of
from worker.pseudo_labels import load_pseudo_labels, save_pseudo_labels
from worker.randomness import Purpose, round_generator

SMALL = ("model.width=4", "data.batch_per_worker=40", "schedule.epochs=1", *FAST)
MIXED = ("data.labeled=60", "data.unlabeled_fraction=0.5", *SMALL)
FIRST, REST = "data.classes=[0, 1, 2, 3, 4]", "data.classes=[5, 6, 7, 8, 9]"


def train_together(spec: JobSpec, options: list[dict[str, Any]]) -> list[tuple[int, list[dict[str, Any]]]]:
    """Workers of threads, each with options of its own; their exit codes and events."""
    with running_server(spec) as server, ThreadPoolExecutor(len(options)) as pool:
        running = [pool.submit(work, server.address, f"worker-{n}", **own) for n, own in enumerate(options)]
        return [future.result(TRAINING_S) for future in running]


def refused_at_join(spec: JobSpec, options: list[dict[str, Any]]) -> str:
    """Why the one of two workers was refused that was ready later, at which the other was still waiting."""
    with running_server(spec) as server, ThreadPoolExecutor(len(options)) as pool:
        running = [pool.submit(work, server.address, f"worker-{n}", **own) for n, own in enumerate(options)]
        ended = wait(running, TRAINING_S, FIRST_COMPLETED)
        assert len(ended.done) == 1
        server.call(server.server.end, Outcome(exit_code=75, text="the test is over"))
        code, events = ended.done.pop().result()
    assert code == 76, error_of(events)
    return error_of(events)


def train_one(*settings: str, **options: Any) -> tuple[int, list[dict[str, Any]]]:
    return train_together(job("workers=1", *settings), [options])[0]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 60 labeled digits."""
    out = tmp_path_factory.mktemp("teacher") / "run"
    assert train_one("data.labeled=60", *SMALL, "data.batch_per_worker=20", "attack.name=none", out=out)[0] == 0
    return out


@pytest.fixture(scope="module")
def pseudo_labeled(teacher: Path) -> Path:
    """The other digits, labeled by it."""
    file = teacher.parent / "pseudo.safetensors"
    result = pseudo_label(str(teacher), HELD_BACK, file)
    assert result["images"] == 1377
    assert result["parameter_digest"] == json.loads((teacher / "result.json").read_text())["parameter_digest"]
    return file


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of five digits, with batch norm."""
    out = tmp_path_factory.mktemp("pretrained") / "run"
    assert train_one("model.name=resnet8", FIRST, *SMALL, out=out)[0] == 0
    return out


def test_two_workers_divide_labeled_and_unlabeled_images(tmp_path: Path, pseudo_labeled: Path) -> None:
    copy = tmp_path / "copy"  # another file of the same content
    save_pseudo_labels(copy, load_pseudo_labels(pseudo_labeled))
    spec = job("workers=2", *MIXED, "schedule.epochs=2")
    ended = train_together(spec, [{"unlabeled": pseudo_labeled, "out": tmp_path / "run"}, {"unlabeled": copy}])
    assert [code for code, _ in ended] == [0, 0], [error_of(events) for _, events in ended]
    lines = [json.loads(line) for line in (tmp_path / "run" / "rounds.jsonl").read_text().splitlines()]
    assert len(lines) == 2 * (60 // 40)  # an epoch is a pass over the labeled images, 20 of each batch
    checkpoint = load_checkpoint(find_checkpoint(tmp_path / "run"))
    assert checkpoint.unlabeled == f"1377 unlabeled images with xxh3_128 {load_pseudo_labels(pseudo_labeled).digest()}"
    assert evaluate_model(str(tmp_path / "run"))["samples"] == 360  # without the unlabeled images


CONSTANT_SGD = ("optimizer.name=sgd", "optimizer.learning_rate=0.1", "schedule.decay_factor=1", "codec.name=none")
TRADES = ("objective.name=trades", "attack.loss=kl", "attack.steps=2")


def test_trades_on_mixed_batches_is_a_plain_loop_of_its_definition(tmp_path: Path, pseudo_labeled: Path) -> None:
    """Pseudo-labels count as labels, and the divergence is of all images, in the attack and in the update.

    One worker, two passes over 60 labeled digits: 6 rounds. Roundings turn the sign of a few vanishing gradients.
    """
    spec = job("workers=1", *MIXED, *CONSTANT_SGD, *TRADES, "schedule.epochs=2")
    ((code, events),) = train_together(spec, [{"unlabeled": pseudo_labeled, "out": tmp_path}])
    assert code == 0, error_of(events)
    ours = load_file(find_checkpoint(tmp_path) / "state.safetensors")
    dataset, file = load_dataset(spec.data, root=None), load_file(pseudo_labeled)
    images = torch.cat([dataset.train.images(torch.arange(60)), file["images"].float() / 16])
    labels = torch.cat([dataset.train.labels, file["labels"]])
    plan = BatchPlan(
        samples_by_worker=(60,),
        split=spec.data.split,
        batch_per_worker=40,
        workers=1,
        seed=spec.seed,
        unlabeled=1377,
        unlabeled_per_batch=20,
    )

    def plain(*, with_labels: int = 1437, with_divergence: int = 1437) -> tuple[float, list[float]]:
        """How far our parameters are from a loop's that takes terms of the first so many images only; its losses."""
        model, losses, o = model_for(spec, dataset), [], spec.optimizer
        sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=o.momentum, weight_decay=o.weight_decay)
        for round_ in range(6):
            indices = plan.indices(round_, 0)
            x = images[indices]
            draws = round_generator(spec.seed, round_, 0, Purpose.ATTACK)
            z = x + torch.empty_like(x).normal_(0, 0.001, generator=draws)
            for _ in range(2):
                z.requires_grad_()
                divergence = F.kl_div(model(z).log_softmax(1), model(x).softmax(1).detach(), reduction="sum")
                z = z.detach() + 0.1 * torch.autograd.grad(divergence, z)[0].sign()
                z = torch.minimum(torch.maximum(z, x - 0.2), x + 0.2).clamp(0, 1)
            p, q = model(x).softmax(1), model(z).softmax(1)
            entropies = -p[torch.arange(40), labels[indices]].log() * (indices < with_labels)
            divergences = (p * (p / q).log()).sum(1) * (indices < with_divergence)
            loss = entropies.mean() + 6 * divergences.mean()
            sgd.zero_grad()
            loss.backward()
            sgd.step()
            losses.append(loss.item())
        theirs = {name: parameter.detach() for name, parameter in model.named_parameters()}
        off = torch.cat([(ours[f"model.{name}"] - theirs[name]).reshape(-1) for name in theirs])
        return float(off.norm() / torch.cat([each.reshape(-1) for each in theirs.values()]).norm()), losses

    distance, losses = plain()
    lines = [json.loads(line) for line in (tmp_path / "rounds.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines] == pytest.approx(losses, rel=1e-3)
    assert distance < 4e-4
    assert plain(with_labels=60)[0] > 10 * 4e-4
    assert plain(with_divergence=60)[0] > 10 * 4e-4


def relabeled(file: Path, to: Path) -> Path:
    """The same images with another label on one of them."""
    content = load_pseudo_labels(file)
    labels = content.labels.clone()
    labels[7] = (labels[7] + 1) % 10
    tensors = {"images": content.images, "labels": labels}
    save_file(tensors, to, {"layout": "NCHW", "maximum": "16"})
    return to


def test_a_worker_with_other_unlabeled_images_is_refused_at_join(tmp_path: Path, pseudo_labeled: Path) -> None:
    other = relabeled(pseudo_labeled, tmp_path / "other.safetensors")
    said = refused_at_join(job("workers=2", *MIXED), [{"unlabeled": pseudo_labeled}, {"unlabeled": other}])
    assert "expected classes=1x8x8 pixels, 10 classes" in said
    assert "1377 unlabeled images with xxh3_128" in said.partition("got ")[2]


def test_with_data_of_their_own_workers_may_have_unlabeled_images_of_their_own(tmp_path: Path) -> None:
    options = []
    for number in range(2):
        pixels = torch.full((5 + number, 3, 16, 16), 50 * number, dtype=torch.uint8)
        file = tmp_path / f"{number}.safetensors"
        save_file({"images": pixels, "labels": torch.zeros(5 + number, dtype=torch.int64)}, file, {"layout": "NCHW"})
        options.append({"unlabeled": file, "data": image_folder(tmp_path / str(number), 6 + number)})
    keys = ("data.name=imagefolder", "data.split=own", "data.unlabeled_fraction=0.25", "data.batch_per_worker=8")
    ended = train_together(job("workers=2", *SMALL, *keys), options)
    assert [code for code, _ in ended] == [0, 0], [error_of(events) for _, events in ended]


def test_a_resumed_run_keeps_its_unlabeled_images(tmp_path: Path, pseudo_labeled: Path) -> None:
    out, other = tmp_path / "run", relabeled(pseudo_labeled, tmp_path / "other.safetensors")
    assert train_one(*MIXED, unlabeled=pseudo_labeled, out=out)[0] == 0
    code, events = train_one(*MIXED, unlabeled=other, resume=out)
    assert (code, "expected unlabeled data of the checkpoint (1377 unlabeled" in error_of(events)) == (2, True)
    assert train_one(*MIXED, unlabeled=pseudo_labeled, resume=out)[0] == 0


def test_a_worker_takes_the_unlabeled_images_that_the_job_names_and_no_others(
    tmp_path: Path, pseudo_labeled: Path
) -> None:
    """The name changes nothing of the training; a resumed run keeps it, also without its checkpoint's memory."""
    named, other = load_pseudo_labels(pseudo_labeled).digest(), relabeled(pseudo_labeled, tmp_path / "other")
    pinned = (*MIXED, f"data.unlabeled_digest={named}")
    said = f"expected a file with digest {named} (data.unlabeled_digest), "
    said += f"got digest={load_pseudo_labels(other).digest()} ({other})"
    code, events = train_one(*pinned, unlabeled=other)
    assert (code, error_of(events)) == (2, said)
    digests = []
    for settings, out in ((pinned, tmp_path / "named"), (MIXED, tmp_path / "free")):
        assert train_one(*settings, unlabeled=pseudo_labeled, out=out)[0] == 0
        digests.append(json.loads((out / "result.json").read_text())["parameter_digest"])
    assert digests[0] == digests[1]
    code, events = train_one(*pinned, unlabeled=other, resume=tmp_path / "named")
    assert (code, error_of(events)) == (2, said)
    code, events = train_one(*MIXED, unlabeled=pseudo_labeled, resume=tmp_path / "named")
    assert (code, "a resumed run keeps its job" in error_of(events)) == (65, True)
    assert train_one(*pinned, unlabeled=pseudo_labeled, resume=tmp_path / "named")[0] == 0


def test_a_job_with_unlabeled_images_needs_them(pseudo_labeled: Path) -> None:
    code, events = train_one(*MIXED)
    assert (code, "(--unlabeled FILE), got unlabeled=None" in error_of(events)) == (2, True)
    code, events = train_one(*SMALL, unlabeled=pseudo_labeled)
    assert (code, "expected data.unlabeled_fraction above 0" in error_of(events)) == (2, True)


FINE = ("model.name=resnet8", REST, *SMALL, "transfer.init=true")


def test_workers_fine_tune_a_run_on_other_classes(tmp_path: Path, pretrained: Path) -> None:
    own = {"init": pretrained}
    ended = train_together(job("workers=2", *FINE), [{**own, "out": tmp_path / "run"}, own])
    assert [code for code, _ in ended] == [0, 0], [error_of(events) for _, events in ended]
    (said,) = [event for event in ended[0][1] if event["event"] == "initialized"]
    assert said["text"].endswith("54 tensors taken; head drawn anew: 8.weight, 8.bias")
    assert said["sha256"] == sha256_of(find_checkpoint(pretrained) / "state.safetensors")
    assert evaluate_model(str(tmp_path / "run"))["samples"] == 180


def test_frozen_parameters_are_bit_for_bit_those_of_the_file_and_do_not_travel(
    tmp_path: Path, pretrained: Path
) -> None:
    keys = ("transfer.freeze=all-but-head", "optimizer.weight_decay=0.1")
    own = {"init": pretrained}
    spec = job("workers=3", *FINE, *keys, "data.batch_per_worker=20", "codec.name=none")
    ended = train_together(spec, [{**own, "out": tmp_path / "run"}, own, own])
    assert [code for code, _ in ended] == [0, 0, 0], [error_of(events) for _, events in ended]

    before, after = (load_file(find_checkpoint(run) / "state.safetensors") for run in (pretrained, tmp_path / "run"))
    of_model = [name for name in after if name.startswith("model.")]
    changed = [name for name in of_model if not torch.equal(before[name], after[name])]
    assert sorted(changed) == ["model.1.8.bias", "model.1.8.weight"]
    assert {name.partition("/")[2] for name in after if "/" in name} == {"1.8.bias", "1.8.weight"}
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["parameters"] == 5 * 16 + 5
    assert 4 * 85 < result["pushed_bytes_per_round"] < 4 * 85 + 200


def test_a_worker_that_starts_from_other_parameters_is_refused_at_join(tmp_path: Path, pretrained: Path) -> None:
    tensors = load_file(find_checkpoint(pretrained) / "state.safetensors")
    weights = {name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")}
    other = tmp_path / "other.safetensors"
    save_file({**weights, "1.0.weight": weights["1.0.weight"] * 2}, other)
    spec = job("workers=2", *FINE, "transfer.freeze=all-but-head")  # what differs is frozen
    assert "expected replica_digest=" in refused_at_join(spec, [{"init": pretrained}, {"init": other}])


def test_a_job_that_starts_from_a_file_needs_it_and_may_say_which(pretrained: Path) -> None:
    code, events = train_one(*FINE)
    assert (code, "(--init FILE), got init=None" in error_of(events)) == (2, True)
    code, events = train_one(*FINE, f"transfer.sha256={'ab' * 32}", init=pretrained)
    assert (code, f"expected a file with sha256 {'ab' * 32}" in error_of(events)) == (2, True)
    code, events = train_one(*SMALL, init=pretrained)
    assert (code, "expected transfer.init=true with --init" in error_of(events)) == (2, True)


def test_a_resumed_run_goes_on_from_its_checkpoint_and_says_that_it_does(tmp_path: Path, pretrained: Path) -> None:
    out = tmp_path / "run"
    assert train_one(*FINE, init=pretrained, out=out)[0] == 0
    code, events = train_one(*FINE, init=tmp_path / "gone", resume=out)
    assert code == 0
    (said,) = [event["text"] for event in events if event["event"] == "initialized"]
    assert said.endswith(
        f"round-{load_checkpoint(find_checkpoint(out)).round:06d}, not from --init {tmp_path / 'gone'}"
    )


def test_another_architecture_is_refused_by_name(pretrained: Path) -> None:
    code, events = train_one(*SMALL, REST, "transfer.init=true", init=pretrained)
    assert code == 2
    assert "expected every tensor of the model" in error_of(events)
    assert "0.bias missing" in error_of(events)


def test_local_processes_build_what_their_worker_builds(pretrained: Path, pseudo_labeled: Path) -> None:
    fine = job("workers=1", *FINE, "transfer.freeze=[0.weight, '3.*']")
    mixed = job("workers=1", *MIXED)
    for spec, own in ((fine, {"init": str(pretrained)}), (mixed, {"unlabeled": str(pseudo_labeled)})):
        orders = [
            Order(
                job_spec=spec.to_json(),
                devices=("cpu", "cpu"),
                threads=1,
                data=None,
                checkpoint=None,
                saves=False,
                connect_s=DEADLINE_S,
                local_rank=rank,
                **own,
            )
            for rank in range(2)
        ]
        first, second = (build(order) for order in orders)
        assert built(first) == built(second)
        assert first.dataset.unlabeled == second.dataset.unlabeled
        samples = (first.dataset.labeled_samples,)
        drawn = [workplace.plan(samples).indices(0, 0) for workplace in (first, second)]
        assert torch.equal(*drawn)
        assert int((drawn[0] >= samples[0]).sum()) == spec.data.unlabeled_per_batch
