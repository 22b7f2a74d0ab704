"""Frames: what we write, protobuf reads; what protobuf writes, we read; always as protobuf reads it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from google.protobuf.message import DecodeError
from hypothesis import example, given, settings
from hypothesis import strategies as st

from common.wire.buffers import new_buffer
from common.wire.frames import BucketMessage, new_frame, read_server_message, read_worker_message
from common.wire.rpc import Malformed
from common.wire.v1 import ps_pb2 as wire

U64 = st.integers(0, (1 << 64) - 1)
U32 = st.integers(0, (1 << 32) - 1)
CONTRIBUTIONS = st.fixed_dictionaries(
    {
        "view": U64,
        "round": U64,
        "bucket": U32,
        "codec": st.text(max_size=40),
        "scales": st.integers(0, 40).map(lambda n: np.arange(n, dtype="<f4").tobytes()),
        "payload": st.binary(max_size=300),
        "parameter_digest": st.binary(max_size=20),
        "incarnation": U64,
    }
)


def seen(message: Any) -> dict[str, Any]:
    """All fields of a message as bytes and numbers."""
    values = {name: getattr(message, name) for name in ("view", "round", "bucket", "codec", "incarnation")}
    contents = {name: bytes(getattr(message, name)) for name in ("scales", "payload")}
    return values | contents | {"parameter_digest": bytes(getattr(message, "parameter_digest", b""))}


@given(CONTRIBUTIONS)
@settings(max_examples=200, deadline=None)
def test_protobuf_reads_what_we_write(fields: dict[str, Any]) -> None:
    header = wire.Contribution(**{name: value for name, value in fields.items() if name not in ("scales", "payload")})
    frame = new_frame(header, len(fields["scales"]) // 4, len(fields["payload"]))
    frame.payload[:] = np.frombuffer(fields["payload"], np.uint8)
    frame.put_scales(np.frombuffer(fields["scales"], "<f4"))
    message = wire.WorkerMessage.FromString(frame.data)
    assert message.WhichOneof("kind") == "contribution"
    assert seen(message.contribution) == fields
    assert seen(read_worker_message(frame.data)) == fields
    assert read_worker_message(frame.data).size_bytes == len(frame.data)


@given(CONTRIBUTIONS)
@settings(max_examples=200, deadline=None)
def test_we_read_what_protobuf_writes(fields: dict[str, Any]) -> None:
    contribution = wire.WorkerMessage(contribution=wire.Contribution(**fields)).SerializeToString()
    assert seen(read_worker_message(contribution)) == fields
    del fields["parameter_digest"]
    average = wire.ServerMessage(average=wire.Average(**fields)).SerializeToString()
    assert seen(read_server_message(average)) == fields | {"parameter_digest": b""}


PIECES = st.one_of(
    st.binary(max_size=6),
    st.sampled_from([b"\x08\x01", b"\x10\x80\x01", b"\x18\xff\xff\xff\xff\xff\x01", b"\x22\x02\xff\xfe", b"\x22\x01a"]),
    st.sampled_from([b"\x2a\x04abcd", b"\x32\x03xyz", b"\x3a\x02dd", b"\x41" + bytes(8), b"\x48\x01", b"\x30\x01"]),
    st.sampled_from([b"\x13\x14", b"\x08" + b"\x80" * 9 + b"\x01", b"\x08" + b"\xff" * 10, b"\xaa\x00\x04abcd"]),
)


def framed(inner: bytes, *, outer: bytes = b"\x12") -> bytes:
    assert len(inner) < 128
    return outer + bytes([len(inner)]) + inner


WIRES = st.one_of(
    st.lists(PIECES, max_size=8).map(lambda pieces: framed(b"".join(pieces)[:127])),
    st.lists(PIECES, max_size=8).map(lambda pieces: framed(b"".join(pieces)[:120]) + framed(b"\x08\x05")),
    st.lists(PIECES, max_size=5).map(b"".join),
    st.binary(max_size=40),
)


@given(WIRES)
@settings(max_examples=1500, deadline=None)
@example(b"")
@example(b"\x12\x00")
@example(framed(b"\x08\x01\x08\x02"))  # a field twice: the last one counts
@example(framed(b"\x18\xff\xff\xff\xff\xff\x01"))  # more than 32 bits for a uint32: cut off
@example(framed(b"\x41\x01\x02"))  # cut off in a number
@example(framed(b"\x32\x05ab"))  # cut off in the payload
@example(framed(b"\x22\x02\xff\xfe"))  # a codec that is no text
@example(framed(b"\x22\x02\xff\xfe\x22\x01a"))  # the same, and then one that is
@example(framed(b"\x08\x01") + framed(b"\x10\x02"))  # two contributions in one message: merged
def test_whatever_the_bytes_are_we_see_what_protobuf_sees(data: bytes) -> None:
    got = read_worker_message(data)
    try:
        expected = wire.WorkerMessage.FromString(data)
    except DecodeError:
        assert isinstance(got, Malformed)
        assert (got.type_name, got.size_bytes) == ("WorkerMessage", len(data))
        return
    if expected.WhichOneof("kind") == "contribution":
        assert isinstance(got, BucketMessage)
        assert seen(got) == seen(expected.contribution)
    else:
        assert got == expected


def test_a_payload_is_a_view_of_the_message_not_a_copy() -> None:
    header = wire.Contribution(codec="none")
    frame = new_frame(header, 0, 1 << 16)
    frame.payload[:] = 7
    received = read_worker_message(frame.data)
    assert received.payload.obj is frame.data
    assert set(received.payload) == {7}


def test_scales_that_are_no_whole_numbers_are_no_content() -> None:
    message = wire.WorkerMessage(contribution=wire.Contribution(scales=b"abcde")).SerializeToString()
    assert read_worker_message(message).encoded is None


def test_scales_are_aligned_wherever_they_lie_in_the_message() -> None:
    for shift in range(8):
        contribution = wire.Contribution(codec="c" * shift, scales=np.arange(5, dtype="<f4").tobytes())
        encoded = read_worker_message(wire.WorkerMessage(contribution=contribution).SerializeToString()).encoded
        assert encoded.scales.flags.aligned
        assert encoded.scales.tolist() == [0, 1, 2, 3, 4]


def test_a_buffer_is_the_bytes_that_are_written_into_it() -> None:
    data, view = new_buffer(1000)
    view[:] = np.arange(1000) % 251
    assert type(data) is bytes
    assert data == bytes(i % 251 for i in range(1000))


def test_tiny_buffers_are_refused_since_python_shares_them() -> None:
    with pytest.raises(ValueError, match="expected at least 2 bytes, got size=1"):
        new_buffer(1)
