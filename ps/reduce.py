"""Ordered accumulation: sums of the buckets of one shard, and their averages, equation (A3).

Contributions are added in the order in which `add` is called, which the round state machine makes the order of
worker_index: float32 addition is not associative, and the same inputs have to give the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from common.codecs import SERVER, BlockScales, Codec, Encoded, Float32, RandomKey
from common.config import JobSpec
from common.errors import CodecError, refusal
from common.layout import Bucket, BucketKind, Layout, pull_codec, push_codec, state_codec


class ShardReducer:
    """Sums and averages of one shard. Not thread-safe, but for `check`, which changes nothing."""

    def __init__(self, layout: Layout, spec: JobSpec, shard: int) -> None:
        self._layout = layout
        self._seed = spec.seed
        self._workers = np.float32(spec.workers)
        self._buckets = {bucket.number: bucket for bucket in layout.of_shard(shard)}
        self._pull = pull_codec(layout, spec, shard)
        self._push = push_codec(layout, spec)
        self._state = state_codec(layout)
        self._together = self._find_together()
        self._gradient_start = layout.shard_edges[shard]
        self._gradient_sum = np.zeros(layout.shard_edges[shard + 1] - self._gradient_start, np.float32)
        self._state_sums = {
            bucket.number: np.zeros(bucket.n, np.float32)
            for bucket in self._buckets.values()
            if bucket.kind is BucketKind.STATE
        }

    @property
    def published_together(self) -> frozenset[int]:
        """Buckets whose averages share scales, so that they are published together (rule 6 of the rounds)."""
        return self._together

    @property
    def buckets(self) -> Mapping[int, Bucket]:
        """This shard's buckets by number."""
        return self._buckets

    def push_codec_of(self, bucket: int) -> Codec:
        """The codec that contributions to a bucket must have."""
        return self._push if self._buckets[bucket].kind is BucketKind.GRADIENT else self._state

    def pull_codec_of(self, bucket: int) -> Codec:
        """The codec of a bucket's average."""
        return self._pull if self._buckets[bucket].kind is BucketKind.GRADIENT else self._state

    def check(self, number: int, codec: str, encoded: Encoded) -> None:
        """Checks a contribution before any of it is added.

        Raises:
            CodecError: another codec than the job's, wrong lengths, or content that is not finite.
        """
        bucket, expected = self._buckets[number], self.push_codec_of(number)
        if codec != expected.wire_name:
            raise CodecError(refusal(f"codec={expected.wire_name}", "codec", codec[:80]))
        expected.check(encoded, bucket.start, bucket.n)

    def add(self, number: int, encoded: Encoded, *, first: bool) -> None:
        """Adds a checked contribution to its bucket's sum, or starts the sum with it."""
        bucket = self._buckets[number]
        self.push_codec_of(number).decode(encoded, bucket.start, self._sum_of(bucket), add=not first)

    def publish(self, round_: int, numbers: tuple[int, ...]) -> dict[int, Encoded]:
        """Averages of finished sums: divided by M and encoded, equation (A3) and Algorithm A1, line 10.

        Raises:
            CodecError: an average is not finite; the message names the bucket.
        """
        key = RandomKey(seed=self._seed, round=round_, source=SERVER)
        for number in numbers:
            total = self._sum_of(self._buckets[number])
            np.divide(total, self._workers, out=total)
        try:
            together = self._together.issuperset(numbers)
            measured = self._pull.measure(self._gradient_sum, self._gradient_start) if together else None
            return {n: self._encode(self._buckets[n], key, measured) for n in numbers}
        except CodecError as error:
            raise CodecError(f"{error}; average of round {round_}, buckets {list(numbers)}") from None

    def _find_together(self) -> frozenset[int]:
        if not self._pull.needs_whole_vector:
            return frozenset()
        return frozenset(n for n, bucket in self._buckets.items() if bucket.kind is BucketKind.GRADIENT)

    def _encode(self, bucket: Bucket, key: RandomKey, measured: BlockScales | None) -> Encoded:
        values = self._sum_of(bucket)
        if bucket.kind is BucketKind.STATE:
            return self._state.encode(values, bucket.start, key)
        return self._pull.encode(values, bucket.start, key, measured)

    def _sum_of(self, bucket: Bucket) -> Float32:
        if bucket.kind is BucketKind.STATE:
            return self._state_sums[bucket.number]
        offset = bucket.start - self._gradient_start
        return self._gradient_sum[offset : offset + bucket.n]
