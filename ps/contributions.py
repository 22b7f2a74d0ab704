"""What a contribution must be before the rounds hear of it: meant for this server, of this stream, well encoded."""

from __future__ import annotations

from dataclasses import replace

from common.codecs import Encoded
from common.errors import CodecError, refusal
from common.wire.frames import BucketMessage
from common.wire.v1 import ps_pb2 as wire
from ps.lanes import Lane
from ps.outcome import RefusedError
from ps.reduce import ShardReducer

DIGEST_BYTES = 16
"""Of XXH3-128."""


def checked_content(contribution: BucketMessage, lane: Lane, reducer: ShardReducer, incarnation: int) -> Encoded | None:
    """The content of a contribution that may be added. Another shard's bucket is not looked at: the rounds refuse it.

    Args:
        contribution: as it came.
        lane: the stream that it came by.
        reducer: of this shard.
        incarnation: of this server process.

    Raises:
        RefusedError: it is for another server, not what this stream carries, or not well encoded.
    """
    if contribution.incarnation != incarnation:
        text = refusal(f"incarnation={incarnation}", "incarnation", contribution.incarnation)
        raise RefusedError(wire.REASON_INCARNATION, text)
    if len(contribution.parameter_digest) != DIGEST_BYTES:
        size = len(contribution.parameter_digest)
        raise RefusedError(wire.REASON_CONTENT, refusal(f"a digest of {DIGEST_BYTES} bytes", "digest_bytes", size))
    number, encoded = contribution.bucket, contribution.encoded
    if number not in reducer.buckets:
        return encoded
    if number not in lane.buckets:
        raise RefusedError(wire.REASON_BUCKET, refusal("a bucket of this stream", "bucket", number))
    if encoded is None:
        size = len(contribution.scales)
        raise RefusedError(wire.REASON_CONTENT, refusal("whole float32 scales", "scale_bytes", size))
    if lane.memory:
        if len(contribution.payload):
            rule, size = "an empty payload (node_memory: it lies in shared memory)", len(contribution.payload)
            raise RefusedError(wire.REASON_CONTENT, refusal(rule, "payload_bytes", size))
        encoded = replace(encoded, payload=lane.memory.contribution(contribution.round, number))
    try:
        reducer.check(number, contribution.codec, encoded)
    except CodecError as error:
        expected = reducer.push_codec_of(number).wire_name
        reason = wire.REASON_CONTENT if contribution.codec == expected else wire.REASON_CODEC
        raise RefusedError(reason, str(error)) from None
    return encoded
