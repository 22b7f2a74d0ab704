"""AutoAttack: its standard suite by the package, what is refused, and what is left as it was.

The suite takes seconds whatever the number of images: most tests here shorten it (the fixture `short`). The whole suite
runs once, in `test_standard_suite.py`.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import Any

import pyautoattack
import pytest
import torch
from torch import Tensor, nn

from common.errors import SpecError
from tests.judging.support import request
from tests.method.support import state_of
from worker.data import Dataset
from worker.judging import autoattack
from worker.judging.requests import COMPONENTS
from worker.judging.restarts import left_alone
from worker.judging.verdicts import Verdict

CPU = torch.device("cpu")
SAMPLES = 24


def shortened(suite: Any) -> Any:
    """The suite with a few steps of each attack."""
    for attack, steps in ((suite.apgd, 1), (suite.apgd_targeted, 8)):
        attack.__init__(
            suite.model, n_iter=steps, norm=suite.norm, eps=suite.epsilon, device="cpu", logger=suite.logger
        )
    suite.apgd_targeted.n_target_classes = 3
    suite.fab.n_target_classes, suite.fab.n_iter, suite.square.n_queries = 4, 4, 60
    return suite


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = autoattack._suite
    monkeypatch.setattr(autoattack, "_suite", lambda *arguments: shortened(whole(*arguments)))


def judge(text: str, model: nn.Module, images: Tensor, labels: Tensor, **options: Any) -> Verdict:
    with left_alone(model):
        return autoattack.attack_batch(request(text), model, images, labels, seed=3, device=CPU, **options)


def first(digits: Dataset, samples: int = SAMPLES) -> tuple[Tensor, Tensor]:
    return digits.test.images(torch.arange(samples)), digits.test.labels[:samples]


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("text", ["autoattack,epsilon=0.07", "autoattack,norm=l2,epsilon=0.2"])
def test_attack_after_attack_gives_what_the_package_gives_at_once(
    two_layers: nn.Module, digits: Dataset, text: str
) -> None:
    images, labels = first(digits)
    begun: list[str] = []
    verdict = judge(text, two_layers, images, labels, begins=begun.append)
    asked = request(text)
    norm = {"linf": "Linf", "l2": "L2"}[asked.norm]
    suite = shortened(pyautoattack.AutoAttack(two_layers, norm=norm, eps=asked.epsilon, seed=3, version="standard"))
    theirs, predicted = suite.run_standard_evaluation(images, labels, batch_size=SAMPLES)

    assert list(verdict.predicted) == predicted.tolist()
    assert 0 < sum(verdict.right(labels.tolist())) < SAMPLES
    difference = (theirs - images).flatten(1)
    far = difference.abs().amax(1) if asked.norm == "linf" else difference.norm(dim=1)
    for sample, distance in enumerate(verdict.distance):
        assert distance is None or distance == pytest.approx(far[sample].item(), abs=1e-7)
        assert distance is None or distance <= asked.epsilon + 1e-5
    assert begun == list(COMPONENTS)
    assert len(set(verdict.found_by) & set(COMPONENTS)) >= 2


@pytest.mark.usefixtures("short")
def test_clean_images_that_are_wrong_are_not_attacked(linear: nn.Sequential, digits: Dataset) -> None:
    images, labels = first(digits)
    with torch.no_grad():
        right = (linear(images).argmax(1) == labels).tolist()
    verdict = judge("autoattack,epsilon=0.05", linear, images, labels)
    assert right.count(False) > 0
    assert [stage == "clean" for stage in verdict.found_by] == [not each for each in right]
    assert [verdict.distance[sample] for sample, each in enumerate(right) if not each] == [0.0] * right.count(False)


def test_a_radius_of_zero_needs_no_attack(linear: nn.Sequential, digits: Dataset) -> None:
    images, labels = first(digits)
    verdict = judge("autoattack,epsilon=0", linear, images, labels, begins=lambda stage: pytest.fail(stage))
    with torch.no_grad():
        assert list(verdict.predicted) == linear(images).argmax(1).tolist()


@pytest.mark.usefixtures("short")
def test_random_state_trace_logging_gradients_and_modes_are_left_as_they_were(
    two_layers: nn.Sequential, digits: Dataset
) -> None:
    model = nn.Sequential(*two_layers[:3], nn.BatchNorm1d(48), two_layers[3]).train()
    before, logger = dict(state_of(model)), logging.getLogger("auto-attack")
    torch.manual_seed(11)
    expected = torch.rand(3).tolist()
    torch.manual_seed(11)
    trace = sys.gettrace()

    def ours(*_: object) -> None: ...

    sys.settrace(ours)
    try:
        judge("autoattack,epsilon=0.07", model, *first(digits))
        assert sys.gettrace() is ours
    finally:
        sys.settrace(trace)
    assert torch.rand(3).tolist() == expected
    assert dict(state_of(model)) == before
    assert (logger.handlers, logger.propagate) == ([], True)


def test_the_suite_may_overwrite_logits_that_are_part_of_the_images(
    monkeypatch: pytest.MonkeyPatch, digits: Dataset
) -> None:
    """Square does."""

    class Rows(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images.flatten(1)[:, 20:30]

    class Overwrites:
        def __init__(self, logits: Callable[[Tensor], Tensor]) -> None:
            self.logits = logits

        def run_standard_evaluation(self, images: Tensor, labels: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
            copy = images.clone()
            self.logits(images).fill_(-torch.inf)
            assert torch.equal(images, copy)
            return images, labels

    monkeypatch.setattr(autoattack, "_suite", lambda _, logits, *__: Overwrites(logits))
    judge("autoattack,epsilon=0.05", Rows(), *first(digits, 100))


@pytest.mark.usefixtures("short")
def test_warnings_of_the_package_are_collected(linear: nn.Sequential, digits: Dataset) -> None:
    class Random(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.calls = linear, 0

        def forward(self, images: Tensor) -> Tensor:
            self.calls += 1
            return self.inner(images) + 0.01 * (self.calls % 7) * images.flatten(1)[:, :10]

    class Probabilities(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return linear(images).softmax(1)

    images, labels = first(digits)
    told = judge("autoattack,epsilon=0.05", Random(), images, labels).warnings
    assert any("randomized defense" in text for text in told)
    told = judge("autoattack,epsilon=0.05", Probabilities(), images, labels).warnings
    assert any("probability distribution" in text for text in told)
    assert judge("autoattack,epsilon=0.05", linear, images, labels).warnings == ()


def test_square_is_compared_over_all_samples() -> None:
    course = {"clean": 0.9, "apgd-ce": 0.6, "apgd-t": 0.55, "fab-t": 0.55, "square": 0.5}
    assert "Square Attack has decreased the robust accuracy of 5.00%" in autoattack.warnings_of_the_whole(course)[0]
    assert autoattack.warnings_of_the_whole({**course, "square": 0.549}) == []


def test_fewer_than_ten_classes_are_refused() -> None:
    with pytest.raises(SpecError) as refused:
        autoattack.refuse_unfit(9, request("autoattack"))
    reason = "(the standard suite's APGD-T and FAB-T take 9 target classes each), got classes=9"
    assert f"expected at least 10 classes {reason}" in str(refused.value)
    autoattack.refuse_unfit(10, request("autoattack"))


def test_a_missing_package_is_refused_with_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyautoattack", None)
    with pytest.raises(SpecError, match=r"expected the package pyautoattack \(pip install 'datps\[eval\]'\)"):
        autoattack.refuse_unfit(10, request("autoattack"))


def test_a_package_whose_standard_is_another_one_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Other(pyautoattack.AutoAttack):
        def _set_version(self, version: str = "standard") -> None:
            super()._set_version(version)
            self.square.n_queries = 1000

    monkeypatch.setattr(pyautoattack, "AutoAttack", Other)
    with pytest.raises(SpecError, match="expected a version of pyautoattack with the standard suite"):
        autoattack.refuse_unfit(10, request("autoattack"))
