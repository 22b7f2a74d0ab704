"""Making files of pseudo-labeled images: a model labels images, or a published file is converted once."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor, nn

from common.errors import DataError, SpecError, refusal
from worker.data import PixelSamples
from worker.datasets import IMAGE_SUFFIXES, ImageFiles, load_held_back
from worker.local_files import held_back_of
from worker.numpy_pickle import read_arrays
from worker.pseudo_labels import PseudoLabels, save_pseudo_labels
from worker.record import versions
from worker.trained import TrainedModel, open_model

HELD_BACK = "held-back"
"""Names the training images whose labels the model's job holds back."""
DATA, TARGETS = "data", "extrapolated_targets"
"""What the published file of Carmon et al. 2019 calls its images and pseudo-labels."""

Progress = Callable[[int, int], None]
"""(images labeled so far, of all)."""


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """What a model says of images: pixels uint8 [N, C, H, W], labels int64 [N], confidence float32 [N]."""

    pixels: Tensor
    labels: Tensor
    confidence: Tensor


def pseudo_label(
    model: str,
    data: str,
    out: Path,
    *,
    root: Path | None = None,
    progress: Progress = lambda _done, _of: None,
    **options: Any,
) -> dict[str, Any]:
    """Labels images with a model and writes them to a file; all pixels are held in memory.

    Args:
        model: see `open_model`.
        data: `held-back`, or a folder of images; folders in it are searched too, and their names mean nothing. Of a
            data folder with `train` in it, only that is searched: test images must not come among training images.
        out: the file; it must not exist.
        root: data folder of the model's job, if its data set needs one.
        progress: told after every batch.
        options: see `open_model`.

    Returns:
        What was done, in numbers; of held-back images also how many of the pseudo-labels are the true ones.

    Raises:
        SpecError, DataError, CheckpointError: as `open_model`; no images, or a file that is there already.
        StorageError: the file cannot be written.
    """
    refuse_unfit_output(out)
    opened = open_model(model, data=root, **options)
    held_back = data == HELD_BACK
    samples = load_held_back(opened.spec.data, root=root) if held_back else images_in(Path(data), opened)
    predictions = predict(opened, samples, progress)
    made_by = _about(opened)
    save_pseudo_labels(
        out,
        PseudoLabels(
            images=predictions.pixels,
            labels=predictions.labels,
            confidence=predictions.confidence,
            maximum=samples.maximum,
            classes=opened.dataset.classes,
            held_back=held_back_of(opened.spec.data) if held_back else None,
            made_by=made_by,
        ),
    )
    agreed = (predictions.labels == samples.labels).double().mean().item()
    return {
        "file": str(out),
        "images": len(predictions.labels),
        "model": opened.name,
        **{name: value for name, value in made_by.items() if name.endswith("digest")},
        "by_class": _by_class(predictions.labels, opened.dataset.classes),
        "mean_confidence": round(predictions.confidence.double().mean().item(), 4),
        **({"pseudo_label_accuracy": agreed} if held_back else {}),
    }


def convert_unlabeled(file: Path, out: Path) -> dict[str, Any]:
    """Converts a pickle of `data` (uint8 [N, H, W, C]) and `extrapolated_targets` (integers [N]).

    Raises:
        DataError: another pickle; it is read as `read_arrays` says.
        SpecError: the output is there already.
        StorageError: it cannot be written.
    """
    refuse_unfit_output(out)
    found = read_arrays(file)
    images, targets = (_array(found, name, file) for name in (DATA, TARGETS))
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3):
        rule = "uint8 images [N, H, W, C] of 1 or 3 channels"
        raise DataError(refusal(rule, DATA, f"{images.dtype} {list(images.shape)}", str(file)))
    if targets.dtype.kind not in "iu" or targets.shape != images.shape[:1] or not targets.size:
        rule = f"one integer for each of {len(images)} images"
        raise DataError(refusal(rule, TARGETS, f"{targets.dtype} {list(targets.shape)}", str(file)))
    if targets.min() < 0:
        raise DataError(refusal("class numbers from 0", TARGETS, int(targets.min()), str(file)))
    labels = torch.from_numpy(targets.astype(np.int64))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the array is read-only, and nobody writes to it
        pixels = torch.from_numpy(images)
    content = PseudoLabels(images=pixels, labels=labels, layout="NHWC", made_by={"converted": [DATA, TARGETS]})
    save_pseudo_labels(out, content)
    counts = {str(label): int((labels == label).sum()) for label in labels.unique().tolist()}
    return {"file": str(out), "images": len(labels), "size": "x".join(map(str, images.shape[1:])), "by_class": counts}


def refuse_unfit_output(out: Path) -> None:
    """Refuses a file that is there already, or whose folder is not, before any work is done.

    Raises:
        SpecError: the one or the other.
    """
    if out.exists():
        raise SpecError(refusal("a file that is not there yet", "out", out))
    if not out.parent.is_dir() or not os.access(out.parent, os.W_OK):
        raise SpecError(refusal("a file in a folder that can be written to", "out", out))


def images_in(folder: Path, opened: TrainedModel) -> PixelSamples:
    """The images of a folder at the size of the model's data, in order of their paths; their labels are all 0.

    Raises:
        DataError: no folder, or no images in it.
        SpecError: a model of images without colours.
    """
    searched = folder / "train" if (folder / "train").is_dir() else folder
    files = sorted(path for path in searched.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        rule = f"{HELD_BACK}, or a folder with images ({' '.join(sorted(IMAGE_SUFFIXES))})"
        raise DataError(refusal(rule, "data", folder, "no images" if searched.is_dir() else "no folder"))
    if opened.dataset.in_channels != 3:
        rule = "a model of images of 3 channels, as images in files are"
        raise SpecError(refusal(rule, "channels", opened.dataset.in_channels, opened.name))
    labels = torch.zeros(len(files), dtype=torch.int64)
    return ImageFiles(files, labels, size=opened.dataset.image_size, crop=True)


@torch.no_grad()
def predict(opened: TrainedModel, samples: PixelSamples, progress: Progress) -> Predictions:
    """The model's most probable class of every image, and its probability.

    Raises:
        SpecError: a model with another number of logits than the data has classes.
    """
    total, batch, classes = len(samples.labels), opened.spec.evaluation.batch, len(opened.dataset.classes)
    pixels = torch.empty(total, *samples.pixels(torch.arange(1)).shape[1:], dtype=torch.uint8)
    labels, confidence = torch.empty(total, dtype=torch.int64), torch.empty(total)
    for start in range(0, total, batch):
        part = slice(start, min(start + batch, total))
        pixels[part] = samples.pixels(torch.arange(part.start, part.stop))
        images = pixels[part].to(torch.float32).div_(samples.maximum)
        logits = opened.module(images.to(opened.device))
        if logits.shape != (part.stop - part.start, classes):
            rule = f"logits of {classes} classes"
            raise SpecError(refusal(rule, "logits", list(logits.shape), opened.name))
        probability, label = logits.float().softmax(dim=1).max(dim=1)
        labels[part], confidence[part] = label.cpu(), probability.cpu()
        progress(part.stop, total)
    return Predictions(pixels=pixels, labels=labels, confidence=confidence)


def _about(opened: TrainedModel) -> dict[str, Any]:
    """What a file says of the model that labeled it."""
    checkpoint = opened.checkpoint
    if checkpoint is None:
        return {"state_digest": _digest(opened.module), "versions": versions()}
    return {
        "parameter_digest": checkpoint.parameter_digest,
        "weights": opened.weights.value,
        "round": checkpoint.round,
        "architecture": opened.spec.model.name.value,
        "seed": opened.spec.seed,
        "versions": versions(),
    }


def _digest(module: nn.Module) -> str:
    """XXH3-128 of a module's state, in hex."""
    state = xxhash.xxh3_128()
    for name, tensor in module.state_dict().items():
        state.update(name.encode())
        state.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return state.hexdigest()


def _by_class(labels_N: Tensor, classes: tuple[str, ...]) -> dict[str, int]:
    counts = torch.bincount(labels_N, minlength=len(classes)).tolist()
    return dict(zip(classes, counts, strict=True))


def _array(found: Mapping[str, Any], name: str, file: Path) -> np.ndarray[Any, Any]:
    if not isinstance(found.get(name), np.ndarray):
        keys = ", ".join(sorted(found))
        raise DataError(refusal(f"arrays {DATA} and {TARGETS}", "keys", keys, str(file)))
    array: np.ndarray[Any, Any] = found[name]
    return array
