"""A trained model from wherever its user has it: a run folder, a checkpoint, or an attribute of a Python module."""

from __future__ import annotations

import copy
import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common.config import JobSpec
from common.errors import DatpsError, SpecError, refusal
from common.spec_sources import load_job_spec
from worker.checkpoint import Checkpoint, find_checkpoint, load_checkpoint
from worker.data import Dataset
from worker.datasets import load_dataset
from worker.models import build_model
from worker.replica import has_average, load_model
from worker.workplace import open_device, refuse_other_data


class Weights(StrEnum):
    """Which of a checkpoint's weights."""

    RAW = "raw"
    """Those that training went on with."""
    EMA = "ema"
    """Their exponential moving average, and that of the batch-norm statistics (`optimizer.ema_decay`)."""


@dataclass(frozen=True, kw_only=True)
class TrainedModel:
    """A model that is ready to be judged.

    Attributes:
        name: what the user called it; of a run folder, the checkpoint in it.
        module: logits [N, K] of images [N, C, H, W] in [0, 1]; on `device`, in eval mode.
        spec: the job it was trained in, with the user's settings on top; without a job, the settings alone.
        dataset: of `spec.data`.
        device: where the module is.
        checkpoint: where it comes from one.
        weights: which of the checkpoint's.
    """

    name: str
    module: nn.Module
    spec: JobSpec
    dataset: Dataset
    device: torch.device
    checkpoint: Checkpoint | None
    weights: Weights = Weights.RAW


def open_model(
    model: str,
    *,
    weights: str | None = None,
    settings: Sequence[str] = (),
    data: Path | None = None,
    device: str = "cpu",
    threads: int | None = None,
    environment: Mapping[str, str] | None = None,
    reserved: frozenset[str] = frozenset(),
) -> TrainedModel:
    """Opens a model and the data that it was made for.

    Args:
        model: a run folder (its newest checkpoint), a checkpoint, or `module:attribute`: an `nn.Module`, then copied,
            or a function that makes one without arguments. Python looks for it in the working directory too.
        weights: `raw` or `ema` of a checkpoint (see `Weights`); where absent the averaged ones, if there are any.
        data: data folder of the data set, if it needs one.
        settings, environment, reserved: see `load_job_spec`; `module:attribute` has no other job than these.
        device, threads: see `open_device`.

    Raises:
        SpecError: no such model, a bad setting or device, another model, or data that the model was not made for: it
            does not take its images, or its logits are not one for each of its classes.
        CheckpointError: the checkpoint is damaged.
        DataError: the data is missing.
    """
    sources = {"environment": environment, "settings": settings, "reserved": reserved}
    if _names_an_attribute(model):
        spec = load_job_spec(**sources)  # type: ignore[arg-type]
        module, checkpoint, chosen = _from_attribute(model), None, _chosen(model, {}, weights)
    else:
        checkpoint = load_checkpoint(find_checkpoint(Path(model)))
        text, name = checkpoint.spec.to_yaml(), str(checkpoint.path)
        spec = load_job_spec(yaml_text=text, yaml_name=name, **sources)  # type: ignore[arg-type]
        _refuse_other_model(checkpoint, spec)
        chosen = _chosen(name, checkpoint.tensors, weights)
        module = _from_checkpoint(checkpoint, chosen)
    target = open_device(device, threads)
    dataset = load_dataset(spec.data, root=data)
    if checkpoint:
        refuse_other_data(checkpoint, dataset)
    opened = TrainedModel(
        name=str(checkpoint.path) if checkpoint else model,
        module=module.to(target).eval(),
        spec=spec,
        dataset=dataset,
        device=target,
        checkpoint=checkpoint,
        weights=chosen,
    )
    _refuse_other_logits(opened)
    return opened


def _names_an_attribute(model: str) -> bool:
    """`package.module:attribute`, unless a path of that name exists."""
    module, colon, attribute = model.partition(":")
    names = [*module.split("."), *attribute.split(".")]
    return bool(colon) and all(name.isidentifier() for name in names) and not Path(model).exists()


def _from_attribute(model: str) -> nn.Module:
    module_name, _, attribute = model.partition(":")
    rule = "module:attribute, a torch module or a function that makes one"
    sys.path.insert(0, "")
    try:
        found: Any = importlib.import_module(module_name)
        for name in attribute.split("."):
            found = getattr(found, name)
        if isinstance(found, nn.Module):
            found = copy.deepcopy(found)  # what is opened changes its mode and device, and theirs is to stay as it is
        elif isinstance(found, Callable):  # type: ignore[arg-type]
            found = found()
    except DatpsError:
        raise
    except Exception as error:  # somebody else's module may raise anything
        raise SpecError(refusal(rule, "model", model, f"{type(error).__name__}: {error}")) from error
    finally:
        sys.path.remove("")
    if not isinstance(found, nn.Module):
        raise SpecError(refusal(rule, "model", model, type(found).__name__))
    return found


def _chosen(model: str, tensors: Mapping[str, Tensor], wanted: str | None) -> Weights:
    averaged = has_average(tensors)
    if wanted not in (None, *Weights):
        raise SpecError(refusal("raw or ema", "weights", wanted))
    if wanted == Weights.EMA and not averaged:
        rule = "weights=raw (trained without optimizer.ema_decay)"
        raise SpecError(refusal(rule, "weights", wanted, model))
    return Weights(wanted or (Weights.EMA if averaged else Weights.RAW))


def _from_checkpoint(checkpoint: Checkpoint, weights: Weights) -> nn.Module:
    module = build_model(
        checkpoint.spec.model,
        in_channels=checkpoint.in_channels,
        image_size=checkpoint.image_size,
        classes=checkpoint.classes,
        mean=checkpoint.mean,
        std=checkpoint.std,
        seed=checkpoint.spec.seed,
    )
    load_model(module, checkpoint.tensors, averaged=weights is Weights.EMA)
    return module


def _refuse_other_model(checkpoint: Checkpoint, spec: JobSpec) -> None:
    theirs, ours = (each.model.model_dump(mode="json") for each in (checkpoint.spec, spec))
    if ours != theirs:
        key = next(key for key in ours if ours[key] != theirs[key])
        rule = f"model.{key}={theirs[key]} as in the checkpoint"
        raise SpecError(refusal(rule, f"model.{key}", ours[key], str(checkpoint.path)))


def _refuse_other_logits(opened: TrainedModel) -> None:
    """Tries the model on two images of its data."""
    dataset, classes = opened.dataset, len(opened.dataset.classes)
    images = dataset.test.images(torch.arange(2)).to(opened.device)
    shape = f"[N, {', '.join(map(str, images.shape[1:]))}]"
    try:
        with torch.no_grad():
            logits = opened.module(images)
    except Exception as error:  # somebody else's module may raise anything
        reason = f"{type(error).__name__}: {error}".split("\n", maxsplit=1)[0]
        raise SpecError(refusal(f"a model of images {shape} ({dataset.name})", "model", opened.name, reason)) from error
    rule = f"a model with logits [N, {classes}], one for each class of {dataset.name}"
    if not isinstance(logits, torch.Tensor) or logits.dim() != 2 or len(logits) != 2 or logits.shape[1] != classes:
        got = (
            f"[N, {', '.join(map(str, logits.shape[1:]))}]"
            if isinstance(logits, torch.Tensor)
            else type(logits).__name__
        )
        raise SpecError(refusal(rule, "logits", got, opened.name))
