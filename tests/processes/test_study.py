"""`datps study` with real server and worker processes: it tunes on what `datps train` writes, not on what we think."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from deploy import runs
from tests.processes.test_processes import alive, descendants

STUDY = """
title: One row, tuned
recipe: digits-dat-fgsm
settings: {workers: 1, data.batch_per_worker: 200, data.validation: 0.3, schedule.epochs: 1, schedule.warmup: 0}
seeds: [0]
tune_seeds: [1]
rows:
  - {name: row, tune: {optimizer.learning_rate: [0.03]}}
"""


def command_of(folder: Path, text: str) -> list[str]:
    """Of a study in the folder `out`."""
    (folder / "study.yaml").write_text(text)
    return [sys.executable, "-m", "deploy.cli", "study", str(folder / "study.yaml"), "--out", str(folder / "out")]


@pytest.mark.processes
def test_tuning_finds_the_validation_figures_of_real_runs(tmp_path: Path) -> None:
    ended = subprocess.run([*command_of(tmp_path, STUDY), "--json"], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    (line,) = json.loads((tmp_path / "out/study.json").read_text())["lines"]
    assert (line["tuned"], line["chosen"]) == (1, {"optimizer.learning_rate": 0.03})
    job, _ = runs.read_job(tmp_path / "out/row/seed-0")
    assert job.optimizer.learning_rate == 0.03


@pytest.mark.processes
def test_sigterm_lets_the_training_at_hand_save_what_it_has(tmp_path: Path) -> None:
    long = STUDY.replace("schedule.epochs: 1,", "schedule.epochs: 100000,")
    process = subprocess.Popen(command_of(tmp_path, long), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    run = tmp_path / "out/row/tune-learning_rate-0.03/seed-1"
    started: list[int] = []
    try:
        while not (run / "rounds.jsonl").exists() or not (run / "rounds.jsonl").read_text():
            with suppress(subprocess.TimeoutExpired):
                process.wait(0.05)
                raise AssertionError(process.communicate())
        started = descendants(process.pid)
        process.terminate()
        assert process.wait(60) == 143, process.communicate()
        assert list((run / "checkpoints").iterdir())
        assert len(started) >= 3  # the launcher, a server and a worker
        assert not [pid for pid in started if alive(pid)]
    finally:
        for pid in (process.pid, *started):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.communicate()
