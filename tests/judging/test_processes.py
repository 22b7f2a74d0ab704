"""Several processes judge as one does; they end with their starter, and when one fails."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from common.errors import SpecError
from worker.judging.evaluation import evaluate_model, threads_of_each
from worker.judging.judge import Order, Unit, model_digest
from worker.judging.processes import JudgeProcessError, Processes
from worker.trained import open_model

JOB = ("attack.epsilon=0.1", "evaluation.batch=64")
ROOT = Path(__file__).parents[2]
SAME = ("clean_correct", "robust_correct", "robust_and_clean_correct", "model_digest", "samples")


def order(model: str) -> Order:
    """The clean images of a model, in batches of 64."""
    return Order(
        model=model,
        data=None,
        settings=JOB,
        environment={},
        reserved=frozenset(),
        threads=1,
        model_digest=model_digest(open_model(model).module),
        requests=(),
        indices=tuple(range(360)),
        batch=64,
    )


@pytest.mark.processes
def test_two_processes_judge_exactly_as_one(module_name: str, tmp_path: Path) -> None:
    results = []
    for name, where in (("one", {"device": "cpu"}), ("two", {"devices": "cpu:2"})):
        options: dict[str, Any] = {"attacks": ["pgd:3x2", "fgsm"], "threads": 1, "out": tmp_path / name, **where}
        results.append(evaluate_model(f"{module_name}:linear", settings=JOB, **options))
    one, two = results
    assert {name: one[name] for name in SAME} == {name: two[name] for name in SAME}
    assert (tmp_path / "one/samples.tsv").read_bytes() == (tmp_path / "two/samples.tsv").read_bytes()
    assert (one["devices"], two["devices"]) == (["cpu"], ["cpu", "cpu"])
    assert multiprocessing.active_children() == []


@pytest.mark.processes
def test_a_failure_in_a_process_is_told_and_its_trace_is_shown(
    module_name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with (
        Processes(order(f"{module_name}:Fails"), ("cpu",)) as processes,
        pytest.raises(JudgeProcessError, match=r"local process 0 of 1 \(cpu\): KeyError: 'no such layer'"),
    ):
        list(processes.judge([Unit(None, 0)], lambda *_: None))
    assert multiprocessing.active_children() == []
    assert "Traceback" in capfd.readouterr().err


@pytest.mark.processes
def test_a_process_that_is_killed_is_told(module_name: str) -> None:
    with Processes(order(f"{module_name}:linear"), ("cpu",)) as processes:
        os.kill(multiprocessing.active_children()[0].pid or 0, signal.SIGKILL)
        units = [Unit(None, batch) for batch in range(5)]
        with pytest.raises(JudgeProcessError, match="ended without a word, killed by SIGKILL") as killed:
            list(processes.judge(units, lambda *_: None))
    assert killed.value.exit_code == 75
    assert multiprocessing.active_children() == []


def test_a_module_that_draws_its_weights_at_random_is_refused(module_name: str) -> None:
    with pytest.raises(SpecError, match="expected the same model in every process"):
        order(f"{module_name}:any_weights").open("cpu")


@pytest.mark.processes
def test_ctrl_c_ends_everything_and_says_how_to_go_on(module_name: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "deploy.cli", "evaluate", f"{module_name}:linear", "--devices", "cpu:2"]
    command += ["--threads", "1", "--attack", "pgd:1000x1000,epsilon=0.001", "--batch", "20", "--out", "out"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    # A shell that starts the tests in the background lets them ignore Ctrl-C, and what they start inherits that.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        started = subprocess.Popen(
            command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
    finally:
        signal.signal(signal.SIGINT, before)
    assert started.stderr
    line = started.stderr.readline()  # both processes are at work
    os.killpg(started.pid, signal.SIGINT)
    _, told = started.communicate(timeout=60)  # until nobody holds its standard error: all have ended
    assert line.startswith("clean images: "), line + told
    assert started.returncode == 130, told
    assert told == "stopped; the same command goes on with what is in out\n"


def test_processes_on_the_cpu_share_its_threads_unless_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.get_num_threads", lambda: 8)
    assert threads_of_each(None, ("cpu", "cpu", "cpu")) == 2
    assert threads_of_each(3, ("cpu", "cpu")) == 3
    assert threads_of_each(None, ("cuda:0", "cuda:1")) is None
    assert threads_of_each(None, ()) is None


def test_a_list_of_devices_that_means_nothing_is_refused() -> None:
    with pytest.raises(SpecError, match="expected cpu:N"):
        evaluate_model("m:x", devices="cuda:0,cuda:0")
