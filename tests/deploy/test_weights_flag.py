"""Runs with averaged weights: the commands that take a model from one take these, and --weights chooses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import safe_open
from torch import Tensor
from typer.testing import CliRunner, Result

from common.config import TransferSpec
from deploy.cli import app
from tests.local.support import CPU, dataset_of
from tests.support import job
from worker.certificates import model_digest
from worker.checkpoint import save_checkpoint
from worker.pretrained import initial_weights
from worker.record import describe_data
from worker.replica import Replica
from worker.trained import open_model
from worker.workplace import Workplace, model_for

SPEC = job("model.name=resnet8", "model.width=4", "optimizer.ema_decay=0.9", "smoothing.noise_std=0.25")
ORDERS = ("--n0", "10", "--n", "50", "--every", "100", "--limit", "2")


def datps(*arguments: object) -> Result:
    return CliRunner().invoke(app, [*map(str, arguments)])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Replica]:
    """A run folder whose averages are far from its weights."""
    folder, dataset = tmp_path_factory.mktemp("averaged"), dataset_of(SPEC)
    replica = Workplace.build(SPEC, dataset, CPU, None, None).replica
    for seed in range(3):
        replica.parameters.theta.add_(
            torch.randn(len(replica.parameters.theta), generator=torch.Generator().manual_seed(seed))
        )
        replica.parameters.gradient.fill_(0.01)
        replica.model(dataset.train.images(torch.arange(50)))
        replica.update(0.1)
    description = {
        "round": 3,
        "rounds": 3,
        "spec": SPEC.model_dump(mode="json"),
        "data": describe_data(dataset),
        "classes": 10,
        "in_channels": 1,
        "image_size": 8,
        "mean": dataset.mean,
        "std": dataset.std,
    }
    save_checkpoint(folder / "checkpoints", replica.state_tensors(), description, keep=1)
    return folder, replica


def averages(replica: Replica) -> dict[str, Tensor]:
    with replica.judged() as model:
        return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_training_starts_from_the_averages_of_a_run_and_says_so(run: tuple[Path, Replica]) -> None:
    folder, replica = run
    spec, dataset = TransferSpec(init=True), dataset_of(SPEC)
    weights = initial_weights(spec, folder)
    assert weights is not None
    model = model_for(SPEC, dataset)
    told = str(weights.give(model, spec, dataset, 0))

    expected, raw = averages(replica), replica.model.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    assert not torch.equal(expected["1.0.weight"], raw["1.0.weight"])
    assert not torch.equal(expected["1.1.running_mean"], raw["1.1.running_mean"])
    assert told.endswith("tensors taken; weights and statistics averaged over the training (optimizer.ema_decay)")


@pytest.mark.parametrize(
    ("flags", "weights"), [((), "ema"), (("--weights", "ema"), "ema"), (("--weights", "raw"), "raw")]
)
def test_certify_and_pseudo_label_take_the_weights_that_evaluate_takes(
    run: tuple[Path, Replica], flags: tuple[str, ...], weights: str, tmp_path: Path
) -> None:
    folder, _ = run
    opened = open_model(str(folder), weights=weights)

    certified = datps("certify", folder, *flags, *ORDERS, "--out", tmp_path / "rows.tsv", "--json")
    assert certified.exit_code == 0, certified.output
    assert json.loads(certified.stdout)["weights"] == weights
    first = (tmp_path / "rows.tsv").read_text().splitlines()[0]
    assert json.loads(first.removeprefix("# datps certify "))["model_digest"] == model_digest(opened.module)

    labeling = ("--set", "data.labeled=1400", "--out", tmp_path / "labels.safetensors", "--json")
    labeled = datps("pseudo-label", folder, "held-back", *flags, *labeling)
    assert labeled.exit_code == 0, labeled.output
    with safe_open(tmp_path / "labels.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["made_by"])["weights"] == weights
        images, labels = file.get_tensor("images"), file.get_tensor("labels")
    with torch.no_grad():
        assert torch.equal(labels, opened.module(images.float() / 16).argmax(1))


@pytest.mark.parametrize("command", [("certify",), ("pseudo-label",)])
def test_weights_of_another_name_are_refused(run: tuple[Path, Replica], command: tuple[str], tmp_path: Path) -> None:
    rest = () if command == ("certify",) else ("held-back", "--out", tmp_path / "x.safetensors")
    ended = datps(*command, run[0], *rest, "--weights", "best")
    assert ended.exit_code == 2
    assert "expected raw or ema, got weights=best" in ended.output


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("model.input_size=16", "expected model.input_size=None as in the checkpoint, got model.input_size=16"),
        ("model.width=8", "expected model.width=4 as in the checkpoint, got model.width=8"),
    ],
)
def test_another_model_than_the_checkpoints_is_refused_by_what_differs(
    run: tuple[Path, Replica], setting: str, message: str
) -> None:
    ended = datps("evaluate", run[0], "--set", setting)
    assert ended.exit_code == 2
    assert message in ended.output.replace("\n", " ")
