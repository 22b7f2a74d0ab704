"""Run folders as trainings leave them, for tests of reports."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from common.config import JobSpec
from common.spec_sources import load_job_spec
from deploy import runs
from worker.certificates import CertifiedSample
from worker.certification import Certificate

TITLE = "# datps certify {}\nindex\tlabel\t...\n"


def job(*settings: str) -> JobSpec:
    return load_job_spec(settings=settings)


def make_run(
    folder: Path, *settings: str, clean: float = 0.9, robust: float = 0.7, complete: bool = True, rounds: int = 4
) -> Path:
    """A run folder as training leaves it; two rounds an epoch."""
    folder.mkdir(parents=True)
    runs.write_job(folder, job(*settings), "digits")
    phases = {"attack_s": 0.5, "compute_s": 0.25, "communication_s": 0.125, "evaluation_s": 0.0, "round_s": 1.0}
    lines = [{"round": n + 1, "epoch": (n + 1) / 2, **phases} for n in range(rounds)]
    (folder / "rounds.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    evaluations = [{"epoch": n, "clean_accuracy": clean - 0.1 / n, "robust_accuracy": robust} for n in (1, 2)]
    (folder / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in evaluations))
    if complete:
        result = {"clean_accuracy": clean, "robust_accuracy": robust, "rounds": rounds}
        result |= {"pushed_bytes_per_round": 2e6, "pulled_bytes_per_round": 1e6, "workers": 4}
        (folder / "result.json").write_text(json.dumps(result))
    return folder


def certified(*found: tuple[int | None, float]) -> Sequence[CertifiedSample]:
    """Samples of label 1, of (predicted, radius)."""
    return [
        CertifiedSample(index=n, label=1, certificate=Certificate(predicted=p, radius=r, votes=90), seconds=0.1)
        for n, (p, r) in enumerate(found)
    ]
