"""Which numbers of workers and local processes give identical parameters, and which the same but for rounding."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from common.config import JobSpec
from tests.local.support import ATTACK, SMALL, Share, train
from tests.support import checkpoint_of, job
from worker.attacks import GradientSignAttack
from worker.workplace import Workplace

ROUNDS = 3
QUANTIZED = ("codec.bits=8", "codec.two_sided=true", "codec.block=64")
NO_DRAWS = ("codec.name=none", "attack.random_start=false")
"""Without a codec and a random start, the worker's number has no part in any number."""
BATCH_NORM = (*NO_DRAWS, "model.name=resnet8", "attack.name=fgsm")
ROUNDING, BEYOND_ROUNDING = 1e-4, 1e-3
"""Distances of parameters after a few rounds.

One rounding error is 6e-8; LAMB's first rounds take signs of gradients near zero over (its ratio m / v is of size 1 for
any gradient), which blows up the rounding errors of elements that nearly vanish.
"""


def spec_of(workers: int, *settings: str) -> JobSpec:
    return job(f"workers={workers}", "optimizer.learning_rate=0.03", *SMALL, *ATTACK, *settings)


def digests(workers: list[list[Share]]) -> set[bytes]:
    """Of the whole state of all local processes of all workers."""
    return {share.replica_digest for shares in workers for share in shares}


def slices_of(workers: list[list[Share]]) -> list[tuple[int, int]]:
    """Of the local processes of the first worker."""
    return [(team.own.start, team.own.stop) for team in (share.workplace.team for share in workers[0]) if team]


def distance(ours: Share, theirs: Share) -> float:
    """How far two parameter vectors are apart, relative to one."""
    return float((ours.theta - theirs.theta).norm() / theirs.theta.norm())


@pytest.mark.parametrize("sizes", [[2, 2], [1, 3]], ids=["two of two", "one of one, one of three with unequal parts"])
def test_the_same_numbers_of_workers_and_processes_give_identical_parameters_whatever_shards_and_buckets(
    sizes: list[int],
) -> None:
    """Equal (M, q): the sums have the same order, and neither slices nor buckets nor shards are in any formula."""
    first = train(spec_of(2, *QUANTIZED), sizes, ROUNDS)
    again = train(spec_of(2, *QUANTIZED), sizes, ROUNDS)
    recut = train(spec_of(2, *QUANTIZED, "servers=3", "exchange.bucket_bytes=1024"), sizes, ROUNDS)
    assert slices_of(first[1:]) != slices_of(recut[1:])
    assert len(digests(first) | digests(again) | digests(recut)) == 1
    by_round = [[report.parameter_digest for report in share.recording.reports] for share in first[0] + first[1]]
    assert all(each == by_round[0] for each in by_round)
    assert len(set(by_round[0])) == ROUNDS  # every round changed the parameters


@pytest.mark.parametrize("optimizer", ["lamb", "sgd"])
@pytest.mark.parametrize("size", [2, 3])
def test_one_worker_of_q_processes_is_identical_to_q_workers_without_codec_and_random_start(
    optimizer: str, size: int
) -> None:
    """(1, q) with batch qB and (q, 1) with batch B: the same parts, added in the same order, divided by q."""
    settings = (*NO_DRAWS, f"optimizer.name={optimizer}")
    one = train(spec_of(1, *settings, f"data.batch_per_worker={8 * size}"), [size], ROUNDS)
    several = train(spec_of(size, *settings, "data.batch_per_worker=8"), [1] * size, ROUNDS)
    assert len(digests(one) | digests(several)) == 1
    ours, theirs = one[0][0].recording.reports, several[0][0].recording.reports
    assert [report.loss for report in ours] == [report.loss for report in theirs]
    accuracies = [[report.train_accuracy for report in reports] for reports in (ours, theirs)]
    assert accuracies[0] == pytest.approx(accuracies[1])  # a sum over the workers is M times an average


def test_with_batch_norm_too_one_worker_of_two_processes_is_identical_to_two_workers() -> None:
    settings = (*BATCH_NORM, "objective.clean_weight=1")
    one = train(spec_of(1, *settings, "data.batch_per_worker=16"), [2], 2)
    two = train(spec_of(2, *settings, "data.batch_per_worker=8"), [1, 1], 2)
    assert len(digests(one) | digests(two)) == 1


@pytest.mark.parametrize("setting", ["attack.random_start=true", "data.augment=true", "codec.name=randomized"])
def test_with_random_draws_or_a_codec_one_worker_of_two_processes_is_another_training_than_two_workers(
    setting: str,
) -> None:
    """Draws depend on the worker's number, and a codec rounds what a worker sends: two workers' gradients, or one's."""
    settings = (*NO_DRAWS, setting)
    one = train(spec_of(1, *settings, "data.batch_per_worker=16"), [2], ROUNDS)
    two = train(spec_of(2, *settings, "data.batch_per_worker=8"), [1, 1], ROUNDS)
    assert distance(one[0][0], two[0][0]) > BEYOND_ROUNDING


def test_with_batch_norm_a_process_normalizes_by_its_own_part_so_two_processes_are_not_one_with_the_whole_batch() -> (
    None
):
    one, two = (train(spec_of(1, *BATCH_NORM, "data.batch_per_worker=16"), [size], ROUNDS) for size in (1, 2))
    assert distance(one[0][0], two[0][0]) > BEYOND_ROUNDING


def test_several_workers_of_two_processes_are_twice_as_many_workers_but_for_rounding() -> None:
    """(2, 2) with batch 2B and (4, 1) with batch B: sums of sums, batch norm included."""
    two = train(spec_of(2, *BATCH_NORM, "data.batch_per_worker=16"), [2, 2], ROUNDS)
    four = train(spec_of(4, *BATCH_NORM, "data.batch_per_worker=8"), [1] * 4, ROUNDS)
    assert [len(digests(workers)) for workers in (two, four)] == [1, 1]
    assert digests(two) != digests(four)
    assert distance(two[0][0], four[0][0]) < ROUNDING


def test_another_number_of_processes_gives_the_same_parameters_but_for_rounding() -> None:
    """(2, 1), (2, 2), (2, 3) and one worker of each kind: sums of the same gradients in another order."""
    runs = [train(spec_of(2, "codec.name=none"), sizes, ROUNDS) for sizes in ([1, 1], [2, 2], [3, 3], [1, 2])]
    for workers in runs:
        assert len(digests(workers)) == 1
    assert len({min(digests(workers)) for workers in runs}) > 1
    plain = runs[0][0][0]
    start = Workplace.build(plain.workplace.spec, plain.workplace.dataset, torch.device("cpu"), None, None)
    moved = float((plain.theta - start.replica.parameters.theta).norm() / plain.theta.norm())
    assert moved > 1e-2
    for workers in runs[1:]:
        assert distance(workers[0][0], plain) < ROUNDING
        ours, theirs = workers[0][0].recording.reports, plain.recording.reports
        assert [r.train_accuracy for r in ours][:1] == [r.train_accuracy for r in theirs][:1]
        assert [r.loss for r in ours] == pytest.approx([r.loss for r in theirs], rel=1e-4)


def test_a_sample_meets_the_same_random_numbers_whatever_process_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    starts: dict[tuple[float, ...], torch.Tensor] = {}
    seen: list[int] = []
    perturb = GradientSignAttack.perturb

    def recorded(
        self: GradientSignAttack, model: nn.Module, images: torch.Tensor, labels: torch.Tensor, start: torch.Tensor
    ) -> torch.Tensor:
        seen.append(len(images))
        for image, begins in zip(images, start, strict=True):
            key = tuple(image.flatten().tolist())
            assert torch.equal(starts.setdefault(key, begins.clone()), begins)
        return perturb(self, model, images, labels, start)

    monkeypatch.setattr(GradientSignAttack, "perturb", recorded)
    spec = spec_of(2, "codec.name=none", "data.augment=true", "data.batch_per_worker=7")
    train(spec, [1, 1], 1)
    assert len(starts) == 14
    train(spec, [2, 3], 1)
    assert len(starts) == 14  # no sample began elsewhere, or was cropped or flipped otherwise
    assert sorted(seen) == [2, 2, 3, 3, 4, 7, 7]


@pytest.mark.parametrize("codec", ["codec.block=layer", "codec.block=all"])
def test_codecs_whose_scales_span_slices_encode_the_bytes_of_one_process(codec: str) -> None:
    """(1, 2) and (1, 1) push one worker's quantized gradient: the same but where rounding changes a level."""
    settings = ("codec.bits=8", "codec.two_sided=true", codec, "attack.random_start=false")
    one, two = (train(spec_of(1, *settings), [size], ROUNDS) for size in (1, 2))
    assert len(digests(two)) == 1
    assert distance(two[0][0], one[0][0]) < 1e-2
    ours, theirs = two[0][0].recording.reports[0], one[0][0].recording.reports[0]
    assert ours.pulled_bytes > 0
    assert abs(ours.pushed_bytes - theirs.pushed_bytes) < 64  # both say all buckets; headers may differ by some bytes


@pytest.mark.parametrize("codec", ["name=shared", "name=rotated", "name=paper", "name=bf16", "name=fp16"])
def test_codecs_of_every_kind_keep_workers_of_several_processes_equal(codec: str) -> None:
    settings = (f"codec.{codec}", "codec.bits=4", "servers=2", "exchange.bucket_bytes=1024")
    workers = train(spec_of(2, *settings), [2, 1], ROUNDS)
    assert len(digests(workers)) == 1
    assert len(set(slices_of(workers))) == 2


def test_processes_without_a_bucket_of_their_own_only_compute() -> None:
    spec = spec_of(1, *NO_DRAWS, "exchange.bucket_bytes=1000000", "data.batch_per_worker=24")
    one = train(spec, [3], ROUNDS)
    assert slices_of(one) == [(0, 0), (0, 2358), (2358, 2358)]
    assert len(digests(one)) == 1
    cut = train(spec_of(1, *NO_DRAWS, "data.batch_per_worker=24"), [3], ROUNDS)
    assert digests(one) == digests(cut)


def test_a_state_saved_by_two_processes_is_taken_over_by_one_and_the_other_way_round() -> None:
    spec = spec_of(1, "codec.name=none")
    undisturbed = train(spec, [2], 4)[0][0]
    saved = {size: train(spec, [size], 2)[0][-1] for size in (1, 2)}
    assert saved[1].state.keys() == saved[2].state.keys()
    for size, of in saved.items():
        checkpoint = checkpoint_of(spec, of.workplace.dataset, of.state, 2)
        resumed = {other: train(spec, [other], 4, checkpoint)[0] for other in (1, 2)}
        assert all(share.workplace.round == 2 for share in resumed[2])
        assert distance(resumed[1][0], resumed[2][0]) < ROUNDING
        assert (resumed[2][0].replica_digest == undisturbed.replica_digest) is (size == 2)
        unchanged = [train(spec, [other], 2, checkpoint) for other in (1, 2)]
        assert len(digests(unchanged[0]) | digests(unchanged[1]) | {of.replica_digest}) == 1


def test_the_evaluation_is_shared_by_all_processes_and_covers_every_test_sample_once() -> None:
    settings = ("evaluation.every_epochs=1", "evaluation.batch=50", "evaluation.attack.steps=1", "codec.name=none")
    spec = spec_of(2, *settings, "data.batch_per_worker=300")
    workers = train(spec, [2, 1], 3)
    evaluations = [share.recording.evaluations for shares in workers for share in shares]
    assert [round_ for round_, _ in evaluations[0]] == [2]
    assert evaluations[0][0][1].samples == 360
    assert evaluations[0] == evaluations[1] == evaluations[2]
