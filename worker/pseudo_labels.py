"""Files of pseudo-labeled images, and how their images come to be training samples beside the labeled ones.

A file is a safetensors file with `images` (uint8), `labels` (int64 [N]) and, if it was made here, `confidence` (float32
[N], the probability of the pseudo-label). Its header says how to read them: `layout`, NCHW or NHWC, and what may be
absent, as JSON: `maximum`, the integer that is 1.0 (255); `classes`, the names that the labels number; `held_back`,
which data set's labels were taken from these images; `made_by`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from common.config import DataSpec
from common.errors import DataError, SpecError, StorageError, refusal
from worker.data import Dataset, TensorSamples, Unlabeled
from worker.datasets import load_dataset
from worker.local_files import held_back_of, refuse_unfit_unlabeled
from worker.subsets import Joined

IMAGES, LABELS, CONFIDENCE = "images", "labels", "confidence"
_LAYOUTS = ("NCHW", "NHWC")


@dataclass(frozen=True, kw_only=True)
class PseudoLabels:
    """The content of a file.

    Attributes:
        images: uint8, in `layout`.
        labels: int64 [N].
        confidence: float32 [N].
        layout: NCHW or NHWC.
        maximum: what 1.0 is as an integer.
        classes: names; None if the file does not say.
        held_back: which data set's labels were taken from these images, see `held_back_of`.
        made_by: what its maker tells of itself.
    """

    images: Tensor
    labels: Tensor
    confidence: Tensor | None = None
    layout: str = "NCHW"
    maximum: int = 255
    classes: tuple[str, ...] | None = None
    held_back: Mapping[str, Any] | None = None
    made_by: Mapping[str, Any] = field(default_factory=dict)

    @property
    def channels_first(self) -> Tensor:
        """The images as uint8 [N, C, H, W], a view if need be."""
        return self.images if self.layout == "NCHW" else self.images.permute(0, 3, 1, 2)

    def digest(self) -> str:
        """XXH3-128 of pixels, as NCHW, and labels, in hex: the same whatever the file says beside them.

        Of `maximum`, too, where no pixel is as bright: elsewhere it is one of the pixels.
        """
        state = xxhash.xxh3_128()
        for images in torch.split(self.channels_first, 4096):  # copies a part at a time, if at all
            state.update(np.ascontiguousarray(images.numpy()).data)
        state.update(np.ascontiguousarray(self.labels.numpy()).data)
        if int(self.images.max()) < self.maximum:
            state.update(bytes([self.maximum]))
        return state.hexdigest()


def save_pseudo_labels(path: Path, content: PseudoLabels) -> None:
    """Writes a file, under a temporary name first.

    Raises:
        StorageError: the disk is full, or the folder cannot be written.
    """
    tensors = {IMAGES: content.images.contiguous(), LABELS: content.labels}
    if content.confidence is not None:
        tensors[CONFIDENCE] = content.confidence
    said = {"maximum": content.maximum, "classes": content.classes, "held_back": content.held_back}
    said |= {"made_by": dict(content.made_by)}
    header = {name: json.dumps(value) for name, value in said.items() if value is not None}
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.touch()
        usual_mode = temporary.stat().st_mode
        save_file(tensors, temporary, {"layout": content.layout, **header})
        temporary.chmod(usual_mode)  # safetensors lets nobody else read what it writes
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        raise StorageError(refusal("a folder with room to write", "path", path, str(error))) from None
    finally:
        temporary.unlink(missing_ok=True)


def load_pseudo_labels(path: Path) -> PseudoLabels:
    """Reads and checks a file; its tensors stay on the disk until they are used.

    Raises:
        DataError: missing, damaged, or not such a file.
    """
    try:
        with safe_open(path, framework="pt") as opened:
            header = dict(opened.metadata() or {})
        tensors = load_file(path)
        content = PseudoLabels(
            images=tensors[IMAGES],
            labels=tensors[LABELS],
            confidence=tensors.get(CONFIDENCE),
            layout=header["layout"],
            maximum=int(json.loads(header.get("maximum", "255"))),
            classes=tuple(map(str, json.loads(header["classes"]))) if "classes" in header else None,
            held_back=json.loads(header.get("held_back", "null")),
            made_by=json.loads(header.get("made_by", "{}")),
        )
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        rule = (
            "a file of pseudo-labeled images (safetensors with images, labels, and layout=NCHW or NHWC in its header)"
        )
        kind = type(error).__name__
        raise DataError(refusal(rule, "unlabeled", path, f"{kind}: {error}")) from None
    _refuse_unfit_content(content, path)
    return content


def load_training_data(
    spec: DataSpec, *, root: Path | None, download: bool = False, unlabeled: Path | None = None
) -> Dataset:
    """The data set of a job, with the pseudo-labeled images among its training samples if the job has any.

    Args:
        spec, root, download: see `load_dataset`.
        unlabeled: file of pseudo-labeled images.

    Raises:
        DataError, SpecError: as `load_dataset`; a file where there should be none, or the other way round, or one that
            does not fit the data.
    """
    refuse_unfit_unlabeled(spec, unlabeled)
    dataset = load_dataset(spec, root=root, download=download)
    return dataset if unlabeled is None else with_pseudo_labels(dataset, spec, unlabeled)


def with_pseudo_labels(dataset: Dataset, spec: DataSpec, path: Path) -> Dataset:
    """The data set with a file's images after its training samples.

    Raises:
        DataError: the file does not fit the data.
        SpecError: it is another one than the job names.
    """
    content = load_pseudo_labels(path)
    digest = digest_as_named(content, spec, path)
    images, labels, context = content.channels_first, content.labels, str(path)
    shape = (dataset.in_channels, dataset.image_size, dataset.image_size)
    if tuple(images.shape[1:]) != shape:
        rule = f"images of {'x'.join(map(str, shape))} pixels like the labeled ones"
        raise DataError(refusal(rule, "size", "x".join(map(str, images.shape[1:])), context))
    if content.classes is not None and content.classes != dataset.classes:
        raise DataError(
            refusal(f"classes {', '.join(dataset.classes)}", "classes", ", ".join(content.classes), context)
        )
    if not 0 <= int(labels.min()) <= int(labels.max()) < len(dataset.classes):
        rule = f"labels from 0 to {len(dataset.classes) - 1}"
        raise DataError(refusal(rule, "labels", f"{int(labels.min())} to {int(labels.max())}", context))
    _refuse_other_held_back(content.held_back, spec, context)
    pseudo_labeled = TensorSamples(images, labels, maximum=content.maximum)
    return replace(
        dataset,
        train=Joined(dataset.train, pseudo_labeled),
        unlabeled=Unlabeled(samples=len(labels), digest=digest),
    )


def digest_as_named(content: PseudoLabels, spec: DataSpec, path: Path) -> str:
    """The digest of a file's content, if the job names it or names none.

    Raises:
        SpecError: the job names another one.
    """
    digest = content.digest()
    if spec.unlabeled_digest not in (None, digest):
        rule = f"a file with digest {spec.unlabeled_digest} (data.unlabeled_digest)"
        raise SpecError(refusal(rule, "digest", digest, str(path)))
    return digest


def _refuse_other_held_back(said: Mapping[str, Any] | None, spec: DataSpec, context: str) -> None:
    """Images of this job's own data set must be those that it neither keeps the labels of nor validates on."""
    ours = held_back_of(spec)
    if said is None or said["name"] != ours["name"]:
        return
    if {**held_back_of(DataSpec()), **said} != ours:  # a file from before a key was written has its default
        rule = f"images whose labels this job does not keep ({ours})"
        raise DataError(refusal(rule, "held_back", said, context))


def _refuse_unfit_content(content: PseudoLabels, path: Path) -> None:
    images, labels = content.images, content.labels

    def require(fits: bool, rule: str, name: str, value: object) -> None:
        if not fits:
            raise DataError(refusal(rule, name, value, str(path)))

    require(content.layout in _LAYOUTS, " or ".join(_LAYOUTS), "layout", content.layout)
    require(images.dtype is torch.uint8 and images.dim() == 4, "uint8 of four dimensions", IMAGES, _kind(images))
    require(labels.dtype is torch.int64 and labels.dim() == 1, "int64 of one dimension", LABELS, _kind(labels))
    require(len(images) == len(labels) > 0, f"one label for each of {len(images)} images", LABELS, _kind(labels))
    require(images.numel() > 0, "images of at least one pixel", IMAGES, _kind(images))
    require(1 <= content.maximum <= 255, "maximum from 1 to 255", "maximum", content.maximum)
    brightest = 255 if content.maximum == 255 else int(images.max())
    require(brightest <= content.maximum, f"pixels up to maximum={content.maximum}", "brightest", brightest)
    held_back = content.held_back
    named = held_back is None or (isinstance(held_back, dict) and "name" in held_back)
    require(named, "the name of a data set", "held_back", held_back)


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
