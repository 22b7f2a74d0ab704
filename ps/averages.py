"""Averages as messages: encoded in place, and once more without payload for a worker that shares this node's memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from common.node_memory import NodeMemory
from common.timeline import OFF, Timeline
from common.wire.frames import Frame, new_frame
from common.wire.v1 import ps_pb2 as wire
from ps.lanes import Lane
from ps.reduce import ShardReducer


@dataclass(frozen=True, slots=True)
class AverageMessage:
    """An average, serialized.

    Attributes:
        whole: as most workers get it.
        without_payload: for the worker that finds the payload in the node's memory.
    """

    whole: bytes
    without_payload: bytes = b""

    def to(self, lane: Lane) -> bytes:
        """What goes to a lane."""
        return self.without_payload if lane.memory else self.whole


def publish(
    reducer: ShardReducer,
    round_: int,
    buckets: Sequence[int],
    *,
    view: int,
    incarnation: int,
    memory: NodeMemory | None,
    timeline: Timeline = OFF,
) -> dict[int, AverageMessage]:
    """Averages finished sums, see `ShardReducer.publish`, straight into messages; returns them by bucket.

    The timeline gets an "average" of each bucket; what has to be done once for all of them is part of the first one's.

    Raises:
        CodecError: an average is not finite; the message names the bucket.
    """
    frames: dict[int, Frame] = {}

    def header(number: int) -> wire.Average:
        codec = reducer.pull_codec_of(number).wire_name
        return wire.Average(view=view, round=round_, bucket=number, codec=codec, incarnation=incarnation)

    def place(number: int, scale_count: int, payload_bytes: int) -> NDArray[np.uint8]:
        frames[number] = new_frame(header(number), scale_count, payload_bytes)
        return frames[number].payload

    messages, start_ns = {}, timeline.now_ns()
    for number, encoded in reducer.publish(round_, tuple(buckets), place):
        frame = frames[number]
        frame.put_scales(encoded.scales)
        messages[number] = AverageMessage(frame.data)
        if memory:
            memory.average(round_, number)[:] = frame.payload
            short = new_frame(header(number), encoded.scales.size, 0)
            short.put_scales(encoded.scales)
            messages[number] = AverageMessage(frame.data, without_payload=short.data)
        timeline.add_phase("average", start_ns, round_, number)
        start_ns = timeline.now_ns()
    return messages
