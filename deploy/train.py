"""`datps train`: one run of a local cluster, then the same without attacks as a baseline, in one run folder."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from common.config import AttackName, JobSpec, load_job_spec, spec_keys
from common.errors import SpecError, refusal
from deploy import runs
from deploy.cluster import Commands, DatpsCommands, LocalCluster, threads_per_worker
from deploy.display import Display
from deploy.progress import RunView
from deploy.supervision import Outcome, Patience

CommandsFactory = Callable[[JobSpec, Path, bool], Commands]
"""(job spec, run folder, resume) -> how the daemons are run."""


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """One call of `datps train`.

    Attributes:
        spec: the job.
        title: the recipe's or job file's name.
        folder: the run folder; it exists.
        resume: go on with the run in `folder`.
        data: data folder of all workers.
        download: fetch the data set into `data` first.
        device: of the workers.
        baseline: train without attacks, too.
    """

    spec: JobSpec
    title: str
    folder: Path
    resume: bool = False
    data: Path | None = None
    download: bool = False
    device: str = "cpu"
    baseline: bool = True


def prepare_new(spec: JobSpec, title: str, out: Path | None, **local: object) -> TrainOptions:
    """Makes a run folder; `local` are the options that belong to this machine.

    Raises:
        SpecError: the folder is not new or empty.
    """
    folder = runs.new_run_folder(title, out, datetime.now())
    runs.write_job(folder, spec, title)
    runs.point_latest_to(folder)
    return TrainOptions(spec=spec, title=title, folder=folder, **local)  # type: ignore[arg-type]


def prepare_resume(
    folder: Path, *, settings: list[str], environment: Mapping[str, str], reserved: frozenset[str], **local: object
) -> TrainOptions:
    """Goes on with the run in `folder`.

    Raises:
        SpecError: no run folder, nothing to go on from, or settings that would make it another job.
    """
    spec = runs.read_job(folder)
    wanted = load_job_spec(
        yaml_text=spec.to_yaml(), yaml_name=runs.JOB, environment=environment, settings=settings, reserved=reserved
    )
    if wanted != spec:
        key, ours, theirs = next(_differences(spec, wanted))
        raise SpecError(refusal(f"{key}={ours}, as in {folder / runs.JOB}", key, theirs, "a resumed run keeps its job"))
    if runs.read_result(folder) is None and not runs.has_checkpoint(folder):
        raise SpecError(refusal("a run with a checkpoint", "resume", folder, "none found"))
    return TrainOptions(spec=spec, title=folder.resolve().name, folder=folder, resume=True, **local)  # type: ignore[arg-type]
