"""What a Hello must say to be heard: who speaks, in which view, of which job."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from common.config import JobSpec
from common.errors import refusal
from common.layout import TensorSpec
from common.wire.rpc import PROTOCOL_VERSION
from common.wire.v1 import ps_pb2 as wire


@dataclass(frozen=True, kw_only=True)
class Expectation:
    """What a shard knows before a stream opens.

    Attributes:
        spec: the job.
        job_digest: of the job, in hex.
        shard: which shard this is.
        view: (coordinator_incarnation, view) that has formed; None: the first good Hello says it.
        worker_ids: likewise, by worker_index; empty: the first good Hello says them.
        shares_memory: whether the worker of this node can find payloads in memory.
    """

    spec: JobSpec
    job_digest: str
    shard: int
    view: tuple[int, int] | None
    worker_ids: tuple[str, ...]
    shares_memory: bool


def hello_refusal(hello: wire.Hello, expected: Expectation) -> tuple[int, str] | None:
    """Why a Hello is refused, reason and text; None if it is as expected so far."""
    spec, ids = expected.spec, tuple(hello.worker_ids)
    view = (hello.coordinator_incarnation, hello.view)
    expected_view = expected.view or view
    rules: list[tuple[int, str, object, object]] = [
        (wire.REASON_PROTOCOL_VERSION, "protocol_version", PROTOCOL_VERSION, hello.protocol_version),
        (wire.REASON_JOB, "job_id", spec.job_id, hello.job_id),
        (wire.REASON_JOB, "job_digest", expected.job_digest, hello.job_digest.hex()),
        (wire.REASON_BUCKET, "shard", expected.shard, hello.shard),
        (wire.REASON_VIEW, "coordinator_incarnation", expected_view[0], view[0]),
        (wire.REASON_VIEW, "view", expected_view[1], view[1]),
        (wire.REASON_VIEW, "workers", spec.workers, len(ids)),
        (wire.REASON_VIEW, "worker_ids", list(expected.worker_ids or ids), list(ids)),
    ]
    for reason, name, wanted, got in rules:
        if wanted != got:
            return reason, refusal(f"{name}={wanted}", name, got, f"Hello to shard {expected.shard}")
    if not expected.view and expected.shard == 0:
        return wire.REASON_VIEW, refusal("a view that has formed", "view", hello.view)
    if hello.worker_index >= spec.workers:
        return wire.REASON_VIEW, refusal(f"worker_index below {spec.workers}", "worker_index", hello.worker_index)
    if hello.node_memory and not (expected.shares_memory and hello.worker_index == expected.shard):
        return wire.REASON_MALFORMED, refusal("payloads in the messages", "node_memory", True)
    return None


def tensors_from(messages: Iterable[wire.Tensor]) -> list[TensorSpec]:
    """The layout's input as a worker sent it."""
    return [TensorSpec(name=m.name, shape=tuple(m.shape), buffer=m.buffer) for m in messages]
