"""What a study runs: its YAML document, and the runs that follow from it. Nothing is started here.

    title: Codecs on the digits
    recipe: digits-dat-pgd
    settings: {schedule.epochs: 10}             # of all runs
    seeds: [0, 1, 2]
    rows:
      - {name: 32 bits, settings: {codec.name: none}}
      - {name: 8 bits, settings: {codec.bits: 8}}
    checks:
      - {row: 8 bits, of: robust_accuracy, at_least: 32 bits, within: spread}

A run is a row with a seed. `grid` multiplies the rows by values of further keys. A row that has `tune` first trains
every combination of those values with each of `tune_seeds`, and its seeds use what is best on the validation split; a
training that diverges there is worse than any other.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Any, Self

import yaml
from pydantic import Field, field_validator, model_validator

from common.config import JobSpec, Section
from common.errors import SpecError, refusal
from common.spec_sources import load_job_spec, read_yaml, validated
from deploy import recipes
from deploy.studies.demands import refuse_shared_folder, refuse_unfit

Value = bool | int | float | str | None
Settings = dict[str, Value | list[Value]]
Choices = dict[str, Annotated[list[Value], Field(min_length=1)]]


class Within(StrEnum):
    SPREAD = "spread"


class RowSpec(Section):
    """One line of the table."""

    name: str
    """What the table calls it; unique."""
    recipe: str | None = None
    """Recipe by name, instead of the study's."""
    settings: Settings = Field(default={})
    """Keys of the job spec, dotted, over those of the study."""
    tune: Choices = Field(default={})
    """Values to choose from, by key: all combinations are trained, the best one on the validation split is taken."""
    init: str | None = None
    """Row whose trained model of the same seed this one starts from (`datps train --init`)."""
    unlabeled: str | None = None
    """Row whose trained model of the same seed labels the images held back (`datps pseudo-label`)."""


class CheckSpec(Section):
    """What the study is expected to show: the mean of one row against that of another."""

    row: str
    """Row, or with a grid all rows of that name, each against its like."""
    of: str
    """Figure: a column's name, such as `robust_accuracy`."""
    at_least: str
    """The other row."""
    within: Annotated[float, Field(ge=0)] | Within = 0.0
    """By how many points (hundredths) the first may lie below the other; `spread`: not below its least seed."""
    gap: Annotated[float, Field(ge=0)] = 0.0
    """By how many points it must lie above the other."""


class CertifySpec(Section):
    """Flags of `datps certify`, with its defaults; they are a certificate's, so their ranges are looked at there."""

    noise_std: float | None = None
    """Where absent that of the training."""
    n0: int = 100
    n: int = 100_000
    alpha: float = 0.001
    every: int = Field(default=20, ge=1)
    limit: int | None = Field(default=None, ge=1)
    batch: int = Field(default=1000, ge=1)


class StudySpec(Section):
    """A study."""

    title: str
    about: str = ""
    """What it is for, where its numbers come from, what tuning its rows had."""
    recipe: str = recipes.DEFAULT
    """Recipe by name; rows may name another."""
    settings: Settings = Field(default={})
    """Keys of the job spec, dotted, of all runs."""
    seeds: tuple[int, ...] = (0, 1, 2)
    tune_seeds: tuple[int, ...] = (1000, 1001, 1002)
    """Seeds of the runs that tune, which are in no table; the mean over them decides."""
    grid: Choices = Field(default={})
    """Values by key: every row is run with every combination."""
    rows: tuple[RowSpec, ...] = Field(min_length=1)
    evaluate: tuple[str, ...] = ()
    """Attacks as `datps evaluate --attack` takes them, for every trained model."""
    evaluate_images: int | None = Field(default=None, ge=1)
    """How many test images `evaluate` takes; all where absent."""
    certify: CertifySpec | None = None
    """Flags of `datps certify` by name, for every trained model; none is certified where absent or empty."""
    columns: tuple[str, ...] | None = ("clean_accuracy", "robust_accuracy")
    """Figures in the table beside those of `evaluate` and `certify`; all if null. study.json has all."""
    checks: tuple[CheckSpec, ...] = ()

    @field_validator("certify", mode="before")
    @classmethod
    def _certify_has_flags(cls, value: object) -> object:
        if not isinstance(value, dict):
            return value
        named = {str(key).replace("-", "_"): each for key, each in value.items()}
        for key in named:
            if key not in CertifySpec.model_fields:
                raise ValueError(refusal(f"one of {', '.join(CertifySpec.model_fields)}", "flag", key))
        return named or None

    @model_validator(mode="after")
    def _seeds_fit(self) -> Self:
        for name, seeds in (("seeds", self.seeds), ("tune_seeds", self.tune_seeds)):
            if len(set(seeds)) < len(seeds) or not seeds:
                raise ValueError(refusal("different seeds, at least one", name, list(seeds)))
        both = sorted({*self.seeds} & {*self.tune_seeds})
        if both and any(row.tune for row in self.rows):
            rule = f"seeds to tune with that are none of seeds={list(self.seeds)}"
            raise ValueError(refusal(rule, "tune_seeds", list(self.tune_seeds)))
        return self

    @model_validator(mode="after")
    def _rows_fit(self) -> Self:
        names = [row.name for row in self.rows]
        if len(set(names)) < len(names):
            raise ValueError(refusal("unique names", "rows", names))
        earlier: set[str] = set()
        for row in self.rows:
            for other in (row.init, row.unlabeled):
                if other is not None and other not in earlier:
                    raise ValueError(refusal(f"a row before {row.name!r}", "row", other))
            earlier.add(row.name)
        for check in self.checks:
            for other in (check.row, check.at_least):
                if other not in earlier:
                    raise ValueError(refusal(f"one of {names}", "row", other, "checks"))
        return self


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training.

    Attributes:
        row: name of the row, with the values of the grid.
        base: name of the row alone.
        point: values of the grid.
        seed: of the job.
        recipe: by name.
        settings: `key=value` of all keys, in order; later ones win.
        folder: relative to the study's, of letters, digits, `.`, `_` and `-`.
        init, unlabeled: folders of the runs whose models it needs.
        candidate: values of the keys that are tuned; None for a run of the table.
    """

    row: str
    base: str
    point: tuple[tuple[str, Value], ...]
    seed: int
    recipe: str
    settings: tuple[str, ...]
    folder: str
    init: str | None
    unlabeled: str | None
    candidate: tuple[tuple[str, Value], ...] | None = None


def read_study(text: str, name: str) -> StudySpec:
    """The study in a YAML document.

    Raises:
        SpecError: not a study; names what is wrong and where.
    """
    document = read_yaml(text, name)
    if not isinstance(document, dict):
        raise SpecError(refusal("a mapping of title, rows and more", "study", name, type(document).__name__))
    study = validated(StudySpec, document, name)
    jobs: dict[str, tuple[Run, JobSpec]] = {}
    for run in runs_of(study):  # every job is known to be valid before the first one is trained
        refuse_shared_folder(run, jobs[run.folder][0] if run.folder in jobs else None)
        jobs[run.folder] = run, job_of(run)
    refuse_unfit(study, jobs)
    return study


def job_of(run: Run, chosen: Mapping[str, Value] | None = None) -> JobSpec:
    """The run's job spec; `chosen`: values that tuning has found.

    Raises:
        SpecError: an unknown recipe, key or value.
    """
    settings = settings_of(run, chosen)
    return load_job_spec(yaml_text=recipes.recipe(run.recipe).text, yaml_name=run.recipe, settings=settings)


def settings_of(run: Run, chosen: Mapping[str, Value] | None = None) -> list[str]:
    """What makes the recipe's job the run's, as `--set` takes it."""
    return [*run.settings, *_assignments(chosen or {})]


def runs_of(study: StudySpec) -> Iterator[Run]:
    """All runs in the order in which they can be done; runs that tune come before their row's others."""
    for row in study.rows:
        for point in _points(study.grid):
            for candidate in _points(row.tune) if row.tune else ():
                for number, seed in enumerate(study.tune_seeds):
                    of_seed = study.seeds[number % len(study.seeds)]  # other rows are not trained with seeds that tune
                    yield _run(study, row, point, seed, candidate, of_seed)
            for seed in study.seeds:
                yield _run(study, row, point, seed, None, seed)


def row_name(base: str, point: Sequence[tuple[str, Value]]) -> str:
    """What the table calls a row at one point of the grid."""
    return ", ".join([base, *(f"{key.rpartition('.')[2]} {value}" for key, value in point)])


def _run(
    study: StudySpec,
    row: RowSpec,
    point: tuple[tuple[str, Value], ...],
    seed: int,
    candidate: tuple[tuple[str, Value], ...] | None,
    of_seed: int,
) -> Run:
    """`of_seed`: seed of the other rows' models that it needs."""
    settings = {**study.settings, **row.settings, **dict(point), **dict(candidate or ())}
    return Run(
        row=row_name(row.name, point),
        base=row.name,
        point=point,
        seed=seed,
        recipe=row.recipe or study.recipe,
        settings=(*_assignments(settings), f"seed={seed}"),
        folder=_folder(row.name, point, seed, candidate),
        init=None if row.init is None else _folder(row.init, point, of_seed, None),
        unlabeled=None if row.unlabeled is None else _folder(row.unlabeled, point, of_seed, None),
        candidate=candidate,
    )


def _points(values: Mapping[str, Sequence[Value]]) -> Iterator[tuple[tuple[str, Value], ...]]:
    for combination in itertools.product(*values.values()):
        yield tuple(zip(values, combination, strict=True))


def _folder(name: str, point: tuple[tuple[str, Value], ...], seed: int, candidate: Any) -> str:
    parts = [_slug(row_name(name, point))]
    if candidate is not None:
        parts.append("tune-" + _slug(row_name("", candidate).removeprefix(", ")))
    return "/".join([*parts, f"seed-{seed}"])


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._]+", "-", text).strip("-.") or "row"


def _assignments(settings: Mapping[str, Value | list[Value]]) -> list[str]:
    return [f"{key}={_scalar(value)}" for key, value in settings.items()]


def _scalar(value: Value | list[Value]) -> str:
    """As `--set` takes it."""
    if isinstance(value, list):
        return f"[{', '.join(map(_scalar, value))}]"
    return yaml.safe_dump(value, default_flow_style=True).splitlines()[0] if not isinstance(value, str) else value
