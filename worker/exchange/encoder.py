"""One worker's buckets as they are sent, whatever the topology: encoded, with errors that say where they are."""

from __future__ import annotations

import numpy as np

from common.codecs import BlockScales, Bytes, Codec, Encoded, Float32, RandomKey
from common.codecs.shared import SharedCodec, average_of_sums
from common.config import JobSpec
from common.errors import CodecError
from common.layout import Bucket, BucketKind, Layout, push_codec, state_codec
from worker.exchange.coordination import Admission
from worker.exchange.feedback import ErrorFeedback

_NO_SCALES: Float32 = np.empty(0, np.float32)


class Encoder:
    """Encodes the buckets of one round after the other. Not thread-safe, but for `codec_of`."""

    def __init__(self, layout: Layout, spec: JobSpec, admission: Admission) -> None:
        self._layout = layout
        self._seed = spec.seed
        self._workers = spec.workers
        self._worker_index = admission.worker_index
        self._worker_id = admission.worker_ids[admission.worker_index]
        self._push = push_codec(layout, spec)
        self._plain = state_codec(layout)
        self.feedback = ErrorFeedback(layout.d) if self._push.biased else None
        """What earlier rounds left unsent; a worker's own state, of codecs that are biased."""
        self._round = 0
        self._gradient: Float32 = np.empty(0, np.float32)
        self._measured: BlockScales | None = None

    def begin(self, round_: int, gradient: Float32) -> None:
        """A round begins; `gradient`: the whole vector, which need not be final yet."""
        self._round, self._gradient, self._measured = round_, gradient, None

    def codec_of(self, bucket: Bucket) -> Codec:
        """The codec of contributions to a bucket."""
        return self._push if bucket.kind is BucketKind.GRADIENT else self._plain

    def encode(self, bucket: Bucket, values: Float32, payload: Bytes, shared: BlockScales | None = None) -> Encoded:
        """Encodes a bucket of final values into `payload`; where the codec sees the whole vector, all of it is final.

        `shared`: the scales that all workers share, for a gradient bucket of a codec that needs them.

        Raises:
            CodecError: a value is not finite or out of range; the message names bucket, layer, worker and round.
        """
        codec = self.codec_of(bucket)
        key = RandomKey(seed=self._seed, round=self._round, source=self._worker_index)
        try:
            if self._measured is None and codec.needs_whole_vector:
                self._measured = codec.measure(self._gradient, 0)
            measured = self._measured if codec.needs_whole_vector else shared
            if self.feedback is not None and bucket.kind is BucketKind.GRADIENT:
                return self.feedback.encode(codec, values, bucket.start, key, measured, payload=payload)
            return codec.encode(values, bucket.start, key, measured, payload=payload)
        except CodecError as error:
            raise self._located(error, bucket, values) from None

    def scales(self, bucket: Bucket) -> Float32:
        """The scales of a gradient bucket's blocks, of this worker alone: float32, one per block.

        Raises:
            CodecError: as `encode`.
        """
        assert isinstance(self._push, SharedCodec)
        values = self._gradient[bucket.start : bucket.stop]
        try:
            return self._push.local_scales(values, bucket.start)
        except CodecError as error:
            raise self._located(error, bucket, values) from None

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
            raise self._located(error, bucket, values) from None

    def _located(self, error: CodecError, bucket: Bucket, values: Float32) -> CodecError:
        where = f"{bucket.kind.value} bucket {bucket.number}, {self._worker_id}, round {self._round}"
        if bucket.kind is BucketKind.GRADIENT:
            whole = self._push.needs_whole_vector  # which has seen it in whatever bucket it is
            start, seen = (0, self._gradient) if whole else (bucket.start, values)
            bad = np.flatnonzero(~np.isfinite(seen))
            where += f", layer {self._layout.layer_at(start + int(bad[0]))}" if bad.size else ""
        return CodecError(f"{error}; {where}")


def require_finite(values: Float32, bucket: Bucket, plain: Codec) -> None:
    """Refuses NaN and infinity in a bucket; `plain` is the codec `none`.

    Raises:
        CodecError: names the value and its index.
    """
    plain.check(Encoded(scales=_NO_SCALES, payload=values.view(np.uint8)), bucket.start, bucket.n)
