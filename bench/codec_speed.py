"""How long codecs take beside a copy of the same vector: in buckets, as in production, and on one thread."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from common.codecs import BlockScales, Codec, Encoded, Float32, RandomKey, SharedCodec, make_codec
from common.config import CodecSpec
from worker.exchange.feedback import ErrorFeedback

_KEY = RandomKey(seed=7, round=0, source=0)


@dataclass(frozen=True, kw_only=True)
class SpeedPlan:
    """Of the timing; see `bench.codecs.CodecPlan`."""

    elements: int
    bucket: int
    repeats: int


@dataclass(kw_only=True)
class Speeds:
    """Nanoseconds of an element, the least of all repeats."""

    copy_ns: float = float("inf")
    encode_ns: dict[str, float] = field(default_factory=dict)
    decode_ns: dict[str, float] = field(default_factory=dict)

    def row(self, name: str) -> dict[str, float]:
        """One codec's part of the result."""
        encode, decode = self.encode_ns[name], self.decode_ns[name]
        return {
            "encode_ns": encode,
            "encode_over_copy": encode / self.copy_ns,
            "decode_ns": decode,
            "decode_over_copy": decode / self.copy_ns,
        }


class TimedCodec:
    """One codec with all its memory, called bucket by bucket as a worker does: with error feedback, with scales."""

    def __init__(self, spec: CodecSpec, values: Float32, bucket: int) -> None:
        """
        Args:
            spec: the codec.
            values: what it encodes, the whole vector.
            bucket: elements of a bucket, a multiple of the codec's alignment.
        """
        d = len(values)
        self._values = values
        self._edges = [(a, min(a + bucket, d)) for a in range(0, d, bucket)]
        self.codec: Codec = make_codec(spec, start=0, stop=d, layer_edges=(0, d))
        self._feedback = ErrorFeedback(d) if self.codec.biased else None
        self._payloads = [np.empty(self.codec.payload_bytes(a, b - a), np.uint8) for a, b in self._edges]
        self._encoded: list[Encoded] = []

    def encode(self) -> None:
        """All buckets; with the scales of the whole vector where they are needed first."""
        codec, values, measured = self.codec, self._values, None
        if codec.needs_whole_vector:
            measured = codec.measure(values, 0)
        self._encoded = []
        for (a, b), payload in zip(self._edges, self._payloads, strict=True):
            if isinstance(codec, SharedCodec):
                scales = codec.local_scales(values[a:b], a)
                measured = BlockScales(first_block=codec.blocks(a, b - a).start, values=scales)
            if self._feedback is not None:
                encoded = self._feedback.encode(codec, values[a:b], a, _KEY, measured, payload=payload)
            else:
                encoded = codec.encode(values[a:b], a, _KEY, measured, payload=payload)
            self._encoded.append(encoded)

    def decode(self, out: Float32) -> None:
        """Adds all buckets."""
        for (a, b), encoded in zip(self._edges, self._encoded, strict=True):
            self.codec.decode(encoded, a, out[a:b], add=True, key=_KEY)


def speeds_of(variants: Mapping[str, CodecSpec], plan: SpeedPlan, say: Callable[[str], None]) -> Speeds:
    """Times all codecs, each beside a copy."""
    values = np.random.default_rng(0).standard_normal(plan.elements, np.float32)
    out, speeds = np.zeros_like(values), Speeds()
    edges = [(a, min(a + plan.bucket, plan.elements)) for a in range(0, plan.elements, plan.bucket)]

    def copy() -> None:
        for a, b in edges:
            np.copyto(out[a:b], values[a:b])

    for name, spec in variants.items():
        say(f"speed: {name}")
        timed = TimedCodec(spec, values, plan.bucket)
        timed.encode()
        timed.decode(out)  # compiled, and all memory is there
        encode = decode = float("inf")
        for _ in range(plan.repeats):
            speeds.copy_ns = min(speeds.copy_ns, _ns(copy) / plan.elements)
            encode = min(encode, _ns(timed.encode) / plan.elements)
            decode = min(decode, _ns(lambda: timed.decode(out)) / plan.elements)  # noqa: B023 (called at once)
        speeds.encode_ns[name], speeds.decode_ns[name] = encode, decode
    return speeds


def _ns(work: Callable[[], None]) -> int:
    start_ns = time.perf_counter_ns()
    work()
    return time.perf_counter_ns() - start_ns
