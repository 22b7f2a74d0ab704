"""Contributions and averages on the wire without protobuf's copies: framed in place, read as views.

They are ordinary protobuf messages (`WorkerMessage.contribution`, `ServerMessage.average`), which any protobuf library
reads and writes. But protobuf copies a payload three times on its way out and twice on its way in, and these two
messages are all of the traffic. So we write their small fields with protobuf, their scales and payload ourselves, and
read what has the usual form ourselves; everything else is left to protobuf.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
from google.protobuf.message import DecodeError, Message
from numpy.typing import NDArray

from common.codecs import Encoded, Float32
from common.wire.buffers import new_buffer
from common.wire.rpc import Malformed
from common.wire.v1 import ps_pb2 as wire

_OUTER_TAG = 0x12
"""Of `WorkerMessage.contribution` and of `ServerMessage.average`: field 2, length-delimited."""
_SCALES_TAG, _PAYLOAD_TAG = 0x2A, 0x32
"""Fields 5 and 6 of both messages, length-delimited."""
_VARINT, _FIXED64, _BYTES = 0, 1, 2
_Message = TypeVar("_Message", bound=Message)


@dataclass(frozen=True, kw_only=True, slots=True)
class BucketMessage:
    """A received Contribution or Average.

    Attributes:
        scales: as sent, a whole number of float32 or not.
        payload: as sent, a view of the message.
        parameter_digest: of a contribution, else empty.
        size_bytes: of the whole message.
    """

    view: int = 0
    round: int = 0
    bucket: int = 0
    codec: str = ""
    scales: memoryview = field(default_factory=lambda: memoryview(b""))
    payload: memoryview = field(default_factory=lambda: memoryview(b""))
    parameter_digest: bytes = b""
    incarnation: int = 0
    size_bytes: int = 0

    @property
    def encoded(self) -> Encoded | None:
        """The content; None if its scales are no whole float32 values."""
        if len(self.scales) % 4:
            return None
        scales = np.frombuffer(self.scales, "<f4").astype(np.float32)  # a copy: aligned, and small
        return Encoded(scales=scales, payload=self.payload)


@dataclass(frozen=True, kw_only=True, slots=True)
class Frame:
    """A message to be sent, in the making: whoever asks for it fills `payload` and calls `put_scales` once.

    Attributes:
        data: the serialized message.
        payload: uint8, where the packed elements go.
    """

    data: bytes
    payload: NDArray[np.uint8]
    _scales: NDArray[np.uint8]

    def put_scales(self, scales: Float32) -> None:
        """Writes the scales."""
        self._scales[:] = scales.astype("<f4", copy=False).view(np.uint8)


def new_frame(header: wire.Contribution | wire.Average, scale_count: int, payload_bytes: int) -> Frame:
    """A frame for a message whose other fields are set in `header`."""
    small = header.SerializeToString()
    before_scales = small + _length_delimited(_SCALES_TAG, 4 * scale_count)
    before_payload = _length_delimited(_PAYLOAD_TAG, payload_bytes)
    inner = len(before_scales) + 4 * scale_count + len(before_payload) + payload_bytes
    start = _length_delimited(_OUTER_TAG, inner) + before_scales
    scales_start = len(start)
    payload_start = scales_start + 4 * scale_count + len(before_payload)
    data, view = new_buffer(payload_start + payload_bytes)
    view[:scales_start] = np.frombuffer(start, np.uint8)
    view[payload_start - len(before_payload) : payload_start] = np.frombuffer(before_payload, np.uint8)
    scales = view[scales_start : scales_start + 4 * scale_count]
    return Frame(data=data, payload=view[payload_start:], _scales=scales)


def read_worker_message(data: bytes) -> BucketMessage | wire.WorkerMessage | Malformed:
    """A message to a server: a contribution as `BucketMessage`, anything else as protobuf reads it."""
    return _read(data, wire.WorkerMessage, "contribution", _CONTRIBUTION)


def read_server_message(data: bytes) -> BucketMessage | wire.ServerMessage | Malformed:
    """A message to a worker: an average as `BucketMessage`, anything else as protobuf reads it."""
    return _read(data, wire.ServerMessage, "average", _AVERAGE)


def _number(name: str) -> tuple[str, int]:
    return name, _VARINT


_FIELDS = {1: _number("view"), 2: _number("round"), 3: _number("bucket"), 4: ("codec", _BYTES)}
_FIELDS |= {5: ("scales", _BYTES), 6: ("payload", _BYTES)}
_CONTRIBUTION = _FIELDS | {7: ("parameter_digest", _BYTES), 8: ("incarnation", _FIXED64)}
_AVERAGE = _FIELDS | {7: ("incarnation", _FIXED64)}


def _read(
    data: bytes, message_class: type[_Message], kind: str, fields: dict[int, tuple[str, int]]
) -> BucketMessage | _Message | Malformed:
    try:
        usual = _read_usual(data, fields)
    except (IndexError, KeyError, UnicodeDecodeError, ValueError):
        usual = None
    if usual is not None:
        return usual
    message = message_class()
    try:
        message.MergeFromString(data)
    except DecodeError as error:
        return Malformed(type_name=type(message).__name__, size_bytes=len(data), error=str(error))
    if message.WhichOneof("kind") != kind:
        return message
    content = getattr(message, kind)
    values = {name: getattr(content, name) for name, _ in fields.values()}
    for name in ("scales", "payload"):
        values[name] = memoryview(values[name])
    return BucketMessage(**values, size_bytes=len(data))


def _read_usual(data: bytes, fields: dict[int, tuple[str, int]]) -> BucketMessage | None:
    """Reads a message of one bucket and nothing else; None, or any error, if it has another form.

    Raises:
        IndexError, KeyError, ValueError: likewise.
    """
    if data[0] != _OUTER_TAG:
        return None
    size, place = _varint(data, 1)
    if place + size != len(data):
        return None
    values: dict[str, Any] = {}
    content = memoryview(data)
    while place < len(data):
        tag = data[place]
        name, wire_type = fields[tag >> 3]
        if tag & 7 != wire_type or tag > 0x7F:
            return None
        if name in values:  # the last one counts, but protobuf checks all of them
            return None
        if wire_type == _FIXED64:
            values[name] = int.from_bytes(data[place + 1 : place + 9], "little")
            place += 9
            continue
        number, place = _varint(data, place + 1)
        if wire_type == _BYTES:
            values[name] = content[place : place + number]
            place += number
        else:
            values[name] = number
    if place != len(data) or values.get("bucket", 0) > 0xFFFFFFFF:
        return None
    values["codec"] = str(values.get("codec", b""), "utf-8")
    if "parameter_digest" in values:
        values["parameter_digest"] = bytes(values["parameter_digest"])
    return BucketMessage(**values, size_bytes=len(data))


def _varint(data: bytes, place: int) -> tuple[int, int]:
    """The number at `place`, and the place after it.

    Raises:
        ValueError: longer than 9 bytes; protobuf knows what to do with that.
    """
    number = 0
    for shift in range(0, 63, 7):
        byte = data[place]
        place += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number, place
    raise ValueError("a varint of more than 9 bytes")


def _length_delimited(tag: int, size: int) -> bytes:
    out = bytearray([tag])
    while size > 0x7F:
        out.append(size & 0x7F | 0x80)
        size >>= 7
    out.append(size)
    return bytes(out)
