"""One process that judges: a model, its samples in batches, and the attacks that are asked for."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import xxhash
from torch import nn

from common.errors import SpecError, refusal
from worker.judging import autoattack, restarts
from worker.judging.requests import Name, Request
from worker.judging.verdicts import Verdict
from worker.trained import TrainedModel, open_model


class Unit(NamedTuple):
    """A piece of work: one attack on one batch."""

    attack: int | None
    """Which of the order's requests; None for the clean images."""
    batch: int


Begins = Callable[[Unit, str], None]
"""Told when a stage of a long attack begins."""


@dataclass(frozen=True, kw_only=True)
class Order:
    """What every process of an evaluation is told.

    Attributes:
        model, weights, data, settings, environment, reserved, threads: see `open_model`.
        model_digest: of the model that all of them must have.
        requests: the attacks.
        indices: of the samples in the test data.
        batch: images per forward pass.
    """

    model: str
    data: Path | None
    settings: tuple[str, ...]
    environment: Mapping[str, str]
    reserved: frozenset[str]
    threads: int | None
    model_digest: str
    requests: tuple[Request, ...]
    indices: tuple[int, ...]
    batch: int
    weights: str | None = None

    @property
    def batches(self) -> int:
        """How many there are; the last may be a partial one."""
        return -(-len(self.indices) // self.batch)

    def open(self, device: str) -> TrainedModel:
        """The model on a device.

        Raises:
            SpecError: the module makes another model in each process; or see `open_model`.
        """
        opened = open_model(
            self.model,
            weights=self.weights,
            settings=self.settings,
            data=self.data,
            device=device,
            threads=self.threads,
            environment=self.environment,
            reserved=self.reserved,
        )
        digest = model_digest(opened.module)
        if digest != self.model_digest:
            rule = f"the same model in every process (digest {self.model_digest})"
            raise SpecError(refusal(rule, "digest", digest, f"does {self.model} draw its parameters at random?"))
        return opened


class Judge:
    """Judges units in this process; the model is left as it was after each."""

    def __init__(self, opened: TrainedModel, order: Order) -> None:
        self._opened = opened
        self._order = order
        self._indices = torch.tensor(order.indices, dtype=torch.int64)

    def judge(self, units: Iterable[Unit], begins: Begins) -> Iterator[tuple[Unit, Verdict]]:
        """One after the other.

        Raises:
            SpecError: the device has too little memory.
        """
        for unit in units:
            yield unit, self.judge_one(unit, begins)

    def judge_one(self, unit: Unit, begins: Begins) -> Verdict:
        """See `judge`."""
        started_s = time.perf_counter()
        try:
            with restarts.left_alone(self._opened.module):
                verdict = self._judge(unit, begins)
        except torch.OutOfMemoryError as error:
            reason = str(error).split(". ", maxsplit=1)[0]
            raise SpecError(refusal("fewer images per forward pass", "batch", self._order.batch, reason)) from None
        return dataclasses.replace(verdict, seconds=time.perf_counter() - started_s)

    def _judge(self, unit: Unit, begins: Begins) -> Verdict:
        opened, order = self._opened, self._order
        indices = self._indices[unit.batch * order.batch : (unit.batch + 1) * order.batch]
        images, labels = opened.dataset.test.images(indices), opened.dataset.test.labels[indices]
        if unit.attack is None:
            return restarts.clean_batch(opened.module, images, labels, opened.device)
        request, seed = order.requests[unit.attack], opened.spec.seed
        if request.name is Name.AUTOATTACK:
            return autoattack.attack_batch(
                request,
                opened.module,
                images,
                labels,
                seed=seed,
                device=opened.device,
                begins=lambda stage: begins(unit, stage),
            )
        return restarts.attack_batch(
            request, opened.module, images, labels, indices_N=indices, seed=seed, device=opened.device
        )


def model_digest(module: nn.Module) -> str:
    """XXH3-128, in hex, of the names, shapes and values of all that a model's state_dict holds."""
    state = xxhash.xxh3_128()
    for name, tensor in sorted(module.state_dict().items()):
        if isinstance(tensor, torch.Tensor):
            state.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            state.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return state.hexdigest()
