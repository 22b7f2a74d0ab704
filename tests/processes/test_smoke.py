"""The smoke form of recipes: what it keeps of them, and that their methods run with real processes and real digits."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from common.config import JobSpec
from common.spec_sources import load_job_spec
from deploy import recipes, runs
from deploy.smoke import shrunk

NAMES = [each.name for each in recipes.all_recipes()]
KEPT = (
    "attack.name",
    "attack.norm",
    "attack.loss",
    "objective",
    "optimizer",
    "codec",
    "exchange",
    "smoothing.noise_std",
    "transfer.init",
)
RUN = ("cifar10-finetune-dat-pgd", "cifar10-semi-dat-fgsm", "cifar10-smooth-dat-012")
"""Those that need more than one training, or more than images; `make smoke` runs all of them."""


def job(name: str) -> JobSpec:
    return load_job_spec(yaml_text=recipes.recipe(name).text, yaml_name=name)


def part(spec: JobSpec, key: str) -> object:
    value: object = spec
    for name in key.split("."):
        value = getattr(value, name)
    return value


@pytest.mark.parametrize("name", NAMES)
def test_the_smoke_form_keeps_the_method(name: str) -> None:
    whole, small = job(name), shrunk(job(name))
    assert [part(small.spec, key) for key in KEPT] == [part(whole, key) for key in KEPT]
    assert small.spec.transfer.init == whole.transfer.init
    assert small.spec.data.unlabeled_fraction == whole.data.unlabeled_fraction
    assert (small.spec.data.name, small.spec.workers) == ("digits", min(whole.workers, 2))
    assert bool(small.spec.data.validation) == bool(whole.data.validation)
    assert small.spec.data.validation <= 100  # of the 700 digits that a half of the classes has
    needs = whole.transfer.init or whole.data.unlabeled_fraction > 0
    assert (small.first is not None) == needs
    if small.first:
        assert not small.first.transfer.init
        assert small.first.data.unlabeled_fraction == 0


def test_the_smoke_form_names_none_of_the_files_that_the_job_names() -> None:
    files = {"data": {"unlabeled_fraction": 0.5, "unlabeled_digest": "0f" * 16}}
    files["transfer"] = {"init": True, "sha256": "0f" * 32}
    small = shrunk(JobSpec.model_validate(files))
    assert (small.spec.data.unlabeled_fraction, small.spec.transfer.init) == (0.5, True)
    assert (small.spec.data.unlabeled_digest, small.spec.transfer.sha256) == (None, None)


@pytest.mark.processes
@pytest.mark.parametrize("name", RUN)
def test_the_smoke_form_runs_from_end_to_end(name: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = [sys.executable, "-m", "deploy.cli", "train", "--recipe", name, "--smoke", "--no-baseline", "--json"]
    ended = subprocess.run([*command, "--out", str(out)], capture_output=True, text=True, timeout=240, check=False)
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-2000:]
    result = json.loads((out / "result.json").read_text())
    lines = [json.loads(line) for line in (out / "rounds.jsonl").read_text().splitlines()]
    assert result["rounds"] == len(lines) > 0
    assert all(math.isfinite(line["loss"]) for line in lines)
    assert runs.read_job(out)[0].attack == shrunk(job(name)).spec.attack
    assert result["best"]["validation_samples"] == 100
