"""What a bench worker is told, and what it says: shared by our exchange and gloo, so that both are timed alike."""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np
import xxhash

from bench.gate import Gate
from common.codecs import Float32
from common.errors import DatpsError
from common.events import Emitter

TRACE = ".trace.json"
"""How the names of timelines end."""
WORKLOAD = "workload.json"
"""Name of a worker's orders."""
_RSS_UNIT = 1024 if sys.platform != "darwin" else 1


@dataclass(frozen=True, kw_only=True)
class OrdersFile:
    """A worker's orders as a JSON file."""

    def write(self, path: Path) -> None:
        """As JSON."""
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, path: str) -> Self:
        """The inverse of `write`."""
        return cls(**json.loads(Path(path).read_text()))


@dataclass(frozen=True, kw_only=True)
class Workload(OrdersFile):
    """The orders of a worker that exchanges a synthetic gradient.

    Attributes:
        elements: of the gradient vector; None for ResNet-50's.
        rounds: how many, the first `warmup_rounds` of them untimed.
        gate: path of the starting line.
        deadline_s: for joining, and for any one round.
        traces: folder for timelines; None: there are none.
        seed: of the gradients; each worker's differs.
    """

    elements: int | None
    rounds: int
    warmup_rounds: int
    gate: str
    deadline_s: float
    traces: str | None = None
    seed: int = 0


Given = TypeVar("Given", bound=OrdersFile)


def worker_main(
    arguments: list[str], orders: type[Given], work: Callable[[str, str, int, Given, Emitter], None]
) -> int:
    """A worker process, `python -m MODULE SERVER HOST WORKER_NUMBER ORDERS`; returns its exit code."""
    server, host, number, path = arguments
    emit = Emitter(f"worker-{number}", as_json=True)
    try:
        work(server, host, int(number), orders.read(path), emit)
    except DatpsError as error:
        emit("error", text=str(error), exit_code=error.exit_code)
        return error.exit_code
    return 0


def gradient_of(seed: int, worker: int, elements: int) -> Float32:
    """Standard normal, the same for the same arguments."""
    return np.random.default_rng([seed, worker]).standard_normal(elements, dtype=np.float32)


def digest_of(vector: Float32) -> str:
    """XXH3-128 of a vector's bytes, in hex."""
    return xxhash.xxh3_128_hexdigest(vector.data)


def run_rounds(
    workload: Workload,
    gate: Gate,
    gradient: Float32,
    average: Callable[[int, Float32, str], dict[str, Any]],
    emit: Emitter,
) -> str:
    """Runs all rounds; emits one `bench_round` each and a `bench_done`.

    Args:
        workload: how many.
        gate: the starting line.
        gradient: this worker's; not changed.
        average: called with (round, vector, digest of the average of the round before); replaces the vector by the
            average and returns what the event says beside the times.
        emit: where events go.

    Returns:
        The last average's digest.
    """
    vector, digest = np.empty_like(gradient), ""
    for round_ in range(workload.rounds):
        np.copyto(vector, gradient)
        gate.wait()
        cpu, start_s = resource.getrusage(resource.RUSAGE_SELF), time.monotonic()
        said = average(round_, vector, digest)
        end_s, cpu_after = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF)
        gate.wait()  # what follows must not take the others' cores
        digest = digest_of(vector)
        emit(
            "bench_round",
            round=round_,
            start_s=start_s,
            end_s=end_s,
            user_s=cpu_after.ru_utime - cpu.ru_utime,
            system_s=cpu_after.ru_stime - cpu.ru_stime,
            digest=digest,
            **said,
        )
    gate.wait()
    emit("bench_done", peak_rss_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _RSS_UNIT)
    return digest
