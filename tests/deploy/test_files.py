"""Files beside the job: unlabeled images and initial parameters, and the commands that make the former."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner, Result

import deploy.train
import worker.daemon
import worker.labeling
from common.config import JobSpec
from deploy import runs
from deploy.cli import app
from deploy.cluster import DatpsCommands
from deploy.supervision import Outcome
from worker.local_files import sha256_of
from worker.pseudo_labels import PseudoLabels, load_pseudo_labels, save_pseudo_labels


def datps(*arguments: str, **variables: str) -> Result:
    return CliRunner().invoke(app, list(arguments), env=variables)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    """The options that workers and the launcher are called with, in a folder of their own."""
    seen: list[Any] = []

    def daemon(options: Any, _emit: Any) -> int:
        seen.append(options)
        return 0

    def launcher(options: Any, _display: Any) -> Outcome:
        seen.append(options)
        return Outcome(exit_code=0, text="complete")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(worker.daemon, "run", daemon)
    monkeypatch.setattr(deploy.train, "train", launcher)
    return seen


def weights(path: Path) -> Path:
    torch.save({"weight": torch.zeros(1)}, path)
    return path


def test_a_worker_gets_its_files_from_flags_and_variables(calls: list[Any]) -> None:
    ended = datps("worker", "--server", "a:1", "--unlabeled", "here", DATPS_INIT="there")
    assert ended.exit_code == 0, ended.output
    assert (calls[0].unlabeled, calls[0].init) == (Path("here"), Path("there"))


def pseudo_labels(path: Path, first_label: int = 0) -> Path:
    images = torch.zeros(2, 1, 8, 8, dtype=torch.uint8)
    save_pseudo_labels(path, PseudoLabels(images=images, labels=torch.tensor([first_label, 1])))
    return path


def test_training_from_a_file_makes_it_part_of_the_job(calls: list[Any], tmp_path: Path) -> None:
    file, labels = weights(tmp_path / "theirs.pth"), pseudo_labels(tmp_path / "pseudo")
    settings = ["--set", "data.unlabeled_fraction=0.25", "--set", "transfer.freeze=all-but-head"]

    ended = datps("train", "--init", "theirs.pth", "--unlabeled", "pseudo", *settings)

    assert ended.exit_code == 0, ended.output
    (options,) = calls
    assert (options.init, options.unlabeled) == (Path("theirs.pth"), Path("pseudo"))
    assert options.spec.transfer.init is True
    assert options.spec.transfer.sha256 == sha256_of(file)
    assert options.spec.transfer.freeze == ("all-but-head",)
    assert options.spec.data.unlabeled_digest == load_pseudo_labels(labels).digest()


def test_a_job_that_names_its_file_is_trained_from_that_one_only(calls: list[Any], tmp_path: Path) -> None:
    file = weights(tmp_path / "theirs.pth")
    (tmp_path / "job.yaml").write_text(f"transfer: {{init: true, sha256: {sha256_of(file)}}}")
    assert datps("train", "--job", "job.yaml", "--init", "theirs.pth").exit_code == 0
    torch.save({"weight": torch.ones(1)}, file)

    ended = datps("train", "--job", "job.yaml", "--init", "theirs.pth", "--out", "second")

    assert (ended.exit_code, len(calls)) == (2, 1)
    assert f"got sha256={sha256_of(file)} (theirs.pth)" in ended.stderr.replace("\n", " ")
    assert not (tmp_path / "second").exists()


def test_a_job_that_names_its_unlabeled_images_is_trained_with_those_only(calls: list[Any], tmp_path: Path) -> None:
    named = load_pseudo_labels(pseudo_labels(tmp_path / "pseudo")).digest()
    (tmp_path / "job.yaml").write_text(f"data: {{unlabeled_fraction: 0.5, unlabeled_digest: {named}}}")
    train = ("train", "--job", "job.yaml", "--unlabeled", "pseudo")
    assert datps(*train).exit_code == 0
    other = load_pseudo_labels(pseudo_labels(tmp_path / "pseudo", first_label=2)).digest()

    ended = datps(*train, "--out", "second")

    assert (ended.exit_code, len(calls)) == (2, 1)
    said = ended.stderr.replace("\n", " ")
    assert f"expected a file with digest {named} (data.unlabeled_digest), got digest={other} (pseudo)" in said
    assert not (tmp_path / "second").exists()


def test_workers_with_data_of_their_own_get_a_file_that_the_job_does_not_name(calls: list[Any], tmp_path: Path) -> None:
    pseudo_labels(tmp_path / "pseudo")
    settings = ("--set", "data.unlabeled_fraction=0.5", "--set", "data.split=own")
    assert datps("train", "--unlabeled", "pseudo", *settings).exit_code == 0
    assert (calls[0].unlabeled, calls[0].spec.data.unlabeled_digest) == (Path("pseudo"), None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "data.unlabeled_fraction=0.5"], "(--unlabeled FILE), got unlabeled=None"),
        (["--unlabeled", "pseudo"], "expected data.unlabeled_fraction above 0 with --unlabeled"),
        (["--unlabeled", "gone", "--set", "data.unlabeled_fraction=0.5"], "a file that exists, got unlabeled=gone"),
        (
            ["--unlabeled", "theirs.pth", "--set", "data.unlabeled_fraction=0.5"],
            "expected a file of pseudo-labeled images",
        ),
        (["--set", "transfer.init=true"], "(--init FILE), got init=None"),
        (["--init", "theirs.pth", "--set", "transfer.init=false"], "expected transfer.init=true with --init"),
        (["--init", "gone.pth"], "expected a file or folder that exists, got init=gone.pth"),
        (["--init", "pseudo"], "expected a run folder, a checkpoint, or a file .pt, .pth, .safetensors, .tar"),
        (["--set", "transfer.head=new"], "expected transfer.init=true (or datps train --init FILE), got head=new"),
    ],
)
def test_files_that_do_not_fit_the_job_are_refused_before_anything_is_made(
    calls: list[Any], tmp_path: Path, arguments: list[str], message: str
) -> None:
    weights(tmp_path / "theirs.pth")
    (tmp_path / "pseudo").touch()
    ended = datps("train", *arguments)
    assert (ended.exit_code, calls) == (2, [])
    assert message in ended.stderr.replace("\n", " ")
    assert not (tmp_path / "runs").exists()


def test_a_resumed_run_needs_no_file_and_may_have_it_for_its_baseline(calls: list[Any], tmp_path: Path) -> None:
    weights(tmp_path / "theirs.pth")
    assert datps("train", "--init", "theirs.pth", "--out", "run").exit_code == 0
    runs.write_job(tmp_path / "run", calls[0].spec, "title")
    (tmp_path / "run/checkpoints/round-000001").mkdir(parents=True)
    assert datps("train", "--resume", "run").exit_code == 0
    assert datps("train", "--resume", "run", "--init", "theirs.pth").exit_code == 0
    assert [options.init for options in calls[1:]] == [None, Path("theirs.pth")]
    assert calls[2].spec == calls[0].spec


def test_a_resumed_run_keeps_the_name_of_its_unlabeled_images(calls: list[Any], tmp_path: Path) -> None:
    """Its workers are given whatever file is said, and compare."""
    pseudo_labels(tmp_path / "pseudo")
    train = ("train", "--unlabeled", "pseudo", "--set", "data.unlabeled_fraction=0.5", "--out", "run")
    assert datps(*train).exit_code == 0
    runs.write_job(tmp_path / "run", calls[0].spec, "title")
    (tmp_path / "run/checkpoints/round-000001").mkdir(parents=True)
    assert datps("train", "--resume", "run", "--unlabeled", "pseudo").exit_code == 0
    assert calls[1].spec == calls[0].spec
    ended = datps("train", "--resume", "run", "--unlabeled", "pseudo", "--set", f"data.unlabeled_digest={'0f' * 16}")
    assert (ended.exit_code, "a resumed run keeps its job" in ended.stderr.replace("\n", " ")) == (2, True)


def test_every_worker_of_a_local_cluster_gets_the_files(tmp_path: Path) -> None:
    common = {"spec": JobSpec(), "folder": tmp_path, "data": None, "device": "cpu", "threads": 1, "resume": False}
    commands = DatpsCommands(**common, unlabeled=Path("pseudo"), init=Path("theirs.pth"))
    for index in range(2):
        command = commands.worker(index=index, server="a:1")
        assert command[command.index("--unlabeled") + 1] == "pseudo"
        assert command[command.index("--init") + 1] == "theirs.pth"
    assert not {"--unlabeled", "--init"} & set(DatpsCommands(**common).worker(index=0, server="a:1"))


def test_pseudo_labels_are_made_with_the_flags_that_evaluate_has(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Any, ...]] = []

    def make(*arguments: Any, **options: Any) -> dict[str, Any]:
        options.pop("progress")(3, 7)
        seen.append((*arguments, options))
        return {"file": "f", "images": 7, "pseudo_label_accuracy": 0.5}

    monkeypatch.setattr(worker.labeling, "pseudo_label", make)
    flags = ["--out", "f", "--data", "d", "--set", "data.labeled=5", "--device", "cuda"]
    people = datps("pseudo-label", "run", "held-back", *flags)
    assert (people.exit_code, "50.0 %" in people.stdout) == (0, True), people.output
    assert json.loads(datps("pseudo-label", "run", "held-back", *flags, "--json").stdout)["images"] == 7
    model, data, out, options = seen[0]
    assert (model, data, out, options["root"], options["device"]) == ("run", "held-back", Path("f"), Path("d"), "cuda")
    assert options["settings"] == ["data.labeled=5"]
    assert options["environment"] is os.environ


def test_a_published_pickle_is_converted_and_a_hostile_one_refused(tmp_path: Path) -> None:
    class Runs:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {tmp_path / 'marker'}",)

    images = np.zeros((3, 4, 4, 3), np.uint8)
    published = {"data": images, "extrapolated_targets": np.array([2, 0, 2])}
    (tmp_path / "good").write_bytes(pickle.dumps(published))
    (tmp_path / "bad").write_bytes(pickle.dumps({**published, "more": Runs()}))

    ended = datps("convert-unlabeled", str(tmp_path / "good"), "--out", str(tmp_path / "made"), "--json")
    assert (ended.exit_code, json.loads(ended.stdout)["by_class"]) == (0, {"0": 1, "2": 2})
    assert load_pseudo_labels(tmp_path / "made").labels.tolist() == [2, 0, 2]
    ended = datps("convert-unlabeled", str(tmp_path / "bad"), "--out", str(tmp_path / "other"))
    assert ended.exit_code == 2
    assert "got content=posix.system" in ended.stderr.replace("\n", " ")
    assert "Traceback" not in ended.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad", "good", "made"]


@pytest.mark.parametrize("command", ["pseudo-label", "convert-unlabeled"])
def test_the_output_must_be_named(command: str) -> None:
    assert datps(command, "a", "b").exit_code == 2
