"""Run folders: where they are made, what the launcher writes into them, and what it reads back.

`job.yaml` and `logs/` are the launcher's; `rounds.jsonl`, `checkpoints/` and `result.json` are worker-0's, but for the
baseline that is added to the result at the end. `residuals/`, of biased codecs, has a file of each worker.
"""

from __future__ import annotations

import json
import os
import re
from datetime import datetime
from pathlib import Path
from typing import Any

from common.config import JobSpec
from common.errors import SpecError, refusal
from common.spec_sources import load_job_spec

RUNS = Path("runs")
LATEST = "latest"
JOB, RESULT, LOGS, BASELINE = "job.yaml", "result.json", "logs", "baseline"
TRACES, TRACE = "traces", "trace.json"
CHECKPOINTS, RESIDUALS = "checkpoints", "residuals"
_CHECKPOINT = re.compile(r"round-\d{6,}")


def new_run_folder(title: str, out: Path | None, now: datetime) -> Path:
    """Makes `runs/<title>-<time>/`, or `out`; never takes a folder that has something in it.

    Raises:
        SpecError: `out` is not new or empty, or cannot be made.
    """
    try:
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            if any(out.iterdir()):
                raise SpecError(refusal("a new or empty folder (or --resume)", "out", out, "it is not empty"))
            return out
        return _unused(RUNS / f"{title}-{now:%Y%m%d-%H%M%S}")
    except OSError as error:
        raise SpecError(refusal("a folder that can be made", "out", out or RUNS, error.strerror or "")) from None


def point_latest_to(folder: Path) -> None:
    """Makes `runs/latest` point to a run in `runs/`, in one step; runs elsewhere leave it alone."""
    if folder.resolve().parent != RUNS.resolve():
        return
    temporary = RUNS / f".{LATEST}.{os.getpid()}"
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(folder.name, target_is_directory=True)
    try:
        temporary.replace(RUNS / LATEST)
    except IsADirectoryError:  # somebody's own folder: it stays
        temporary.unlink()


def without_links(folder: Path) -> Path:
    """The folder itself, relative to here if it is below: `runs/latest` may point elsewhere a moment later."""
    real = folder.resolve()
    return real.relative_to(Path.cwd()) if real.is_relative_to(Path.cwd()) else real


def write_job(folder: Path, spec: JobSpec, title: str) -> None:
    """Writes the resolved job spec; its first line is the title."""
    _write(folder / JOB, f"# {title}\n{spec.to_yaml()}")


def read_job(folder: Path) -> tuple[JobSpec, str]:
    """The job spec of an earlier run, and its title.

    Raises:
        SpecError: the folder is no run folder, or its job.yaml is not valid.
    """
    path = folder / JOB
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(refusal(f"a run folder with {JOB}", "resume", folder, str(error))) from None
    first = text.partition("\n")[0]
    title = first.removeprefix("#").strip() if first.startswith("#") else folder.resolve().name
    return load_job_spec(yaml_text=text, yaml_name=str(path)), title


def has_checkpoint(folder: Path) -> bool:
    """Whether a run left a checkpoint to go on from."""
    checkpoints = folder / CHECKPOINTS
    return checkpoints.is_dir() and any(_CHECKPOINT.fullmatch(path.name) for path in checkpoints.iterdir())


def read_result(folder: Path) -> dict[str, Any] | None:
    """The result of a complete run; None if it is not complete.

    Raises:
        SpecError: result.json is damaged.
    """
    path = folder / RESULT
    if not path.exists():
        return None
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SpecError(refusal("a whole result", "path", path, str(error))) from None
    if not isinstance(result, dict) or not {"clean_accuracy", "robust_accuracy", "rounds"} <= set(result):
        raise SpecError(refusal("a whole result", "path", path, "accuracies are missing"))
    return result


def add_baseline(folder: Path, baseline: dict[str, Any]) -> dict[str, Any]:
    """Adds the baseline's accuracies to a complete run's result; returns the result."""
    result = read_result(folder) or {}
    result[BASELINE] = {name: baseline[name] for name in ("clean_accuracy", "robust_accuracy")}
    _write(folder / RESULT, json.dumps(result, indent=1) + "\n")
    return result


def _unused(wanted: Path) -> Path:
    """Makes the folder; with a number behind its name if there is one of that name."""
    number, path = 1, wanted
    while True:
        try:
            path.mkdir(parents=True)
            return path
        except FileExistsError:
            number += 1
            path = wanted.with_name(f"{wanted.name}-{number}")


def _write(path: Path, text: str) -> None:
    """Writes under a temporary name, then renames: the file is whole or absent."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
