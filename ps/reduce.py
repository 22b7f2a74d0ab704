"""Ordered accumulation: sums of the buckets of one shard, and their averages, equation (A3).

Contributions are added in the order in which `add` is called, which the round state machine makes the order of
worker_index: float32 addition is not associative, and the same inputs have to give the same bytes. A bucket has memory
from its first contribution until its average is encoded, and the next bucket gets the same memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from common.codecs import SERVER, BlockScales, Codec, Encoded, Float32, RandomKey
from common.config import JobSpec
from common.errors import CodecError, refusal
from common.layout import Bucket, BucketKind, Layout, pull_codec, push_codec, state_codec

Place = Callable[[int, int, int], NDArray[np.uint8] | None]
"""(bucket, scales, payload bytes) -> where to encode its average; None: new memory."""


class ShardReducer:
    """Sums and averages of one shard. Not thread-safe, but for `check`, which changes nothing."""

    def __init__(self, layout: Layout, spec: JobSpec, shard: int) -> None:
        self._seed = spec.seed
        self._workers = np.float32(spec.workers)
        self._buckets = {bucket.number: bucket for bucket in layout.of_shard(shard)}
        self._pull = pull_codec(layout, spec, shard)
        self._push = push_codec(layout, spec)
        self._plain = state_codec(layout)
        self._together = self._find_together()
        self._undivided = self.added_in_any_order
        self._sums: dict[int, Float32] = {}
        self._free: list[Float32] = []
        self._longest = max((bucket.n for bucket in self._buckets.values()), default=0)
        self._start, stop = layout.encoder_range(shard)
        self._whole = np.zeros(stop - self._start if self._together else 0, np.float32)

    @property
    def published_together(self) -> frozenset[int]:
        """Buckets whose averages share scales, so that they are published together (rule 6 of the rounds)."""
        return self._together

    @property
    def added_in_any_order(self) -> frozenset[int]:
        """Buckets of integers, and of scales, of which the largest counts (rule 3 of the rounds)."""
        if not self._push.needs_shared_scales:
            return frozenset()
        return frozenset(n for n, bucket in self._buckets.items() if bucket.kind is not BucketKind.STATE)

    @property
    def buckets(self) -> Mapping[int, Bucket]:
        """This shard's buckets by number."""
        return self._buckets

    def push_codec_of(self, bucket: int) -> Codec:
        """The codec that contributions to a bucket must have."""
        return self._push if self._buckets[bucket].kind is BucketKind.GRADIENT else self._plain

    def pull_codec_of(self, bucket: int) -> Codec:
        """The codec of a bucket's average."""
        return self._pull if self._buckets[bucket].kind is BucketKind.GRADIENT else self._plain

    def check(self, number: int, codec: str, encoded: Encoded) -> None:
        """Checks a contribution before any of it is added.

        Raises:
            CodecError: another codec than the job's, wrong lengths, or content that is not finite.
        """
        bucket, expected = self._buckets[number], self.push_codec_of(number)
        if codec != expected.wire_name:
            raise CodecError(refusal(f"codec={expected.wire_name}", "codec", codec[:80]))
        expected.check(encoded, bucket.start, bucket.n)

    def add(self, number: int, encoded: Encoded, *, worker: int, round_: int, first: bool) -> None:
        """Adds a worker's checked contribution to its bucket's sum, or starts the sum with it."""
        bucket = self._buckets[number]
        total = self._begin_sum(bucket) if first else self._sums[number]
        if bucket.kind is BucketKind.SCALES and not first:
            scales = np.empty_like(total)
            self._plain.decode(encoded, bucket.start, scales, add=False)
            np.maximum(total, scales, out=total)
            return
        key = RandomKey(seed=self._seed, round=round_, source=worker)
        self.push_codec_of(number).decode(encoded, bucket.start, total, add=not first, key=key)

    def publish(
        self, round_: int, numbers: tuple[int, ...], place: Place = lambda *_: None
    ) -> Iterator[tuple[int, Encoded]]:
        """Averages of finished sums: divided by M and encoded, equation (A3) and Algorithm A1, line 10.

        Each bucket's is encoded when it is asked for, in the order of `numbers`.

        Raises:
            CodecError: an average is not finite; the message names the bucket.
        """
        key = RandomKey(seed=self._seed, round=round_, source=SERVER)
        for number in numbers:
            if number not in self._undivided:
                np.divide(self._sums[number], self._workers, out=self._sums[number])
        try:
            together = self._together.issuperset(numbers)
            measured = self._pull.measure(self._whole, self._start) if together else None
            for number in numbers:
                yield number, self._encode(self._buckets[number], key, measured, place)
        except CodecError as error:
            raise CodecError(f"{error}; average of round {round_}, buckets {list(numbers)}") from None

    def _find_together(self) -> frozenset[int]:
        if not self._pull.needs_whole_vector:
            return frozenset()
        return frozenset(n for n, bucket in self._buckets.items() if bucket.kind is BucketKind.GRADIENT)

    def _encode(self, bucket: Bucket, key: RandomKey, measured: BlockScales | None, place: Place) -> Encoded:
        codec = self.pull_codec_of(bucket.number)
        start, n = bucket.start, bucket.n
        payload = place(bucket.number, codec.scale_count(start, n), codec.payload_bytes(start, n))
        encoded = codec.encode(self._sums[bucket.number], start, key, measured, payload=payload)
        self._end_sum(bucket)
        return encoded

    def _begin_sum(self, bucket: Bucket) -> Float32:
        if bucket.number in self._together:
            memory = self._whole[bucket.start - self._start :]
        else:
            memory = self._free.pop() if self._free else np.empty(self._longest, np.float32)
        self._sums[bucket.number] = memory[: bucket.n]
        return self._sums[bucket.number]

    def _end_sum(self, bucket: Bucket) -> None:
        memory = self._sums.pop(bucket.number)
        if bucket.number not in self._together:
            assert isinstance(memory.base, np.ndarray)
            self._free.append(memory.base)
