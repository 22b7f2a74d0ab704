"""One worker's buckets as they are sent, whatever the topology: encoded, with errors that say where they are."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from common.codecs import BlockScales, Bytes, Codec, Encoded, Float32, RandomKey
from common.codecs.shared import SharedCodec, average_of_sums
from common.config import JobSpec
from common.errors import CodecError
from common.layout import Bucket, BucketKind, Layout, push_codec, state_codec
from worker.exchange.coordination import Admission
from worker.exchange.feedback import ErrorFeedback
from worker.exchange.gradients import GradientMemory, HostGradient

_NOTHING: Float32 = np.empty(0, np.float32)


class Encoder:
    """Encodes the buckets of one round after the other. Not thread-safe, but for `codec_of`."""

    def __init__(self, layout: Layout, spec: JobSpec, admission: Admission) -> None:
        self._layout = layout
        self._workers = spec.workers
        self._worker_id = admission.worker_ids[admission.worker_index]
        self._push = push_codec(layout, spec)
        self._plain = state_codec(layout)
        self.feedback = ErrorFeedback(layout.d) if self._push.biased else None
        """What earlier rounds left unsent; a worker's own state, of codecs that are biased."""
        self._key = RandomKey(seed=spec.seed, round=0, source=admission.worker_index)
        self._gradient: GradientMemory = HostGradient(_NOTHING)
        self._measured: BlockScales | None = None

    def begin(self, round_: int, gradient: GradientMemory) -> None:
        """A round begins; `gradient`: none of its buckets need be final yet."""
        self._key = replace(self._key, round=round_)
        self._gradient, self._measured = gradient, None
        gradient.begin(self._key)

    def codec_of(self, bucket: Bucket) -> Codec:
        """The codec of contributions to a bucket."""
        return self._push if bucket.kind is BucketKind.GRADIENT else self._plain

    def encode(
        self, bucket: Bucket, payload: Bytes, *, values: Float32 | None = None, shared: BlockScales | None = None
    ) -> Encoded:
        """Encodes a bucket into `payload`.

        Args:
            bucket: said to be final; where the codec sees the whole gradient, all of it is.
            payload: see `Codec.encode`.
            values: of a bucket of another vector than the gradient.
            shared: the scales that all workers share, for a gradient bucket of a codec that needs them.

        Raises:
            CodecError: a value is not finite or out of range; the message names bucket, layer, worker and round.
        """
        try:
            if values is not None:
                return self._plain.encode(values, bucket.start, self._key, payload=payload)
            return self._encode_gradient(bucket, payload, shared)
        except CodecError as error:
            raise self._located(error, bucket) from None

    def _encode_gradient(self, bucket: Bucket, payload: Bytes, shared: BlockScales | None) -> Encoded:
        codec, gradient = self._push, self._gradient
        if self._measured is None and codec.needs_whole_vector:
            self._measured = codec.measure(gradient.whole(), 0)
        measured = self._measured if codec.needs_whole_vector else shared
        if self.feedback is None:
            return gradient.encode(codec, bucket, measured, payload)
        return self.feedback.encode(codec, gradient.fetch(bucket), bucket.start, self._key, measured, payload=payload)

    def scales(self, bucket: Bucket) -> Float32:
        """The scales of a gradient bucket's blocks, of this worker alone: float32, one per block.

        Raises:
            CodecError: as `encode`.
        """
        assert isinstance(self._push, SharedCodec)
        try:
            return self._push.local_scales(self._gradient.fetch(bucket), bucket.start)
        except CodecError as error:
            raise self._located(error, bucket) from None

    def average(self, sums: Float32, start: int, shared: BlockScales) -> None:
        """Turns the sums of the workers' integers into their average, in place."""
        average_of_sums(self._push, sums, start, shared, self._workers)

    def check(self, bucket: Bucket, values: Float32) -> None:
        """Checks values that are sent as they are.

        Raises:
            CodecError: as `encode`.
        """
        try:
            require_finite(values, bucket, self._plain)
        except CodecError as error:
            raise self._located(error, bucket) from None

    def _located(self, error: CodecError, bucket: Bucket) -> CodecError:
        where = f"{bucket.kind.value} bucket {bucket.number}, {self._worker_id}, round {self._key.round}"
        if bucket.kind is BucketKind.GRADIENT:
            if self._push.needs_whole_vector:  # which has seen it in whatever bucket it is
                start, seen = 0, self._gradient.whole()
            else:
                start, seen = bucket.start, self._gradient.fetch(bucket)
            bad = np.flatnonzero(~np.isfinite(seen))
            where += f", layer {self._layout.layer_at(start + int(bad[0]))}" if bad.size else ""
        return CodecError(f"{error}; {where}")


def require_finite(values: Float32, bucket: Bucket, plain: Codec) -> None:
    """Refuses NaN and infinity in a bucket; `plain` is the codec `none`.

    Raises:
        CodecError: names the value and its index.
    """
    plain.check(Encoded(scales=_NOTHING, payload=values.view(np.uint8)), bucket.start, bucket.n)
