"""AutoAttack's standard version (Croce and Hein 2020) on one batch, by its authors' code in the package `pyautoattack`.

Four attacks, one after the other on the samples that still resist: APGD-CE, APGD-T (targeted, DLR loss, 9 target
classes), FAB-T (9 target classes), Square (5,000 queries). Other packages mean other attacks by this name.

Deviation: the suite runs on one batch after the other, instead of each attack on all samples; its random numbers are
those of `seed` in every batch, as in the original with a fixed seed.
"""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from typing import Any

import torch
from torch import Tensor, nn

from common.config import AttackNorm
from common.errors import SpecError, refusal
from worker.judging.requests import COMPONENTS, Request
from worker.judging.restarts import clean_batch, distances
from worker.judging.verdicts import Verdict

PACKAGE = "pyautoattack"
LEAST_CLASSES = 10
_NORMS = {AttackNorm.LINF: "Linf", AttackNorm.L2: "L2"}
_LOGGER = "auto-attack"


def refuse_unfit(classes: int, request: Request) -> None:
    """Looks for the package, and whether the suite fits the data.

    Raises:
        SpecError: the package is missing or its standard version is another one, or there are too few classes.
    """
    rule = f"at least {LEAST_CLASSES} classes (the standard suite's APGD-T and FAB-T take 9 target classes each)"
    if classes < LEAST_CLASSES:
        raise SpecError(refusal(rule, "classes", classes, f"{request.label}; pgd:50x10 takes any number"))
    try:
        suite = _suite(request, lambda images: images, torch.device("cpu"), 0)
    except ImportError as error:
        rule = f"the package {PACKAGE} (pip install 'datps[eval]')"
        raise SpecError(refusal(rule, "attack", request.label, str(error))) from None
    ours = (9, 9, 5000, 1, 1, 1)
    theirs = (
        *(suite.apgd_targeted.n_target_classes, suite.fab.n_target_classes, suite.square.n_queries),
        *(suite.apgd.n_restarts, suite.apgd_targeted.n_restarts, suite.fab.n_restarts),
    )
    if tuple(suite.attacks_to_run) != COMPONENTS or theirs != ours:
        rule = f"a version of {PACKAGE} with the standard suite of 2020 ({', '.join(COMPONENTS)})"
        raise SpecError(refusal(rule, "version", version(), ", ".join(suite.attacks_to_run)))


def version() -> str:
    """Of the package."""
    return metadata.version(PACKAGE)


def attack_batch(
    request: Request,
    model: nn.Module,
    images_NCHW: Tensor,
    labels_N: Tensor,
    *,
    seed: int,
    device: torch.device,
    begins: Callable[[str], None] = lambda _: None,
) -> Verdict:
    """The verdict of the standard suite, with the package's warnings; the global random state is as it was afterwards.

    Args:
        request: of AutoAttack.
        model: logits [N, K], K >= 10; `left_alone`.
        images_NCHW: float32 in [0, 1], on the CPU.
        labels_N: int64, on the CPU.
        seed: the job's.
        device: where the model is.
        begins: told the name of each attack of the suite before it runs.

    Returns:
        In the samples' order; its seconds are 0.
    """
    clean = clean_batch(model, images_NCHW, labels_N, device)
    predicted, distance, found_by = list(clean.predicted), list(clean.distance), list(clean.found_by)
    left = torch.tensor([sample for sample, stage in enumerate(found_by) if stage is None], dtype=torch.int64)
    warnings: list[str] = []
    if request.epsilon > 0:  # else nothing can be changed
        images, labels = images_NCHW.to(device), labels_N.to(device)
        # the suite overwrites logits, which may be a view of the very images
        suite = _suite(request, lambda batch: model(batch).clone(), device, seed)
        for stage in COMPONENTS:
            if len(left) == 0:
                break
            begins(stage)
            suite.attacks_to_run = [stage]
            there = left.to(device)
            with _own_random_state(device), _warnings(warnings), _own_trace():
                perturbed, now = suite.run_standard_evaluation(images[there], labels[there], batch_size=len(left))
            far = distances(perturbed, images[there], request.norm).tolist()
            wrong, classes = (now != labels[there]).cpu(), now.tolist()
            for position in wrong.nonzero().flatten().tolist():
                sample = int(left[position])
                predicted[sample], distance[sample], found_by[sample] = classes[position], far[position], stage
            left = left[~wrong]
    return Verdict(
        predicted=tuple(predicted),
        distance=tuple(distance),
        found_by=tuple(found_by),
        seconds=0.0,
        warnings=tuple(warnings),
    )


def warnings_of_the_whole(after: Mapping[str, float]) -> list[str]:
    """The package's warning where Square, which uses no gradient, finds what the others have not: over all samples.

    Args:
        after: RA after each attack of the suite, fractions.
    """
    told: list[str] = []
    with _warnings(told):
        checks = importlib.import_module(f"{PACKAGE}.checks")
        checks.check_square_sr(dict(after), logger=logging.getLogger(_LOGGER))
    return told


def _suite(request: Request, logits: Callable[[Tensor], Tensor], device: torch.device, seed: int) -> Any:
    package = importlib.import_module(PACKAGE)
    return package.AutoAttack(
        logits, norm=_NORMS[request.norm], eps=request.epsilon, seed=seed, version="standard", device=device
    )


@contextmanager
def _own_random_state(device: torch.device) -> Iterator[None]:
    """The package seeds the global generators; they are put back."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


@contextmanager
def _own_trace() -> Iterator[None]:
    """The package looks at the model's calls with `settrace`, which a debugger or a coverage tool may be using."""
    before = sys.gettrace()
    try:
        yield
    finally:
        sys.settrace(before)


@contextmanager
def _warnings(into: list[str]) -> Iterator[None]:
    """Collects what the package warns of; it logs."""

    class Collects(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            into.append(record.getMessage())

    logger, handler = logging.getLogger(_LOGGER), Collects(logging.WARNING)
    propagates = logger.propagate
    logger.addHandler(handler)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagates
