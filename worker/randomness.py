"""Streams of random numbers: each a function of what it is for, never of what was drawn before.

A stream's seed is a hash of (seed, purpose, counters), so that any round can be computed without replaying the ones
before it, whatever the number of processes or the order in which they run.
"""

from __future__ import annotations

import hashlib
from enum import StrEnum

import torch


class Purpose(StrEnum):
    """What a stream is for; streams of different purposes are independent."""

    PARAMETERS = "parameters"
    HEAD = "head"
    """The new head of a model that starts from another training's parameters."""
    PERMUTATION = "permutation"
    LABELED = "labeled"
    """Which samples keep their label."""
    UNLABELED = "unlabeled"
    """The permutations of the pseudo-labeled samples."""
    MIXTURE = "mixture"
    """Labeled and pseudo-labeled samples within a batch."""
    AUGMENTATION = "augmentation"
    ATTACK = "attack"
    EVALUATION = "evaluation"
    SELECTION_NOISE = "selection_noise"
    ESTIMATION_NOISE = "estimation_noise"
    SMOOTHING = "smoothing"
    OVERFITTING = "overfitting"
    VALIDATION = "validation"
    SUBSET = "subset"


def stream_seed(seed: int, purpose: Purpose, *counters: int) -> int:
    """Seed of one stream: 63 bits of BLAKE2b over (seed, purpose, counters).

    PyTorch's CPU generator keeps 32 of them: two streams may coincide by chance, which costs nothing here.
    """
    text = ":".join([str(seed), purpose.value, *map(str, counters)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def stream_generator(
    seed: int, purpose: Purpose, *counters: int, device: torch.device | str = "cpu"
) -> torch.Generator:
    """A new generator at the start of the stream (seed, purpose, counters), on `device`."""
    return torch.Generator(device=device).manual_seed(stream_seed(seed, purpose, *counters))


def round_generator(
    seed: int, round_: int, worker_index: int, purpose: Purpose, device: torch.device | str = "cpu"
) -> torch.Generator:
    """A new generator for what one worker draws in one round; a different device draws different numbers."""
    return stream_generator(seed, purpose, round_, worker_index, device=device)
