"""The figures of one run, by the name of their column: where each comes from, and which ones a study has."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from deploy.report.paper import RADII
from worker.judging.requests import parse_attack

Figures = Mapping[str, float]
"""Fractions, seconds, bytes."""
OF_RESULT = (
    *("clean_accuracy", "robust_accuracy", "seconds", "communication_seconds"),
    *("pushed_bytes_per_round", "pulled_bytes_per_round", "rounds", "parameters"),
)
"""Those that are taken from result.json as they are."""
CHOSEN_BY = "validation_robust_accuracy"
"""The figure that tuning looks at: of the last model, as the table's, and never one of the test set."""
DIVERGED: Figures = {CHOSEN_BY: -math.inf}
"""Those of a run that tunes and whose training diverged: worse than any other."""
SMOOTHED = "smoothed accuracy"


def of_result(result: Mapping[str, Any]) -> Figures:
    """Of a run's result.json.

    One that was written before it told the last model's validation accuracy still tells the best model's; where that is
    the last one, it is the same figure.
    """
    figures = {name: float(result[name]) for name in OF_RESULT if name in result}
    best = result.get("best") or {}
    if CHOSEN_BY in result:
        figures[CHOSEN_BY] = float(result[CHOSEN_BY])
    elif CHOSEN_BY in best and best.get("round") == result["rounds"]:
        figures[CHOSEN_BY] = float(best[CHOSEN_BY])
    return figures


def of_evaluation(evaluation: Mapping[str, Any], attacks: Iterable[str]) -> Figures:
    """RA under each attack, of an evaluation.json, `pgd:20 accuracy`.

    Raises:
        KeyError, TypeError, ValueError: there is none.
    """
    by_label = {each["attack"]: float(each["robust_accuracy"]) for each in evaluation["attacks"]}
    labels = [parse_attack(attack).label for attack in attacks]
    return {_under(label): by_label[label] for label in labels}


def of_certificates(summary: Mapping[str, Any]) -> Figures:
    """Of `worker.certificates.summarize`: certified accuracy at each radius."""
    at = {_at(each["radius"]): float(each["accuracy"]) for each in summary["certified"]}
    return {SMOOTHED: float(summary["smoothed_accuracy"]), **at}


def names(attacks: Sequence[str], *, certified: bool) -> list[str]:
    """All columns that a study with these attacks can have.

    Raises:
        SpecError: what is no attack.
    """
    judged = [_under(parse_attack(attack).label) for attack in attacks]
    return [*OF_RESULT, CHOSEN_BY, *judged, *([SMOOTHED, *map(_at, RADII)] if certified else [])]


def _under(attack: str) -> str:
    return f"{attack} accuracy"


def _at(radius: float) -> str:
    return f"certified accuracy at {radius:g}"
