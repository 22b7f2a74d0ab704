"""The rates that the model of cost needs, measured on the spot: kernels in this process, messages by real processes."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from bench.codec_speed import TimedCodec
from bench.cost_model import FLOAT32_BYTES, KernelRates, WireRates
from bench.exchange import run_exchange
from bench.measure import Orders
from bench.processes import Say
from bench.settings import parse_codec, parse_topology, plan_settings
from bench.tensors import tensors_of
from common.codecs import SERVER, BlockScales, Encoded, RandomKey, SharedCodec
from common.codecs.shared import average_of_sums
from common.layout import plan_layout, pull_codec
from common.spec_sources import load_job_spec

_KERNEL_ELEMENTS = 1 << 20
_REPETITIONS = 7
_WIRE_ELEMENTS = 1 << 22
_BUCKET_BYTES = (1 << 20, 1 << 16)
_ROUNDS = 8
_LEAST_S = 1e-6


@dataclass(frozen=True, kw_only=True)
class LoopbackRow:
    """What a run on loopback took: CPU seconds of all its processes in a round, and the round's seconds."""

    cpu_s: float
    median_s: float
    buckets: int


def kernel_rates(codec: str, elements: int = _KERNEL_ELEMENTS) -> KernelRates:
    """Rates of one codec on this machine; `codec`: the short form.

    Encoding is what a worker does: with error feedback where the codec is biased, and codec `shared` with its scales.
    The sums of `shared` are timed with the bits that a few workers need; with 16 bits they take about as long.

    Raises:
        SpecError: it is none.
    """
    spec = load_job_spec(settings=parse_codec(codec))
    pull = pull_codec(plan_layout(tensors_of(elements), spec), spec, 0)
    values = np.random.default_rng(0).standard_normal(elements, dtype=np.float32)
    worker, scales = TimedCodec(spec.codec, values, elements), None
    worker.encode()
    total, result = values.copy(), np.zeros_like(values)
    if isinstance(worker.codec, SharedCodec):
        scales = BlockScales(first_block=0, values=worker.codec.local_scales(values, 0))
        total.fill(0)
        worker.decode(total)  # integers
    back = RandomKey(seed=0, round=0, source=SERVER)
    way_back = np.empty(pull.payload_bytes(0, elements), np.uint8)

    def finish() -> Encoded:
        if scales is None:
            np.divide(total, np.float32(1), out=total)
        return pull.encode(total, 0, back, pull.measure(total, 0), payload=way_back)

    pulled = finish()

    def decode() -> None:
        pull.decode(pulled, 0, result, add=False, key=back)
        if scales is not None:
            average_of_sums(worker.codec, result, 0, scales, spec.workers)

    return KernelRates(
        encode_s=_per_element(worker.encode, elements),
        decode_s=_per_element(decode, elements),
        add_s=_per_element(lambda: worker.decode(result), elements),
        finish_s=_per_element(finish, elements),
    )


def wire_rates(say: Say) -> WireRates:
    """Rates of messages, from real processes on loopback: the same vector in many messages and in few, and a tiny one.

    Raises:
        DatpsError: a run failed.
    """
    none = kernel_rates("none")
    few, many = (_run("dedicated", 1, _WIRE_ELEMENTS, size, say) for size in _BUCKET_BYTES)
    payload = 2 * FLOAT32_BYTES * _WIRE_ELEMENTS
    kernels_s = _WIRE_ELEMENTS * (none.encode_s + 2 * none.decode_s + none.finish_s)
    message_s, byte_s = split_costs(few, many, ends_per_bucket=4, kernels_s=kernels_s, end_bytes=2 * payload)
    ring_few, ring_many = (_run("collective", 2, _WIRE_ELEMENTS, size, say) for size in _BUCKET_BYTES)
    ring_wide = _run("collective", 4, _WIRE_ELEMENTS, _BUCKET_BYTES[-1], say)
    bucket_s, hop_s, ring_byte_s = ring_costs(ring_few, ring_many, ring_wide, _WIRE_ELEMENTS, none.add_s)
    tiny, ring_tiny = _run("dedicated", 1, 1000, 1 << 20, say), _run("collective", 2, 1000, 1 << 20, say)
    return WireRates(
        message_s=message_s,
        byte_s=byte_s,
        ring_bucket_s=bucket_s,
        ring_message_s=hop_s,
        ring_byte_s=ring_byte_s,
        latency_s=tiny.median_s / 2,
        ring_latency_s=ring_tiny.median_s / 4,  # all-reduce: two hops; header and state: one each
    )


def split_costs(
    few: LoopbackRow, many: LoopbackRow, *, ends_per_bucket: int, kernels_s: float, end_bytes: int
) -> tuple[float, float]:
    """CPU seconds per message and per byte at one end, from two runs that differ in the number of messages only.

    Args:
        few, many: with large buckets, with small ones.
        ends_per_bucket: message ends of one bucket over all processes.
        kernels_s: CPU seconds of the kernels in a round, over all processes.
        end_bytes: payload bytes of a round at all message ends.
    """
    message_s = (many.cpu_s - few.cpu_s) / (ends_per_bucket * (many.buckets - few.buckets))
    message_s = max(message_s, _LEAST_S)
    byte_s = (few.cpu_s - kernels_s - ends_per_bucket * few.buckets * message_s) / end_bytes
    return message_s, max(byte_s, 0.0)


def ring_costs(
    few: LoopbackRow, many: LoopbackRow, wide: LoopbackRow, elements: int, add_s: float
) -> tuple[float, float, float]:
    """CPU seconds of all-reduces: per bucket and worker, per message end, per byte at one end.

    Args:
        few, many: of two workers, with large buckets and with small ones.
        wide: of four workers, with the small buckets.
        elements: of the vector.
        add_s: of the kernel, per element.
    """
    vector = FLOAT32_BYTES * elements  # a ring of two sends as much, one of four half as much again
    both_s = max((many.cpu_s - few.cpu_s) / 2 / (many.buckets - few.buckets), _LEAST_S)  # u + 4 m'
    byte_s = max((few.cpu_s / 2 - elements * add_s - few.buckets * both_s) / (2 * vector), 0.0)
    left_s = wide.cpu_s / 4 - elements * add_s - 3 * vector * byte_s - wide.buckets * both_s  # 8 m' per bucket
    message_s = min(max(left_s / (8 * wide.buckets), _LEAST_S), both_s / 4)
    return both_s - 4 * message_s, message_s, byte_s


def _run(kind: str, workers: int, elements: int, bucket_bytes: int, say: Say) -> LoopbackRow:
    topology = parse_topology(kind, workers)
    settings = plan_settings(
        topologies=[topology],
        codecs=["none"],
        rates_bps=[None],
        gloo=False,
        elements=elements,
        settings=[f"exchange.bucket_bytes={bucket_bytes}"],
    )
    orders = Orders(workers=workers, elements=elements, rounds=_ROUNDS, warmup_rounds=2)
    (row,) = run_exchange(settings, orders, 1, lambda _text: None)["rows"]
    cpu_s = workers * row["worker_cpu_s"] + row["shards"] * row.get("server_cpu_s", 0.0)
    say(f"{kind}, {elements} elements in {row['buckets']} messages: {row['median_s']:.4f} s, CPU {cpu_s:.4f} s a round")
    return LoopbackRow(cpu_s=cpu_s, median_s=row["median_s"], buckets=row["buckets"])


def _per_element(work: Callable[[], Any], elements: int) -> float:
    """CPU seconds, the least of some repetitions, the first of which is not counted."""
    work()
    taken = []
    for _ in range(_REPETITIONS):
        started_s = time.process_time()
        work()
        taken.append(time.process_time() - started_s)
    return min(taken) / elements
