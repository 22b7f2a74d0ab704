"""What `datps evaluate` does: opens a model, runs the attacks that are asked for on its test data, and counts.

Without an attack it is the job's evaluation attack, and TA and RA are those that training reports.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from common.errors import SpecError, refusal
from common.spec_sources import ENVIRONMENT_PREFIX
from worker.data import Dataset
from worker.judging import autoattack
from worker.judging.folder import Folder
from worker.judging.judge import Judge, Order, model_digest
from worker.judging.processes import Processes
from worker.judging.requests import Name, Request, make_plan, parse_attack, parse_sweep
from worker.judging.run import Judging, Run, Unwatched, Watcher
from worker.local.devices import parse_devices
from worker.randomness import Purpose, stream_generator
from worker.trained import TrainedModel, open_model


def evaluate_model(
    model: str,
    *,
    attacks: Sequence[str] = (),
    sweeps: Sequence[str] = (),
    limit: int | None = None,
    batch: int | None = None,
    device: str = "cpu",
    devices: str | None = None,
    threads: int | None = None,
    out: Path | None = None,
    watcher: Watcher | None = None,
    weights: str | None = None,
    settings: Sequence[str] = (),
    data: Path | None = None,
    environment: Mapping[str, str] | None = None,
    reserved: frozenset[str] = frozenset(),
) -> dict[str, Any]:
    """TA, and RA under each attack, on the model's test data.

    Args:
        model, weights, settings, data, environment, reserved: see `open_model`.
        attacks: as `worker.judging.requests` reads them; where empty, the job's evaluation attack.
        sweeps: of those attacks; then only the sweeps' values are run, and there is no worst case over all.
        limit: judges that many samples, the first of a permutation that the job's seed draws.
        batch: images per forward pass instead of the job's.
        device, threads: see `open_device`.
        devices: several devices instead, one process each.
        out: folder for what came out for each sample; what is there already is not done again.
        watcher: is told how it goes on.

    Raises:
        SpecError: no such model, attack, sweep, device or package, or they do not fit together.
        CheckpointError, DataError, StorageError: as their names say.
        JudgeProcessError: one of several processes has failed.
    """
    parsed, swept = [parse_attack(text) for text in attacks], [parse_sweep(text) for text in sweeps]
    device, several = _places(device, devices)
    batches = () if batch is None else (f"evaluation.batch={batch}",)
    ours = {name: text for name, text in (environment or {}).items() if name.startswith(ENVIRONMENT_PREFIX)}
    sources: dict[str, Any] = {"weights": weights, "settings": (*settings, *batches), "data": data}
    sources |= {"environment": ours, "reserved": reserved}
    opened = open_model(model, device="cpu" if several else device, threads=threads, **sources)
    plan = make_plan(parsed, swept, opened.spec)
    _refuse_unfit(opened, plan.requests)
    order = Order(
        model=model,
        **sources,
        threads=threads_of_each(threads, several),
        model_digest=model_digest(opened.module),
        requests=plan.requests,
        indices=choose(opened.dataset, limit, opened.spec.seed),
        batch=opened.spec.evaluation.batch,
    )
    folder = Folder(out, order.model_digest) if out else None
    run = Run(opened=opened, order=order, plan=plan, watcher=watcher or Unwatched(), folder=folder)
    with _judging(opened, order, several) as judging:
        run.judge(judging)
    return run.conclude(several or (str(opened.device),))


def _places(device: str, devices: str | None) -> tuple[str, tuple[str, ...]]:
    """This process's device, and those of several processes, if there are to be several."""
    several = parse_devices(devices) if devices else ()
    return (several[0], ()) if len(several) == 1 else (device, several)


def _refuse_unfit(opened: TrainedModel, requests: Sequence[Request]) -> None:
    """Looks whether the attacks can use the model, before any of them runs."""
    refuse_unfit_logits(opened)
    for request in requests:
        if request.name is Name.AUTOATTACK:
            autoattack.refuse_unfit(len(opened.dataset.classes), request)


def choose(dataset: Dataset, limit: int | None, seed: int) -> tuple[int, ...]:
    """Which samples of the test data to judge: the first `limit` of a permutation of the seed, in rising order.

    Raises:
        SpecError: there are fewer.
    """
    samples = len(dataset.test.labels)
    if limit is None:
        return tuple(range(samples))
    if not 1 <= limit <= samples:
        raise SpecError(refusal(f"1 to {samples} samples ({dataset.name})", "limit", limit))
    permutation = torch.randperm(samples, generator=stream_generator(seed, Purpose.SUBSET))
    return tuple(sorted(permutation[:limit].tolist()))


def refuse_unfit_logits(opened: TrainedModel) -> None:
    """Looks whether an attack can use the model: it needs the gradient of its logits with respect to the images.

    Raises:
        SpecError: there is none.
    """
    images = opened.dataset.test.images(torch.arange(1)).to(opened.device).requires_grad_()
    with torch.enable_grad():
        logits = opened.module(images)
    if not logits.requires_grad:
        rule = "a model whose logits have a gradient with respect to the images"
        raise SpecError(refusal(rule, "model", opened.name, "does it detach them, or run in no_grad?"))


def threads_of_each(threads: int | None, devices: tuple[str, ...]) -> int | None:
    """Threads of each process: where nobody says, processes on the CPU share what torch would use for one."""
    if threads is None and len(devices) > 1 and devices[0] == "cpu":
        return max(1, torch.get_num_threads() // len(devices))
    return threads


@contextmanager
def _judging(opened: TrainedModel, order: Order, devices: tuple[str, ...]) -> Iterator[Judging]:
    """What judges units: this process, or one for each device."""
    if not devices:
        yield Judge(opened, order).judge
        return
    with Processes(order, devices) as processes:
        yield processes.judge
