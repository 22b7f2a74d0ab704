"""`datps study` with real server and worker processes: it tunes on what `datps train` writes, not on what we think."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from deploy import runs

STUDY = """
title: One row, tuned
recipe: digits-dat-fgsm
settings: {workers: 1, data.batch_per_worker: 200, data.validation: 0.3, schedule.epochs: 1, schedule.warmup: 0}
seeds: [0]
tune_seeds: [1]
rows:
  - {name: row, tune: {optimizer.learning_rate: [0.03]}}
"""


@pytest.mark.processes
def test_tuning_finds_the_validation_figures_of_real_runs(tmp_path: Path) -> None:
    (tmp_path / "study.yaml").write_text(STUDY)
    command = [
        sys.executable,
        "-m",
        "deploy.cli",
        "study",
        str(tmp_path / "study.yaml"),
        "--out",
        str(tmp_path / "out"),
    ]
    ended = subprocess.run([*command, "--json"], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    (line,) = json.loads((tmp_path / "out/study.json").read_text())["lines"]
    assert (line["tuned"], line["chosen"]) == (1, {"optimizer.learning_rate": 0.03})
    job, _ = runs.read_job(tmp_path / "out/row/seed-0")
    assert job.optimizer.learning_rate == 0.03
