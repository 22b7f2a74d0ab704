"""Checkpoints: a folder `round-000150`, or `best`, with `state.safetensors` and `state.json`.

Both are written under a temporary name, flushed to the disk and renamed together, so a checkpoint is whole or absent.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from common.config import JobSpec
from common.errors import CheckpointError, SpecError, StorageError, refusal
from common.spec_sources import job_spec_from_json
from worker.selection import Selection

FORMAT = 2
TENSORS, DESCRIPTION = "state.safetensors", "state.json"
BEST = "best"
"""The checkpoint of the model that did best on validation data; it is kept whatever else is removed."""
_NAME = re.compile(r"round-(\d{6,})")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A saved state: after `round` rounds, of `rounds` in all; `selection` is what early stopping remembers."""

    path: Path
    spec: JobSpec
    round: int
    rounds: int
    classes: int
    in_channels: int
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    data: str
    tensors: Mapping[str, Tensor]
    selection: Selection = field(default_factory=Selection)


def checkpoint_name(round_: int) -> str:
    """`round-000150`."""
    return f"round-{round_:06d}"


def save_checkpoint(
    folder: Path, tensors: Mapping[str, Tensor], description: Mapping[str, Any], *, keep: int, best: bool = False
) -> Path:
    """Saves a state as `<folder>/round-<round>` or `<folder>/best`, and removes all but the `keep` newest and `best`.

    Args:
        folder: `checkpoints/` of a run.
        tensors: on the CPU.
        description: JSON-able: round, rounds, spec (a mapping) and what `Checkpoint` names beside them.
        keep: how many to keep, at least 1.
        best: under which of the names.

    Raises:
        StorageError: the disk is full, or the folder cannot be written.
    """

    def write(temporary: Path) -> None:
        temporary.mkdir()
        save_file(dict(tensors), temporary / TENSORS)
        content = {"format": FORMAT, **description, "tensors_xxh3_128": _digest(temporary / TENSORS)}
        (temporary / DESCRIPTION).write_text(json.dumps(content, indent=1) + "\n")

    path = _put(folder / (BEST if best else checkpoint_name(description["round"])), write)
    for old in _all(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return path


def copy_best(source: Path, folder: Path) -> None:
    """Makes a checkpoint the best one of a folder of checkpoints, `source` stays.

    Raises:
        StorageError: the disk is full, or the folder cannot be written.
    """
    _put(folder / BEST, lambda temporary: shutil.copytree(source, temporary))


def best_checkpoint(folder: Path, round_: int | None) -> Path | None:
    """The best checkpoint in a folder of checkpoints, if it is that of this round."""
    path = folder / BEST
    return path if round_ is not None and _said_round(path) == round_ else None


def _put(path: Path, write: Callable[[Path], object]) -> Path:
    """Writes a folder under a temporary name, flushes it and puts it into its place, where there may be an old one."""
    folder = path.parent
    temporary = folder / f".{path.name}.{uuid.uuid4().hex}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write(temporary)
        for file in (*temporary.iterdir(), temporary):
            _flush(file)
        if path.exists():
            path.rename(folder / f".{path.name}.{uuid.uuid4().hex}")
        temporary.rename(path)
        _flush(folder)
    except (OSError, SafetensorError) as error:
        raise StorageError(refusal("a folder with room to write", "path", folder, str(error))) from None
    finally:
        _sweep(folder)
    return path


def forget_after(folder: Path, round_: int) -> None:
    """Removes the checkpoints of later rounds: a run that goes on from an earlier one abandons them."""
    for path in _all(folder) if folder.is_dir() else []:
        if _round_of(path) > round_:
            shutil.rmtree(path, ignore_errors=True)
    best = _said_round(folder / BEST)
    if best is None or best > round_:
        shutil.rmtree(folder / BEST, ignore_errors=True)


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that a user means: the folder itself, or the newest one of a run folder.

    Raises:
        SpecError: there is none.
    """
    if (path / DESCRIPTION).is_file() or (path / TENSORS).is_file():
        return path
    for folder in (path / "checkpoints", path):
        if folder.is_dir() and (found := _all(folder)):
            return found[-1]
    raise SpecError(refusal("a checkpoint, or a run folder with checkpoints", "path", path, "none found"))


def has_checkpoints(path: Path) -> bool:
    """Whether a run folder has any checkpoint."""
    return (path / "checkpoints").is_dir() and bool(_all(path / "checkpoints"))


def load_checkpoint(path: Path) -> Checkpoint:
    """Reads and checks a checkpoint; nothing is unpickled.

    Raises:
        CheckpointError: cut off, damaged, or of an unknown format.
    """
    try:
        description = json.loads((path / DESCRIPTION).read_text())
        if description["format"] != FORMAT:
            raise CheckpointError(refusal(f"format={FORMAT}", "format", description["format"], str(path)))
        expected, got = description["tensors_xxh3_128"], _digest(path / TENSORS)
        if expected != got:
            raise CheckpointError(refusal(f"tensors_xxh3_128={expected}", "tensors_xxh3_128", got, f"damaged: {path}"))
        return Checkpoint(
            path=path,
            spec=job_spec_from_json(json.dumps(description["spec"])),
            tensors=load_file(path / TENSORS),
            data=str(description["data"]),
            mean=tuple(description["mean"]),
            std=tuple(description["std"]),
            selection=Selection.from_json(description.get("selection")),
            **{name: int(description[name]) for name in ("round", "rounds", "classes", "in_channels", "image_size")},
        )
    except (OSError, ValueError, KeyError, TypeError, SafetensorError, SpecError) as error:
        kind = type(error).__name__
        raise CheckpointError(refusal("a whole checkpoint", "path", path, f"{kind}: {error}")) from None


def _all(folder: Path) -> list[Path]:
    return sorted((path for path in folder.iterdir() if _NAME.fullmatch(path.name)), key=_round_of)


def _round_of(path: Path) -> int:
    return int(path.name.removeprefix("round-"))


def _said_round(path: Path) -> int | None:
    """The round that a checkpoint says it is of; None if it is not whole."""
    try:
        return int(json.loads((path / DESCRIPTION).read_text())["round"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _sweep(folder: Path) -> None:
    """Removes what an interrupted save, of this process or one before, has left."""
    for path in (*folder.glob(".round-*"), *folder.glob(f".{BEST}.*")):
        shutil.rmtree(path, ignore_errors=True)


def _digest(file: Path) -> str:
    state = xxhash.xxh3_128()
    with file.open("rb") as stream:
        while part := stream.read(1 << 22):
            state.update(part)
    return state.hexdigest()


def _flush(path: Path) -> None:
    """Asks the operating system to write a file or folder out; some file systems cannot for folders."""
    descriptor = os.open(path, os.O_RDONLY)
    with contextlib.suppress(OSError):
        os.fsync(descriptor)
    os.close(descriptor)
