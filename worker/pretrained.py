"""Reading initial parameters from where a user has them: our run folders and checkpoints, safetensors, torch's files.

Files of torch are loaded with `weights_only=True`, and only where the user names the file itself.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from common.config import TransferSpec
from common.errors import DataError, SpecError, refusal
from worker.checkpoint import TENSORS, find_checkpoint, load_checkpoint
from worker.data import Dataset
from worker.local_files import refuse_unfit_init, sha256_of
from worker.models import draw_linear
from worker.randomness import Purpose
from worker.record import describe_classes
from worker.replica import has_average, model_tensors
from worker.transfer import Initialized, head_of, initialize, listed

_SAFETENSORS, _TORCH = frozenset({".safetensors"}), frozenset({".pt", ".pth", ".tar"})
_NESTS = ("state_dict", "model", "net", "model_state_dict")
"""Under which the usual repositories keep a `state_dict` among other things."""
_PARALLEL = "module."
_GLOBAL = re.compile(r"GLOBAL ([\w.]+)")


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Tensors by name, as the user's model calls them.

    Attributes:
        source: the file or checkpoint.
        sha256: of the file, in hex.
        tensors: on the CPU.
        classes: as `describe_classes` says it of the data that they were trained on; None where nobody knows.
        averaged: whether they are the averages that a run of ours judged (`optimizer.ema_decay`).
    """

    source: Path
    sha256: str
    tensors: Mapping[str, Tensor]
    classes: str | None
    averaged: bool = False

    def give(self, model: nn.Module, spec: TransferSpec, dataset: Dataset, seed: int) -> Initialized:
        """Initializes a model of ours; a new head is drawn from a stream of the job's `seed` and the weights' file.

        It may not be the head that `build_model` has drawn: with the seed of the training that the weights come from,
        this would be the one that their features grew up with, and each new class would begin as an old one.

        Raises:
            DataError: see `initialize`.
        """
        others = self.classes is not None and self.classes != describe_classes(dataset)
        told = initialize(
            model, self.tensors, spec.head, other_classes=others, source=str(self.source), averaged=self.averaged
        )
        if told.new:
            layer = model.get_submodule(head_of(model))
            assert isinstance(layer, nn.Linear)
            draw_linear(layer, seed, Purpose.HEAD, int(self.sha256[:16], 16))
        return told


def weights_file(path: Path) -> Path:
    """The file that a user means: itself, or the tensors of a checkpoint or of a run's newest one.

    Raises:
        SpecError: there is none, or it is of no known kind.
    """
    if path.is_dir():
        return find_checkpoint(path) / TENSORS
    if not path.is_file():
        raise SpecError(refusal("a file or folder that exists", "init", path))
    if path.suffix.lower() not in _SAFETENSORS | _TORCH:
        rule = f"a run folder, a checkpoint, or a file {', '.join(sorted(_SAFETENSORS | _TORCH))}"
        raise SpecError(refusal(rule, "init", path))
    return path


def initial_weights(spec: TransferSpec, path: Path | None) -> Weights | None:
    """What a new run starts from, read and checked; None if it starts from nothing.

    Raises:
        SpecError: no file where the job needs one or the other way round, or another file than the job's.
        DataError, CheckpointError: as `read_weights`.
    """
    refuse_unfit_init(spec, path)
    if path is None:
        return None
    weights = read_weights(path)
    if spec.sha256 not in (None, weights.sha256):
        rule = f"a file with sha256 {spec.sha256} (transfer.sha256)"
        raise SpecError(refusal(rule, "sha256", weights.sha256, str(weights.source)))
    return weights


def read_weights(path: Path) -> Weights:
    """Reads a checkpoint of ours or a file of tensors; nothing is unpickled but what torch takes for tensors.

    Of a checkpoint with averaged weights these are taken, as `open_model` does. A `state_dict` may be under a key of
    the usual repositories, and its names may have the prefix `module.`.

    Raises:
        SpecError: no such file.
        CheckpointError: a checkpoint that is damaged.
        DataError: a file without a `state_dict`, or with more than torch takes for tensors.
    """
    file = weights_file(path)
    digest = sha256_of(file)
    if path.is_dir():
        checkpoint = load_checkpoint(file.parent)
        averaged = has_average(checkpoint.tensors)
        return Weights(
            source=file.parent,
            sha256=digest,
            tensors=model_tensors(checkpoint.tensors, averaged=averaged),
            classes=_classes_in(checkpoint.data),
            averaged=averaged,
        )
    content = _safetensors(file) if file.suffix.lower() in _SAFETENSORS else _torch_file(file)
    return Weights(source=file, sha256=digest, tensors=_without_prefix(_state_dict(content, file)), classes=None)


def _safetensors(file: Path) -> object:
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise DataError(refusal("a safetensors file", "init", file, str(error))) from None


def _torch_file(file: Path) -> object:
    rule = "a file of torch that holds tensors and plain values only (its state_dict, saved alone, is one)"
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever is in the file; torch's own words advise to load it without care
        asked_for = _GLOBAL.search(str(error))
        content = asked_for.group(1) if asked_for else type(error).__name__
        raise DataError(refusal(rule, "content", content, str(file))) from None


def _state_dict(content: object, file: Path) -> Mapping[str, Tensor]:
    """The mapping of names to tensors that a file is, or has under one of the usual keys."""
    candidates = [content]
    if isinstance(content, Mapping):
        candidates += [content[nest] for nest in _NESTS if nest in content]
    for candidate in candidates:
        if (
            isinstance(candidate, Mapping)
            and candidate
            and all(isinstance(name, str) and isinstance(value, Tensor) for name, value in candidate.items())
        ):
            return candidate
    keys = listed([str(key) for key in content]) if isinstance(content, Mapping) else type(content).__name__
    raise DataError(refusal(f"a state_dict, alone or under {', '.join(_NESTS)}", "content", keys, str(file)))


def _without_prefix(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """`torch.nn.DataParallel` puts `module.` before every name."""
    while all(name.startswith(_PARALLEL) for name in tensors):
        tensors = {name.removeprefix(_PARALLEL): tensor for name, tensor in tensors.items()}
    return tensors


def _classes_in(data: str) -> str:
    """The part about classes of what `describe_data` said."""
    return data.partition(", ")[2]
