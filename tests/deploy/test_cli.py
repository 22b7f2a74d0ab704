"""The `datps` command: what it passes on, what it refuses, and how."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

import deploy.train
import ps.daemon
import worker.daemon
import worker.judging.evaluation
from common.config import JobSpec
from common.errors import CheckpointError, PeerLostError
from common.spec_sources import environment_name, spec_keys
from deploy.cli import RESERVED, app, default_worker_id
from deploy.supervision import Outcome
from deploy.train import TrainOptions, command_to_resume

ROOT = Path(__file__).parents[2]


def datps(*arguments: str, **variables: str) -> Result:
    return CliRunner().invoke(app, list(arguments), env=variables)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    """The options that daemons and the launcher are called with, in a folder of their own."""
    seen: list[Any] = []

    def daemon(options: Any, emit: Any) -> int:
        seen.append(options)
        emit("listening", address="a:1", shard=0, job_id="datps")
        return 0

    def launcher(options: Any, _display: Any) -> Outcome:
        seen.append(options)
        return Outcome(exit_code=0, text="complete")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ps.daemon, "run", daemon)
    monkeypatch.setattr(worker.daemon, "run", daemon)
    monkeypatch.setattr(deploy.train, "train", launcher)
    return seen


def test_help_and_version_need_no_torch() -> None:
    program = (
        "import sys; from deploy.cli import app; app(['--help'], standalone_mode=False);"
        "assert not {'torch', 'grpc', 'numpy'} & set(sys.modules)"
    )
    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)

    assert ended.returncode == 0, ended.stderr
    for command in ("server", "worker", "train", "evaluate", "certify", "recipes"):
        assert command in ended.stdout
    assert datps("--version").stdout == "datps 0.1.0\n"


def test_no_variable_means_both_a_flag_and_a_key() -> None:
    keys = {environment_name(key) for key, _, _ in spec_keys()}

    assert keys & RESERVED == set()
    assert {"DATPS_SERVER", "DATPS_WORKER_ID", "DATPS_SHARD", "DATPS_PORT", "DATPS_DATA", "DATPS_OUT"} <= RESERVED


def test_a_server_gets_its_flags_and_the_job(calls: list[Any], tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text("servers: 2\nseed: 1\ncodec: {bits: 6}\n")
    flags = ["--job", "job.yaml", "--set", "codec.bits=4", "--host", "127.0.0.1", "--shard-addresses", "a:1, b:2"]

    ended = datps("server", *flags, "--json", DATPS_SEED="7", DATPS_CODEC__BITS="5", DATPS_SHARD="1", DATPS_PORT="0")

    assert ended.exit_code == 0, ended.output
    (options,) = calls
    assert (options.shard, options.host, options.port) == (1, "127.0.0.1", 0)
    assert options.shard_addresses == ("a:1", "b:2")
    assert (options.spec.servers, options.spec.seed, options.spec.codec.bits) == (2, 7, 4)
    assert json.loads(ended.stdout)["process"] == "server-1"


def test_a_worker_gets_its_flags_and_needs_no_job(calls: list[Any]) -> None:
    variables = {"DATPS_SERVER": "a:1", "DATPS_OUT": "there", "DATPS_THREADS": "2", "DATPS_CODEC__BITS": "5"}

    ended = datps("worker", "--worker-id", "worker-3", "--data", "images", "--out", "here", **variables)

    assert ended.exit_code == 0, ended.output
    (options,) = calls
    assert (options.server, options.worker_id, options.job_id) == ("a:1", "worker-3", None)
    assert (options.data, options.out, options.resume) == (Path("images"), Path("here"), None)
    assert (options.device, options.threads, options.download) == ("cpu", 2, False)


def test_a_worker_without_a_name_takes_host_and_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "_node 7.local" + "x" * 60)
    monkeypatch.setattr("os.getpid", lambda: 42)

    assert default_worker_id() == "node-7.local" + "x" * 28 + "-42"


def test_training_makes_a_run_folder_for_the_default_recipe(calls: list[Any], tmp_path: Path) -> None:
    ended = datps("train", "--set", "seed=3", "--no-baseline", DATPS_DEVICE="cuda")

    assert ended.exit_code == 0, ended.output
    (options,) = calls
    assert (options.title, options.spec.seed, options.spec.attack.epsilon) == ("digits-dat-pgd", 3, 0.2)
    assert (options.device, options.baseline, options.resume) == ("cuda", False, False)
    assert options.folder.name.startswith("digits-dat-pgd-")
    assert (tmp_path / "runs/latest").resolve() == tmp_path / options.folder


def test_a_job_file_names_the_run(calls: list[Any], tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("seed: 9")

    ended = datps("train", "--job", "mine.yaml", "--out", "here", DATPS_RECIPE="digits-dat-fgsm")

    assert ended.exit_code == 0, ended.output
    (options,) = calls
    assert (options.title, options.spec, options.folder) == ("mine", JobSpec(seed=9), Path("here"))


def test_a_recipe_flag_wins_over_a_job_variable(calls: list[Any]) -> None:
    ended = datps("train", "--recipe", "digits-dat-fgsm", DATPS_JOB="elsewhere.yaml")

    assert ended.exit_code == 0, ended.output
    assert calls[0].title == "digits-dat-fgsm"


def test_resuming_reads_the_folder_that_a_link_points_to(calls: list[Any]) -> None:
    assert datps("train", "--set", "seed=4").exit_code == 0
    folder = calls[0].folder
    deploy.train.runs.write_job(folder, calls[0].spec, calls[0].title)
    (folder / "checkpoints/round-000001").mkdir(parents=True)

    ended = datps("train", "--resume", "runs/latest", DATPS_OUT="elsewhere")

    assert ended.exit_code == 0, ended.output
    options = calls[1]
    assert (options.folder, options.title, options.spec.seed, options.resume) == (folder, "digits-dat-pgd", 4, True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--recipe", "digits"], "expected a known recipe; did you mean digits-dat-"),
        (
            ["train", "--set", "codec.bitz=4"],
            "expected a known key; did you mean codec.bits?, got key=codec.bitz (--set)",
        ),
        (["train", "--set", "codec.bits=9"], "expected 2 to 8, or 16, got bits=9 (codec.bits, --set)"),
        (["train", "--set", "seed"], "expected dotted.key=value, got "),
        (
            ["train", "--job", "a", "--recipe", "b"],
            "expected --job or --recipe, got flags=--job and --recipe (they exclude",
        ),
        (
            ["train", "--resume", "a", "--out", "b"],
            "expected --resume or --out, got flags=--resume and --out (they exclude",
        ),
        (["train", "--resume", "nowhere"], "expected a run folder with job.yaml, got resume="),
        (["train", "--job", "nowhere.yaml"], "expected a YAML file that can be read, got job=nowhere.yaml"),
        (["train", "--job", "."], "expected a YAML file that can be read, got job=."),
        (["server", "--shard", "1"], "expected shard from 0 to 0 (servers=1), got shard=1"),
        (["server", "--set", "servers=2"], "expected 2 shard addresses (servers=2), got shard_addresses=0"),
        (["recipes", "show", "x"], "expected a known recipe; did you mean"),
        (["recipes", "keys", "codec.x"], "expected the beginning of a key, got prefix=codec.x"),
        (
            ["worker", "--server", "a:1", "--device", "abacus"],
            "expected a device that torch has here, got device=abacus",
        ),
    ],
)
def test_a_users_mistake_is_refused_in_words(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ended = datps(*arguments)

    said = ended.stderr if arguments[0] != "worker" else json.loads(ended.stdout)["text"]
    assert ended.exit_code == 2
    assert message in said.replace("\n", " ")
    assert arguments[0] == "worker" or said.startswith("error: ")
    assert "Traceback" not in ended.output
    assert not (tmp_path / "runs").exists()


def test_an_unknown_variable_is_refused_with_the_nearest_one() -> None:
    ended = datps("server", DATPS_CODEC__BIT="4")

    assert ended.exit_code == 2
    expected = "expected a known variable; did you mean DATPS_CODEC__BITS?, got variable=DATPS_CODEC__BIT (environment)"
    assert expected in ended.stderr.replace("\n", " ")


@pytest.mark.parametrize("arguments", [["train", "--bogus"], ["server", "--port", "70000"], ["worker"], ["nonsense"]])
def test_wrong_usage_exits_with_2(arguments: list[str]) -> None:
    assert datps(*arguments).exit_code == 2


def test_with_json_an_error_is_an_object_on_standard_output() -> None:
    ended = datps("train", "--set", "seed=x", "--json")

    error = json.loads(ended.stdout)
    assert (error["event"], error["exit_code"], ended.exit_code, ended.stderr) == ("error", 2, 2, "")
    assert error["text"].endswith("got seed=x (--set)")


@pytest.mark.parametrize(("error", "exit_code"), [(PeerLostError("gone"), 75), (CheckpointError("cut off"), 65)])
def test_an_error_has_its_own_exit_code(
    error: Exception, exit_code: int, monkeypatch: pytest.MonkeyPatch, calls: list[Any]
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(deploy.train, "train", fail)
    ended = datps("train")

    assert (ended.exit_code, ended.stderr) == (exit_code, f"error: {error}\n")
    assert calls == []


def test_ctrl_c_exits_with_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ps.daemon, "run", interrupted)

    assert datps("server").exit_code == 130


def outcome_of(monkeypatch: pytest.MonkeyPatch, outcome: Outcome, *arguments: str) -> Result:
    monkeypatch.setattr(deploy.train, "train", lambda *_: outcome)
    return datps("train", "--out", "run", *arguments)


@pytest.mark.usefixtures("calls")
def test_a_failed_run_names_the_process_its_reason_and_its_logs(monkeypatch: pytest.MonkeyPatch) -> None:
    outcome = Outcome(exit_code=2, text="worker-1 failed with exit code 2", process="worker-1", reason="no data")

    ended = outcome_of(monkeypatch, outcome)

    assert (ended.exit_code, ended.stderr) == (
        2,
        "error: worker-1 failed with exit code 2: no data (logs in run/logs)\n",
    )
    assert json.loads(ended.stdout)["text"] in ended.stderr


@pytest.mark.usefixtures("calls")
def test_a_stopped_run_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def stopped(options: Any, _display: Any) -> Outcome:
        (options.folder / "checkpoints/round-000001").mkdir(parents=True)
        return Outcome(exit_code=143, text="stopped")

    monkeypatch.setattr(deploy.train, "train", stopped)
    ended = datps("train", "--out", str(tmp_path / "run"))

    assert (ended.exit_code, ended.stderr) == (143, f"stopped; `datps train --resume {tmp_path}/run` goes on\n")


@pytest.mark.parametrize(
    ("changes", "flags"),
    [
        ({}, ""),
        ({"unlabeled": Path("some labels"), "data": Path("d")}, " --data d --unlabeled 'some labels'"),
        ({"init": Path("before"), "device": "cuda:1"}, " --init before --device cuda:1"),
        ({"init": Path("before"), "baseline": False}, " --no-baseline"),
        ({"devices": "cpu:2"}, " --devices cpu:2"),
    ],
)
def test_what_goes_on_with_a_run_is_given_what_is_not_in_its_folder(changes: dict[str, Any], flags: str) -> None:
    options = TrainOptions(spec=JobSpec(), title="t", folder=Path("run"), **changes)
    assert command_to_resume(options) == f"datps train --resume run{flags}"


def test_a_smoke_run_goes_on_with_the_files_that_it_has_made() -> None:
    spec = JobSpec.model_validate({"data": {"unlabeled_fraction": 0.5}, "transfer": {"init": True}})
    options = TrainOptions(spec=spec, title="t", folder=Path("run"), first=JobSpec())
    files = "--unlabeled run/pseudo-labels.safetensors --init run/first"
    assert command_to_resume(options) == f"datps train --resume run {files}"


def test_evaluate_tells_both_accuracies(monkeypatch: pytest.MonkeyPatch) -> None:
    accuracies = {"clean_accuracy": 0.981, "robust_accuracy": 0.75, "attack": {"steps": 50, "epsilon": None}}
    found = {"round": 150, **accuracies, "attacks": [], "sweeps": []}
    calls: list[tuple[Any, ...]] = []

    def evaluate(model: str, **options: Any) -> dict[str, Any]:
        calls.append((model, options))
        return found

    monkeypatch.setattr(worker.judging.evaluation, "evaluate_model", evaluate)

    people = datps("evaluate", "runs/latest", "--set", "evaluation.attack.steps=50").stdout
    assert "98.1 %" in people
    assert "steps 50" in people
    assert json.loads(datps("evaluate", "runs/latest", "--json").stdout) == found
    model, options = calls[0]
    local = {"data": None, "device": "cpu", "threads": None}
    assert (model, options["settings"]) == ("runs/latest", ["evaluation.attack.steps=50"])
    assert local.items() <= options.items()
    assert options["environment"] is os.environ
    assert "DATPS_DATA" in options["reserved"]


def test_keys_are_listed_with_default_and_help() -> None:
    told = datps("recipes", "keys", "codec.b").stdout
    assert told.startswith("codec.bits = 8\n    Bits of one element on the wire")
    assert re.findall(r"^(\S+) = ", told, re.MULTILINE) == ["codec.bits", "codec.block"]
    everything = json.loads(datps("recipes", "keys", "--json").stdout)
    assert [each["key"] for each in everything] == [key for key, _, _ in spec_keys()]
    assert {each["key"]: each["default"] for each in everything}["optimizer.name"] == "lamb"
    assert all(each["help"].endswith(".") for each in everything)


def test_recipes_are_listed_and_shown() -> None:
    listed = json.loads(datps("recipes", "--json").stdout)
    shown = json.loads(datps("recipes", "show", "digits-dat-pgd", "--json").stdout)

    assert listed[0]["name"] == "digits-dat-pgd"
    assert JobSpec.model_validate(shown["job_spec"]).attack.epsilon == 0.2
    assert yaml.safe_load(datps("recipes", "show", "digits-dat-pgd").stdout)["attack"]["epsilon"] == 0.2
    assert "cifar10-dat-fgsm" in datps("recipes").stdout
