"""The services of ps.proto as gRPC handlers and stubs, built from the descriptor.

Generated service code would tie us to one grpcio version and turn bytes that are no message into an internal error.
Here such bytes reach the service as `Malformed`, so that it can refuse them with a reason.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.message import DecodeError, Message

from common.wire.v1 import ps_pb2

PROTOCOL_VERSION = 1
MAXIMAL_MESSAGE_BYTES = 4 << 20
COORDINATOR = "Coordinator"
AGGREGATOR = "Aggregator"


@dataclass(frozen=True, kw_only=True)
class Malformed:
    """Received bytes that are no message of the expected type."""

    type_name: str
    size_bytes: int
    error: str


def service_name(service: str) -> str:
    """Full name, e.g. `datps.v1.Coordinator`."""
    return str(ps_pb2.DESCRIPTOR.services_by_name[service].full_name)


def service_handler(
    service: str,
    implementations: Mapping[str, Callable[..., Any]],
    readers: Mapping[str, Callable[[bytes], Any]] | None = None,
) -> grpc.GenericRpcHandler:
    """A handler for all methods of a service.

    Args:
        service: name in ps.proto.
        implementations: coroutine functions `(request or request_iterator, context)` by method name; all of them.
        readers: by method name, what reads its requests instead of protobuf; it gives `Malformed` for other bytes.
    """
    handlers = {}
    for method in ps_pb2.DESCRIPTOR.services_by_name[service].methods:
        build = _handler_factory(method.client_streaming, method.server_streaming)
        handlers[method.name] = build(
            implementations[method.name],
            request_deserializer=(readers or {}).get(method.name)
            or _deserializer(_message_class(method.input_type.name)),
            response_serializer=_serialize,
        )
    return grpc.method_handlers_generic_handler(service_name(service), handlers)


def stub(
    channel: grpc.Channel, service: str, method_name: str, *, reader: Callable[[bytes], Any] | None = None
) -> Callable[..., Any]:
    """A callable for one method; on a streaming method it takes an iterator of requests.

    Requests may be messages or serialized messages; responses are messages, or what `reader` makes of them.
    """
    method = ps_pb2.DESCRIPTOR.services_by_name[service].methods_by_name[method_name]
    kind = f"{'stream' if method.client_streaming else 'unary'}_{'stream' if method.server_streaming else 'unary'}"
    build: Callable[..., Callable[..., Any]] = getattr(channel, kind)
    return build(
        f"/{service_name(service)}/{method_name}",
        request_serializer=_serialize,
        response_deserializer=reader or _message_class(method.output_type.name).FromString,
    )


def channel_options(
    keepalive_s: float, *, read_ahead_bytes: int | None = None, receive_buffer_bytes: int | None = None
) -> list[tuple[str, int]]:
    """Options of both sides: message limit, frames and HTTP/2 pings, which neither side has by default.

    Args:
        keepalive_s: interval of the pings, and how long one may stay unanswered.
        read_ahead_bytes: how much a stream's peer may send before it is read; None: what grpc finds best.
        receive_buffer_bytes: SO_RCVBUF of a client's connection; None: the kernel decides. Servers ignore it
            (`common.wire.listeners`).
    """
    interval_ms = int(keepalive_s * 1000)
    options = [
        ("grpc.max_receive_message_length", MAXIMAL_MESSAGE_BYTES),
        ("grpc.max_send_message_length", MAXIMAL_MESSAGE_BYTES),
        ("grpc.http2.max_frame_size", MAXIMAL_MESSAGE_BYTES),  # of 16 KiB by default: hundreds a message
        ("grpc.keepalive_time_ms", interval_ms),
        ("grpc.keepalive_timeout_ms", interval_ms),
        ("grpc.http2.ping_timeout_ms", interval_ms),  # its default of a minute outlasts the keepalive timeout
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
    ]
    if read_ahead_bytes is not None:
        options += [("grpc.http2.lookahead_bytes", read_ahead_bytes), ("grpc.http2.bdp_probe", 0)]
    if receive_buffer_bytes is not None:
        options.append(("grpc.tcp_receive_buffer_size", receive_buffer_bytes))
    return options


def server_options(keepalive_s: float, read_ahead_bytes: int) -> list[tuple[str, int]]:
    """Server's additions: pings may be as frequent as the clients', and a taken port is an error."""
    return [
        *channel_options(keepalive_s, read_ahead_bytes=read_ahead_bytes),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", max(1, int(keepalive_s * 500))),
        ("grpc.http2.max_ping_strikes", 0),
        ("grpc.so_reuseport", 0),
    ]


def _handler_factory(client_streaming: bool, server_streaming: bool) -> Callable[..., Any]:
    kind = f"{'stream' if client_streaming else 'unary'}_{'stream' if server_streaming else 'unary'}"
    factory: Callable[..., Any] = getattr(grpc, f"{kind}_rpc_method_handler")
    return factory


def _message_class(name: str) -> type[Message]:
    message_class: type[Message] = getattr(ps_pb2, name)
    return message_class


def _serialize(message: Message | bytes) -> bytes:
    """Messages that go to many peers are serialized once, by their sender."""
    return message if isinstance(message, bytes) else message.SerializeToString()


def _deserializer(message_class: type[Message]) -> Callable[[bytes], Message | Malformed]:
    def deserialize(data: bytes) -> Message | Malformed:
        try:
            return message_class.FromString(data)
        except DecodeError as error:
            return Malformed(type_name=message_class.__name__, size_bytes=len(data), error=str(error))

    return deserialize
