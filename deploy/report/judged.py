"""The evaluations of a run that `datps evaluate` has left in its folder, read back from evaluation.json."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from common.config import JobSpec
from common.errors import SpecError, refusal
from worker.judging.requests import SWEPT, Name


class JudgedAttack(BaseModel):
    """An attack with its parameters, and the accuracy under it as a fraction."""

    model_config = ConfigDict(frozen=True)
    parameters: Mapping[str, Any] = {}
    robust_accuracy: float


class SweptValue(BaseModel):
    """One value of a sweep: the worst case over its attacks, and each of them."""

    model_config = ConfigDict(frozen=True)
    epsilon: float | None = None
    steps: float | None = None
    robust_accuracy: float
    attacks: tuple[JudgedAttack, ...] = ()

    def at(self, key: str) -> float | None:
        """The value of the key that is swept."""
        return {"epsilon": self.epsilon, "steps": self.steps}.get(key)


class JudgedSweep(BaseModel):
    """A sweep over one of the attacks' parameters."""

    model_config = ConfigDict(frozen=True)
    key: str
    attacks: tuple[str, ...]
    rows: tuple[SweptValue, ...]

    @model_validator(mode="after")
    def _every_row_has_its_value(self) -> Self:
        if self.key not in SWEPT or any(row.at(self.key) is None for row in self.rows):
            raise ValueError(refusal(f"rows with a value of {' or '.join(SWEPT)}", "key", self.key))
        return self


class Judged(BaseModel):
    """One evaluation.json.

    Attributes:
        samples: images that were judged.
        weights, parameter_digest: which model was judged; None where the file does not say it.
    """

    model_config = ConfigDict(frozen=True)
    samples: int
    attacks: tuple[JudgedAttack, ...]
    sweeps: tuple[JudgedSweep, ...]
    weights: str | None = None
    parameter_digest: str | None = None

    @property
    def every_attack(self) -> Iterator[JudgedAttack]:
        """Those of the sweeps too."""
        yield from self.attacks
        for sweep in self.sweeps:
            for row in sweep.rows:
                yield from row.attacks


def read_judged(path: Path) -> Judged:
    """An evaluation.json.

    Raises:
        SpecError: it is cut off, or something else.
    """
    try:
        return Judged.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        reason = ": ".join(filter(None, [".".join(map(str, first["loc"])), first["msg"]]))
        raise SpecError(refusal("a whole evaluation of `datps evaluate`", "path", path, reason)) from None


def autoattack_of(
    judged: Sequence[Judged], spec: JobSpec, result: Mapping[str, Any] | None
) -> tuple[float, int] | None:
    """AA of the model that `result` is about, at the radius and norm of the job's RA: (fraction, images).

    Of several the one on most images; None without any.
    """
    found = [
        (evaluation.samples, attack.robust_accuracy)
        for evaluation in judged
        if _is_of(evaluation, result or {})
        for attack in evaluation.every_attack
        if attack.parameters.get("name") == Name.AUTOATTACK
        and attack.parameters.get("norm") == spec.attack.norm
        and math.isclose(attack.parameters.get("epsilon", math.nan), spec.evaluation_epsilon, rel_tol=1e-6)
    ]
    if not found:
        return None
    images, accuracy = max(found, key=lambda each: each[0])
    return accuracy, images


def _is_of(evaluation: Judged, result: Mapping[str, Any]) -> bool:
    """Whether it judged the model whose TA and RA are in the result, not an earlier checkpoint or other weights."""
    ours = {"parameter_digest": evaluation.parameter_digest, "weights": evaluation.weights}
    return all(None in (value, result.get(name)) or value == result[name] for name, value in ours.items())
