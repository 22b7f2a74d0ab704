"""A model from wherever its user has it; checkpoints are opened in tests/processes/test_worker_in_thread.py."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch
from torch import nn

from common.errors import SpecError
from worker.evaluation import evaluate
from worker.judging.evaluation import evaluate_model
from worker.trained import open_model

MODULE = """
import torch
from torch import nn

class Brightest(nn.Module):
    def forward(self, images):
        return images.flatten(1)[:, :10]

class Unique(Brightest):
    def __deepcopy__(self, memo):
        raise TypeError("a lock of mine")

ready, unique = Brightest(), Unique()
tuned = nn.Sequential(nn.Flatten(), nn.Linear(64, 10).eval())
nn.init.constant_(tuned[1].weight, 2.0)
number = 7

def made():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))

def broken():
    raise KeyError("no weights")
"""


@pytest.fixture
def module_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """A module in the working directory, of a name that no other test has imported."""
    name = "their_model_" + "".join(c if c.isalnum() else "_" for c in request.node.name)
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    return name


def test_a_module_of_somebody_else_is_judged_as_ours_are(module_name: str) -> None:
    opened = open_model(f"{module_name}:ready", settings=["evaluation.attack.steps=2", "attack.epsilon=0.1"])
    report = evaluate_model(f"{module_name}:ready", settings=["evaluation.attack.steps=2", "attack.epsilon=0.1"])

    images = opened.dataset.test.images(torch.arange(360))
    right = (images.flatten(1)[:, :10].argmax(1) == opened.dataset.test.labels).double().mean().item()
    counted = evaluate(opened.module, opened.dataset.test, opened.spec.evaluation_attack, batch=256, seed=0)
    assert report["samples"] == 360
    assert report["clean_accuracy"] == pytest.approx(right, abs=1e-9)
    assert report["robust_accuracy"] == counted.robust_accuracy
    assert report["model"] == f"{module_name}:ready"


def test_a_function_makes_the_model_and_it_is_in_eval_mode(module_name: str) -> None:
    module = open_model(f"{module_name}:made").module
    assert isinstance(module, nn.Sequential)
    assert not module.training


def test_a_module_of_somebody_else_is_left_as_it_was(module_name: str) -> None:
    opened = open_model(f"{module_name}:tuned")
    theirs = importlib.import_module(module_name).tuned
    assert not any(module.training for module in opened.module.modules())
    assert [module.training for module in theirs.modules()] == [True, True, False]
    opened.module[1].weight.data.zero_()
    assert bool((theirs[1].weight == 2.0).all())


def test_a_module_that_cannot_be_copied_is_refused(module_name: str) -> None:
    with pytest.raises(SpecError, match=r"or a function that makes one, got .* a lock of mine"):
        open_model(f"{module_name}:unique")


@pytest.mark.parametrize(
    ("attribute", "reason"),
    [
        ("number", "got model={module}:number (int)"),
        ("absent", "AttributeError"),
        ("broken", "KeyError: 'no weights'"),
    ],
)
def test_what_makes_no_model_is_refused(module_name: str, attribute: str, reason: str) -> None:
    with pytest.raises(SpecError) as refused:
        open_model(f"{module_name}:{attribute}")
    assert str(refused.value).startswith("expected module:attribute, a torch module or a function that makes one")
    assert reason.format(module=module_name) in str(refused.value)


def test_a_module_that_is_not_there_is_refused() -> None:
    with pytest.raises(SpecError, match="ModuleNotFoundError"):
        open_model("nowhere_to_be_found:model")


def test_a_folder_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="a checkpoint, or a run folder with checkpoints"):
        open_model(str(tmp_path))
