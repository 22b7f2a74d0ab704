"""Standard and robust accuracy: over exactly the samples there are, whoever evaluates them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from common.config import AttackName, AttackSpec, JobSpec
from tests.method.support import CLASSES, batch, batch_norm_model, pgd, state_of
from worker.data import Dataset, TensorSamples
from worker.evaluation import Evaluation, evaluate

ATTACK = pgd(0.1, 4, 0.03)


def samples(count: int) -> TensorSamples:
    images, labels = batch(count)
    return TensorSamples((images * 255).to(torch.uint8), labels)


class FailsInside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = batch_norm_model()

    def forward(self, images: Tensor) -> Tensor:  # noqa: ARG002
        raise RuntimeError("forward")


def test_counts_are_those_of_a_plain_loop(trained_model: nn.Module, digits: Dataset) -> None:
    evaluation = evaluate(trained_model, digits.test, pgd(0.1, 5, random_start=False), batch=100, seed=0)
    images, labels = digits.test.images(torch.arange(360)), digits.test.labels
    perturbed = images.clone()
    for _ in range(5):
        perturbed.requires_grad_()
        loss = nn.functional.cross_entropy(trained_model(perturbed), labels, reduction="sum")
        step = torch.autograd.grad(loss, perturbed)[0].sign() * 0.05
        perturbed = ((perturbed + step).detach() - images).clamp(-0.1, 0.1).add(images).clamp(0, 1)
    with torch.no_grad():
        clean = int((trained_model(images).argmax(1) == labels).sum())
        robust = int((trained_model(perturbed).argmax(1) == labels).sum())
    assert (evaluation.samples, evaluation.clean_correct) == (360, clean)
    assert abs(evaluation.robust_correct - robust) <= 1, "a pixel on the edge of the ball may be rounded differently"
    assert robust < clean


@pytest.mark.parametrize("workers", [1, 2, 3, 8])
def test_shares_of_the_workers_add_up_to_the_whole_exactly(
    trained_model: nn.Module, digits: Dataset, workers: int
) -> None:
    whole = evaluate(trained_model, digits.test, ATTACK, batch=64, seed=3)
    shares = [
        evaluate(trained_model, digits.test, ATTACK, batch=64, seed=3, worker_index=index, workers=workers)
        for index in range(workers)
    ]
    total = Evaluation(samples=0, clean_correct=0, robust_correct=0)
    for share in shares:
        total = total + share
    assert total == whole
    assert whole.samples == 360
    assert max(share.samples for share in shares) - min(share.samples for share in shares) <= 64


def test_batch_size_changes_nothing_but_rounding(trained_model: nn.Module, digits: Dataset) -> None:
    by_batch = [evaluate(trained_model, digits.test, ATTACK, batch=size, seed=3) for size in (1000, 37)]
    assert by_batch[0].clean_correct == by_batch[1].clean_correct
    assert by_batch[0].samples == by_batch[1].samples == 360
    assert abs(by_batch[0].robust_correct - by_batch[1].robust_correct) <= 1


def test_random_starts_belong_to_the_samples_and_the_seed() -> None:
    seen: list[Tensor] = []

    class Records(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            seen.append(images.detach().clone())
            return images.flatten(1)[:, :CLASSES] * 0

    grey = TensorSamples(torch.full((10, 1, 6, 6), 128, dtype=torch.uint8), torch.zeros(10))

    def starts(size: int, seed: int) -> Tensor:
        seen.clear()
        evaluate(Records(), grey, pgd(0.1, 1, 1e-9), batch=size, seed=seed)
        return torch.cat(seen[1::3])  # a clean pass, an attack step and a perturbed pass per batch

    assert torch.equal(starts(10, 0), starts(3, 0))
    assert not torch.equal(starts(10, 0), starts(10, 1))
    assert len(torch.unique(starts(10, 0), dim=0)) == 10


def test_modes_gradients_and_buffers_are_left_as_they_were() -> None:
    model = batch_norm_model()
    before = dict(state_of(model))
    evaluate(model, samples(10), ATTACK, batch=4, seed=0)
    assert dict(state_of(model)) == before


def test_modes_are_restored_after_an_exception() -> None:
    model = FailsInside()
    before = dict(state_of(model))
    with pytest.raises(RuntimeError, match="forward"):
        evaluate(model, samples(10), ATTACK, batch=4, seed=0)
    assert dict(state_of(model)) == before


def test_model_runs_in_eval_mode() -> None:
    model = batch_norm_model()
    model[1].running_mean = torch.full((5,), 2.0)
    images, labels = samples(10).images(torch.arange(10)), samples(10).labels
    evaluation = evaluate(model, samples(10), AttackSpec(name=AttackName.NONE), batch=10, seed=0)
    with torch.no_grad():
        expected = int((model.eval()(images).argmax(1) == labels).sum())
    assert evaluation.clean_correct == evaluation.robust_correct == expected


def test_robust_counts_correctness_on_the_perturbed_image_alone() -> None:
    """A model that is wrong on clean images and right on perturbed ones has RA 1 and TA 0."""

    class RightWhenPerturbed(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            perturbed = images.flatten(1).sum(1) > 0.001
            return torch.stack([(~perturbed).float(), perturbed.float()], dim=1) + 0 * images.flatten(1)[:, :1]

    dark = TensorSamples(torch.zeros(6, 1, 2, 2, dtype=torch.uint8), torch.ones(6, dtype=torch.int64))
    evaluation = evaluate(RightWhenPerturbed(), dark, pgd(0.1, 1), batch=4, seed=0)
    assert (evaluation.clean_accuracy, evaluation.robust_accuracy) == (0.0, 1.0)


def test_no_samples_have_accuracy_zero() -> None:
    share = evaluate(batch_norm_model(), samples(4), ATTACK, batch=4, seed=0, worker_index=1, workers=2)
    assert share == Evaluation(samples=0, clean_correct=0, robust_correct=0)
    assert (share.clean_accuracy, share.robust_accuracy) == (0.0, 0.0)


def test_evaluation_attack_of_a_job_is_pgd_20_with_the_training_epsilon() -> None:
    attack = JobSpec().evaluation_attack
    assert (attack.name, attack.steps, attack.epsilon) == (AttackName.PGD, 20, JobSpec().attack.epsilon)
    assert attack.resolved_step_size == pytest.approx(attack.epsilon / 8)
