"""The yardstick: one process of a gloo all-reduce in float32 of as many elements.

`python -m bench.gloo_worker STORE WORKERS WORKER_NUMBER WORKLOAD`; worker 0 opens the store at STORE (port 0: any free
one) and says where it listens.
"""

from __future__ import annotations

import sys
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from bench.gate import Gate
from bench.tensors import elements_of
from bench.workload import Workload, gradient_of, run_rounds
from common.codecs import Float32
from common.errors import DatpsError, PeerLostError
from common.events import Emitter


def run(store_address: str, workers: int, number: int, workload: Workload, emit: Emitter) -> None:
    """Meets the others and runs the rounds.

    Raises:
        DatpsError: another worker is gone.
    """
    torch.set_num_threads(1)
    host, _, port = store_address.rpartition(":")
    deadline = timedelta(seconds=workload.deadline_s)
    store = dist.TCPStore(
        host, int(port), world_size=workers, is_master=number == 0, timeout=deadline, wait_for_workers=False
    )
    if number == 0:
        emit("listening", address=f"{host}:{store.port}")
    dist.init_process_group("gloo", store=store, rank=number, world_size=workers, timeout=deadline)
    gradient = gradient_of(workload.seed, number, elements_of(workload.elements))

    def average(_round: int, vector: Float32, _digest: str) -> dict[str, Any]:
        tensor = torch.from_numpy(vector)
        dist.all_reduce(tensor)
        tensor /= workers
        return {}

    run_rounds(workload, Gate(workload.gate, workload.deadline_s), gradient, average, emit)
    dist.destroy_process_group()


def main(arguments: list[str]) -> int:
    """Runs one worker; returns its exit code."""
    store, workers, number, workload = arguments
    emit = Emitter(f"gloo-{number}", as_json=True)
    try:
        try:
            run(store, int(workers), int(number), Workload.read(workload), emit)
        except RuntimeError as error:  # torch.distributed's only kind
            raise PeerLostError(f"gloo: {error}") from None
    except DatpsError as error:
        emit("error", text=str(error), exit_code=error.exit_code)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
