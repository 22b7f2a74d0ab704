"""Which runs are one experiment with several seeds, and by which keys of the job experiments differ."""

from __future__ import annotations

import itertools
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from common.config import JobSpec
from deploy.report.collect import RunData, method_of

_FILES = ("transfer.sha256", "data.unlabeled_digest")
_SAME_EXPERIMENT = ("seed", "job_id", "deadlines.", "checkpoint.", "exchange.", *_FILES)
"""Keys, and beginnings of keys, that do not make another experiment of a job ..."""
_BUT = ("exchange.topology",)
"""... but for these: who averages is what the seconds and bytes are about."""
_WITH_SIZE = ("workers", "servers", "data.batch_per_worker", "optimizer.learning_rate")
"""Keys that may follow the batch size along one line of Figures 1 and 2."""


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """Runs whose jobs differ in nothing but what does not make another experiment, such as the seed.

    Attributes:
        runs: at least one.
        keys: of their jobs, dotted, with values.
    """

    runs: Sequence[RunData]
    keys: Mapping[str, Any]


def keys_of(spec: JobSpec) -> dict[str, Any]:
    """The dotted keys that make the experiment, with JSON-able values."""
    flat = dict(_flat(spec.model_dump(mode="json")))
    return {key: value for key, value in flat.items() if key in _BUT or not key.startswith(_SAME_EXPERIMENT)}


def experiments(data: Iterable[RunData]) -> list[Experiment]:
    """The runs by experiment, in the order in which each first appears."""
    found: dict[str, list[RunData]] = {}
    for run in data:
        found.setdefault(json.dumps(keys_of(run.spec), sort_keys=True), []).append(run)
    return [Experiment(runs=runs, keys=keys_of(runs[0].spec)) for runs in found.values()]


def label_of(experiment: Experiment, names: Mapping[str, str]) -> str:
    """A name for the experiment: what the names of its runs have in common, or the first of them and how many more."""
    own = [names[str(run.folder)].split("/") for run in experiment.runs]
    if len(own) == 1:
        return "/".join(own[0])
    common = [parts[0] for parts in itertools.takewhile(lambda each: len(set(each)) == 1, zip(*own, strict=False))]
    return "/".join(common) or f"{'/'.join(own[0])} and {len(own) - 1} more"


def differing(several: Sequence[Mapping[str, Any]]) -> list[str]:
    """The keys of which these jobs do not all have the same value."""
    return [key for key in several[0] if any(each[key] != several[0][key] for each in several)] if several else []


def told_apart(
    words: Sequence[str], keys: Sequence[Mapping[str, Any]], said: Collection[str] = (), *, by: Sequence[str] = ()
) -> list[str]:
    """The words of each experiment with the keys in which it differs from those beside it.

    Args:
        words: of each experiment.
        keys: of each job.
        said: keys that the words speak of; named only where the words are alike all the same.
        by: those with the same text stand beside each other; all do where absent.

    Returns:
        Words that are alike only where all keys are.
    """
    told = _with_keys(words, keys, by or [""] * len(words), said)
    return _with_keys(told, keys, [f"{beside}\n{text}" for beside, text in zip(by or told, told, strict=True)], ())


def _with_keys(
    words: Sequence[str], keys: Sequence[Mapping[str, Any]], by: Sequence[str], said: Collection[str]
) -> list[str]:
    told = list(words)
    for each in set(by):
        numbers = [number for number, other in enumerate(by) if other == each]
        for key in differing([keys[number] for number in numbers]):
            values = [keys[number][key] for number in numbers]
            for number in numbers if key not in said else ():
                told[number] += f", {key}={_text(keys[number][key], values)}"
    return told


def by_size(data: Iterable[RunData]) -> dict[str, dict[int, list[RunData]]]:
    """The complete runs of each M * B in rising order, by the name of their line; only lines of several sizes.

    Runs of one size on one line are one experiment. Along a line the size changes, and with it what of `_WITH_SIZE`
    does; every other key has one value.
    """
    methods: dict[str, list[RunData]] = {}
    for run in data:
        if run.result:
            methods.setdefault(method_of(run.spec), []).append(run)
    found = {}
    for method, of_method in methods.items():
        keys = _splitting(of_method)
        groups: dict[str, list[RunData]] = {}
        for run in of_method:
            groups.setdefault(json.dumps([keys_of(run.spec)[key] for key in keys]), []).append(run)
        several = [group for group in groups.values() if len({run.batch for run in group}) > 1]
        jobs = [{key: keys_of(group[0].spec)[key] for key in keys} for group in several]
        for name, group in zip(told_apart([method] * len(several), jobs), several, strict=True):
            sizes = sorted({run.batch for run in group})
            found[name] = {size: [run for run in group if run.batch == size] for size in sizes}
    return found


def _splitting(data: Sequence[RunData]) -> list[str]:
    """The keys whose values lines do not share: of `_WITH_SIZE` only those that differ between runs of one size."""
    sizes: dict[int, list[dict[str, Any]]] = {}
    for run in data:
        sizes.setdefault(run.batch, []).append(keys_of(run.spec))
    within = {key for jobs in sizes.values() for key in differing(jobs)}
    every = differing([job for jobs in sizes.values() for job in jobs])
    return [key for key in every if key not in _WITH_SIZE or key in within]


def _flat(sections: Mapping[str, Any], before: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in sections.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{before}{key}.")
        else:
            yield before + key, value


def _text(value: object, others: Sequence[object]) -> str:
    """As short as it can be without being the text of another value."""
    shown = _short(value)
    return shown if all(other == value or _short(other) != shown for other in others) else json.dumps(value)


def _short(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return value if isinstance(value, str) else json.dumps(value)
