"""The error and the bias of a codec on vectors: normal, heavy-tailed, and gradients of models on images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from common.codecs import BlockScales, Codec, Float32, RandomKey, SharedCodec, make_codec
from common.codecs.shared import average_of_sums
from common.config import CodecSpec, DatasetName, DataSpec, ModelName, ModelSpec
from worker.data import Dataset
from worker.datasets import load_dataset
from worker.models import build_model
from worker.optimizers import FlatParameters
from worker.readiness import backward_order

SYNTHETIC = 1 << 16
"""Elements of the synthetic vectors."""
HEAVY = "t (3)"
_SEED = 7
_HALF = 32
"""Estimates of each half of the bias test."""
_RUN = 512
"""Elements whose errors may depend on each other: the default block."""
_ROUNDS = 8
"""Encodings of each vector, for the errors."""
_TRAINED_STEPS, _BATCH, _LEARNING_RATE = 20, 64, 0.05


@dataclass(frozen=True, kw_only=True)
class Vectors:
    """Vectors of M workers, by name: float32 of shape (M, d)."""

    by_name: dict[str, Float32]
    biased_on: str = HEAVY
    """On which the bias is measured."""


@dataclass(frozen=True, kw_only=True)
class Errors:
    """Of one codec.

    Attributes:
        nmse: by vectors, `one`: of a contribution, `mean`: of the mean over the workers.
        squared_bias: as a part of |x|^2; an unbiased estimate of it, which may be negative.
        bias_standard_errors: of these.
    """

    nmse: dict[str, dict[str, float]]
    squared_bias: float
    bias_standard_errors: float

    def as_dict(self) -> dict[str, Any]:
        """For the result."""
        names = ("nmse", "squared_bias", "bias_standard_errors")
        return {name: getattr(self, name) for name in names}


def vectors(workers: int, data: Path | None = None) -> Vectors:
    """The vectors of so many workers; `data`: folder of CIFAR-10 for one more."""
    rng = np.random.default_rng(_SEED)
    normal, heavy = rng.standard_normal(SYNTHETIC), rng.standard_t(3, SYNTHETIC)
    by_name = {"normal": _shared(normal, workers), HEAVY: _shared(heavy, workers)}
    digits = load_dataset(DataSpec(name=DatasetName.DIGITS), root=None)
    for name in (ModelName.SMALL_CNN, ModelName.RESNET8):
        by_name[name.value] = gradients(name, digits, workers)
    if data is not None:
        cifar = load_dataset(DataSpec(name=DatasetName.CIFAR10), root=data)
        by_name["resnet20"] = gradients(ModelName.RESNET20, cifar, workers)
    return Vectors(by_name=by_name)


def _shared(values: NDArray[np.float64], workers: int) -> Float32:
    return np.tile(values.astype(np.float32), (workers, 1))


def gradients(name: ModelName, dataset: Dataset, workers: int, steps: int = _TRAINED_STEPS) -> Float32:
    """Gradients of M batches after `steps` steps of training, in the order of the flat vector: float32 (M, d)."""
    model = build_model(
        ModelSpec(name=name),
        in_channels=dataset.in_channels,
        image_size=dataset.image_size,
        classes=len(dataset.classes),
        mean=dataset.mean,
        std=dataset.std,
        seed=_SEED,
    )
    model.train()
    parameters = FlatParameters(model, backward_order(model, dataset.train.images(torch.arange(2))))
    generator = torch.Generator().manual_seed(_SEED)

    def gradient() -> torch.Tensor:
        batch = torch.randint(len(dataset.train.labels), (_BATCH,), generator=generator)
        parameters.gradient.zero_()
        functional.cross_entropy(model(dataset.train.images(batch)), dataset.train.labels[batch]).backward()
        return parameters.gradient.clone()

    for _ in range(steps):
        step = gradient()
        with torch.no_grad():
            parameters.theta.sub_(step, alpha=_LEARNING_RATE)
    return np.stack([gradient().numpy() for _ in range(workers)])


def errors_of(spec: CodecSpec, sets: Vectors) -> Errors:
    """Errors of a codec on all vectors."""
    nmse = {name: _nmse(spec, values) for name, values in sets.by_name.items()}
    squared, errors = _bias(spec, sets.by_name[sets.biased_on][0])
    return Errors(nmse=nmse, squared_bias=squared, bias_standard_errors=errors)


def _nmse(spec: CodecSpec, values: Float32) -> dict[str, float]:
    one, mean = [], []
    exact = values.mean(axis=0, dtype=np.float64)
    for round_ in range(_ROUNDS):
        estimates = [estimate(spec, [row], round_, worker) for worker, row in enumerate(values)]
        one += [_relative(found, row) for found, row in zip(estimates, values, strict=True)]
        together = estimate(spec, list(values), round_) if spec.name == "shared" else np.mean(estimates, axis=0)
        mean.append(_relative(together, exact))
    return {"one": float(np.mean(one)), "mean": float(np.mean(mean))}


def _relative(found: NDArray[np.floating], exact: NDArray[np.floating]) -> float:
    error = found.astype(np.float64) - exact
    return float((error**2).sum() / (exact.astype(np.float64) ** 2).sum())


def _bias(spec: CodecSpec, values: Float32) -> tuple[float, float]:
    """Squared bias, and its standard errors: errors of two independent means are orthogonal on average without bias."""
    halves = [
        np.mean([estimate(spec, [values], _ROUNDS + half * _HALF + k) for k in range(_HALF)], axis=0, dtype=np.float64)
        for half in range(2)
    ]
    products = ((halves[0] - values) * (halves[1] - values)).reshape(-1, _RUN).sum(axis=1)
    squared = float(products.sum() / (values.astype(np.float64) ** 2).sum())
    spread = float(np.sqrt((products**2).sum()))
    return squared, float(products.sum() / spread) if spread else 0.0


def estimate(spec: CodecSpec, rows: Sequence[Float32], round_: int, first_worker: int = 0) -> Float32:
    """What comes out for the mean of some workers' vectors, encoded whole by each of them."""
    d = len(rows[0])
    codec = make_codec(spec, start=0, stop=d, layer_edges=(0, d))
    measured, total = _measured(codec, rows), np.zeros(d, np.float32)
    for worker, values in enumerate(rows, start=first_worker):
        key = RandomKey(seed=_SEED, round=round_, source=worker)
        encoded = codec.encode(values, 0, key, measured if measured is not None else codec.measure(values, 0))
        codec.decode(encoded, 0, total, add=True, key=key)
    if measured is not None:
        average_of_sums(codec, total, 0, measured, len(rows))
        return total
    return total / np.float32(len(rows))


def _measured(codec: Codec, rows: Sequence[Float32]) -> BlockScales | None:
    """The scales that these workers share, where the codec needs any."""
    if not isinstance(codec, SharedCodec):
        return None
    return BlockScales(first_block=0, values=np.max([codec.local_scales(values, 0) for values in rows], axis=0))
