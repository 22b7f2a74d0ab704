"""The devices that a worker drives, as `--devices` says them."""

from __future__ import annotations

import re

from common.errors import SpecError, refusal

_RULE = "cpu:N (N processes), or cuda devices by number, each once (cuda:0,cuda:1)"
_PROCESSES = re.compile(r"cpu(?::([1-9][0-9]{0,2}))?")
_CUDA = re.compile(r"cuda:(0|[1-9][0-9]{0,2})")


def parse_devices(text: str) -> tuple[str, ...]:
    """One device for each local process: `cuda:0,cuda:1`, or `cpu:2` for two processes on the CPU.

    Raises:
        SpecError: anything else.
    """
    names = [name.strip() for name in text.split(",")]
    if len(names) == 1 and (several := _PROCESSES.fullmatch(names[0])):
        return ("cpu",) * int(several[1] or 1)
    if names == ["cuda"] or (all(_CUDA.fullmatch(name) for name in names) and len(set(names)) == len(names)):
        return tuple(names)
    raise SpecError(refusal(_RULE, "devices", repr(text)))


def describe(devices: tuple[str, ...], local_rank: int) -> str:
    """How a local process is named to people: `local process 1 of 2 (cuda:1)`."""
    return f"local process {local_rank} of {len(devices)} ({devices[local_rank]})"
