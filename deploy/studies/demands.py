"""What is known to go wrong, or to be of no use, is refused before the first run of a study, not hours later."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import TYPE_CHECKING

from common.config import JobSpec, Split
from common.errors import SpecError, refusal
from deploy.studies import figures
from worker.judging.requests import make_plan, parse_attack
from worker.local_files import held_back_of

if TYPE_CHECKING:
    from deploy.studies.plan import Run, StudySpec

STUDY, TABLE, RESULT = "study.yaml", "table.md", "study.json"
"""The study's own files, beside the folders of its rows."""


def refuse_unfit(study: StudySpec, jobs: Mapping[str, tuple[Run, JobSpec]]) -> None:
    """Looks at all runs, each with its job, by their folders.

    Raises:
        SpecError: the first thing that does not fit.
    """
    _refuse_unknown_figures(study)
    for run, job in jobs.values():
        if run.candidate is not None:
            _refuse_untunable(run, job)
        _refuse_unfit_labels(run, job, jobs)
        if job.transfer.init and run.init is None:
            raise SpecError(refusal("init: another row, with transfer.init=true", "init", None, run.row))
        if study.evaluate and run.candidate is None:
            make_plan([parse_attack(attack) for attack in study.evaluate], [], job)
        if study.certify and study.certify.noise_std is None and not job.smoothing.noise_std:
            rule = "noise_std in certify, or smoothing.noise_std above 0"
            raise SpecError(refusal(rule, "smoothing.noise_std", job.smoothing.noise_std, run.row))


def refuse_shared_folder(run: Run, other: Run | None) -> None:
    """Refuses a run whose folder another one has, or the study.

    Raises:
        SpecError: so it is.
    """
    if other is not None:
        rule = f"names that differ in letters or digits from {other.row!r}: both runs would be in {run.folder}"
        raise SpecError(refusal(rule, "row", repr(run.row)))
    if run.folder.partition("/")[0] in (STUDY, TABLE, RESULT):
        raise SpecError(refusal("a name that no file of the study has", "row", run.row))


def _refuse_unknown_figures(study: StudySpec) -> None:
    known = figures.names(study.evaluate, certified=study.certify is not None)
    asked = [("of", check.of) for check in study.checks] + [("columns", name) for name in study.columns or ()]
    for key, name in asked:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
            raise SpecError(refusal(f"a figure of this study; did you mean {nearest!r}?", key, name))


def _refuse_untunable(run: Run, job: JobSpec) -> None:
    """A row is tuned on what worker-0 says of the last model's accuracy on validation data."""
    rule = "{} in a row that is tuned"
    if not job.data.validation:
        raise SpecError(refusal(rule.format("data.validation above 0"), "data.validation", 0, run.row))
    if not job.evaluation.every_epochs:
        raise SpecError(refusal(rule.format("evaluation.every_epochs above 0"), "evaluation.every_epochs", 0, run.row))
    if job.data.split is not Split.SHARED:
        raise SpecError(refusal(rule.format("data.split=shared"), "data.split", job.data.split, run.row))


def _refuse_unfit_labels(run: Run, job: JobSpec, jobs: Mapping[str, tuple[Run, JobSpec]]) -> None:
    fraction = job.data.unlabeled_fraction
    if run.unlabeled is None:
        if fraction:
            rule = f"unlabeled: another row, with data.unlabeled_fraction={fraction:g}"
            raise SpecError(refusal(rule, "unlabeled", None, run.row))
        return
    if not fraction:
        rule = "data.unlabeled_fraction above 0 in a row with unlabeled"
        raise SpecError(refusal(rule, "data.unlabeled_fraction", fraction, run.row))
    teacher, theirs = jobs[run.unlabeled]
    if theirs.data.labeled is None:
        rule = f"data.labeled in row {teacher.row!r}, which labels the images held back for {run.row!r}"
        raise SpecError(refusal(rule, "data.labeled", None))
    ours, held_back = held_back_of(job.data), held_back_of(theirs.data)
    for key, value in ours.items():
        if held_back[key] != value:
            rule = f"data.{key}={value} in row {teacher.row!r}, which labels the images held back, as in {run.row!r}"
            raise SpecError(refusal(rule, f"data.{key}", held_back[key]))
