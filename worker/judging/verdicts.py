"""What came out for each sample, counts over the samples, and their table.

RA counts samples that are right on every perturbed image that was tried; whether the clean image was right too is not
asked, and counted apart. AutoAttack attacks no sample whose clean image is wrong: those do not resist it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

CLEAN = "clean"
"""Found by: the clean image is wrong already."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Of one attack (or of none, on the clean images) on some samples, in their order."""

    predicted: tuple[int, ...]
    """Class of the first wrong image that was found; of a sample that resists, the right class."""
    distance: tuple[float | None, ...]
    """Of that wrong image from the clean one, in the attack's norm; None for a sample that resists."""
    found_by: tuple[str | None, ...]
    """Which stage of the attack found it (`restart 1`, `apgd-t`, ...); None for a sample that resists."""
    seconds: float
    warnings: tuple[str, ...] = ()

    @classmethod
    def joined(cls, parts: Sequence[Verdict]) -> Verdict:
        """Of all samples, from those of batches."""
        return cls(
            predicted=tuple(chain.from_iterable(part.predicted for part in parts)),
            distance=tuple(chain.from_iterable(part.distance for part in parts)),
            found_by=tuple(chain.from_iterable(part.found_by for part in parts)),
            seconds=sum(part.seconds for part in parts),
            warnings=tuple(chain.from_iterable(part.warnings for part in parts)),
        )

    def right(self, labels: Sequence[int]) -> list[bool]:
        """Which samples are right, or resist."""
        return [predicted == label for predicted, label in zip(self.predicted, labels, strict=True)]


def summary(verdict: Verdict, labels: Sequence[int], clean: Sequence[bool], stages: Sequence[str]) -> dict[str, Any]:
    """The counts of one attack, JSON-able.

    Args:
        verdict: of all samples.
        labels: class numbers.
        clean: which samples are right on the clean image.
        stages: of the attack, in order; with more than one, the RA after each is told.

    Returns:
        `robust_correct`, `robust_accuracy`; `robust_and_clean_correct`; `greatest_distance` of a wrong image (None if
        none was found); `after`, RA after each stage.
    """
    robust = verdict.right(labels)
    found = [distance for distance in verdict.distance if distance is not None]
    result: dict[str, Any] = {
        **robust_counts(robust, clean),
        "greatest_distance": max(found, default=None),
        "seconds": round(verdict.seconds, 3),
    }
    if len(stages) > 1:
        result["after"] = dict(_after(verdict, stages))
    return result


def robust_counts(robust: Sequence[bool], clean: Sequence[bool]) -> dict[str, Any]:
    """RA, and how many samples it counts; of those, how many are right on the clean image too."""
    return {
        "robust_accuracy": fraction(sum(robust), len(robust)),
        "robust_correct": sum(robust),
        "robust_and_clean_correct": sum(r and c for r, c in zip(robust, clean, strict=True)),
    }


def worst_case(robust: Sequence[Sequence[bool]]) -> list[bool]:
    """Which samples resist every attack, from which samples resist each."""
    return [all(each) for each in zip(*robust, strict=True)]


def fraction(count: int, samples: int) -> float:
    """0 without samples."""
    return count / samples if samples else 0.0


def alike(warnings: Sequence[str]) -> list[str]:
    """Warnings that differ in their numbers only are told once, with how many there were."""
    first: dict[str, str] = {}
    count: dict[str, int] = {}
    for text in warnings:
        template = re.sub(r"\d+", "0", text)
        first.setdefault(template, text)
        count[template] = count.get(template, 0) + 1
    return [text if count[key] == 1 else f"{text} ({count[key]} such warnings)" for key, text in first.items()]


def table(
    indices: Sequence[int],
    labels: Sequence[int],
    clean: Verdict,
    attacks: Mapping[str, Verdict],
    *,
    worst: Sequence[bool] | None,
) -> Iterator[str]:
    """samples.tsv, line by line: a header, then one line for each sample.

    Args:
        indices: of the samples in the test data.
        labels: class numbers.
        clean: the clean images' verdict.
        attacks: by label.
        worst: which samples resist all attacks; absent where the attacks are of a sweep.
    """
    header = ["index", "label", "predicted"]
    for name in attacks:
        header += [f"{name} {column}" for column in ("predicted", "robust", "distance", "found_by")]
    yield "\t".join([*header, *(["robust"] if worst is not None else [])])
    for row, (index, label) in enumerate(zip(indices, labels, strict=True)):
        cells = [str(index), str(label), str(clean.predicted[row])]
        for verdict in attacks.values():
            predicted, distance = verdict.predicted[row], verdict.distance[row]
            cells += [str(predicted), str(int(predicted == label))]
            cells += ["" if distance is None else f"{distance:.7g}", verdict.found_by[row] or ""]
        yield "\t".join([*cells, *([str(int(worst[row]))] if worst is not None else [])])


def _after(verdict: Verdict, stages: Sequence[str]) -> Iterator[tuple[str, float]]:
    samples = len(verdict.predicted)
    left = samples - verdict.found_by.count(CLEAN)
    for stage in stages:
        left -= verdict.found_by.count(stage)
        yield stage, fraction(left, samples)
