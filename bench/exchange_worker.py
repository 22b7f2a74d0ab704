"""A worker without training: joins a real server and exchanges a synthetic gradient, in any topology.

`python -m bench.exchange_worker SERVER HOST WORKER_NUMBER WORKLOAD`: the coordinator's address, this node's own, and a
file that `Workload` wrote.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from bench.gate import Gate
from bench.member import Member
from bench.tensors import tensors_of
from bench.workload import Workload, gradient_of, run_rounds, worker_main
from common.codecs import Float32
from common.events import Emitter
from common.layout import BucketKind, plan_layout
from worker.exchange.gradients import HostGradient

NO_DIGEST = bytes(16)


def run(server: str, host: str, number: int, workload: Workload, emit: Emitter) -> None:
    """Joins, runs the rounds, leaves.

    Raises:
        DatpsError: a server or another worker is gone, or refuses us.
    """
    with Member(server, host, emit, workload.deadline_s, workload.traces) as member:
        layout = plan_layout(tensors_of(workload.elements), member.spec)
        exchange = member.join(layout, NO_DIGEST)
        gradient, state = gradient_of(workload.seed, number, layout.d), np.zeros(layout.e, np.float32)
        buckets = [bucket.number for bucket in layout.of_kind(BucketKind.GRADIENT)]

        def average(round_: int, vector: Float32, digest: str) -> dict[str, Any]:
            start_ns = member.timeline.now_ns()
            exchange.begin(round_, HostGradient(vector), bytes.fromhex(digest) or NO_DIGEST)
            exchange.ready(buckets)
            traffic = exchange.finish(state)
            member.timeline.add("round", start_ns, "rounds", round=round_)
            return {"pushed_bytes": traffic.pushed_bytes, "pulled_bytes": traffic.pulled_bytes}

        gate = Gate(workload.gate, workload.deadline_s)
        member.final_digest = bytes.fromhex(run_rounds(workload, gate, gradient, average, emit))


if __name__ == "__main__":
    sys.exit(worker_main(sys.argv[1:], Workload, run))
