"""Exchange and Join spoken by hand, so that tests can say what no worker of ours would."""

from __future__ import annotations

import contextlib
import queue
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import numpy as np

from common.codecs import RandomKey
from common.config import JobSpec
from common.layout import TensorSpec, plan_layout, push_codec, state_codec
from common.wire import rpc
from common.wire.v1 import ps_pb2 as wire
from tests.support import (
    DEADLINE_S,
    DIGEST,
    TENSORS,
    RunningServer,
    introduce,
    join,
    ready,
)
from worker.exchange.coordination import tensor_messages


class RawStream:
    """An Exchange or Join stream that sends whatever it is told to."""

    def __init__(self, channel: grpc.Channel, path: str) -> None:
        self._outgoing: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        call = channel.stream_stream(path, request_serializer=None, response_deserializer=None)
        self._responses = call(iter(self._outgoing.get, None), timeout=DEADLINE_S)

    def put(self, data: bytes | Any) -> None:
        self._outgoing.put(data if isinstance(data, bytes) else data.SerializeToString())

    def next(self) -> wire.ServerMessage:
        return wire.ServerMessage.FromString(next(self._responses))

    def next_of(self, kind: str) -> Any:
        """The next message of a kind; passes over `waiting`."""
        while (message := self.next()).WhichOneof("kind") != kind:
            assert message.WhichOneof("kind") == "waiting", message
        return getattr(message, kind)

    def end(self) -> None:
        self._outgoing.put(None)
        self._responses.cancel()


EXCHANGE, JOIN = "/datps.v1.Aggregator/Exchange", "/datps.v1.Coordinator/Join"


@contextlib.contextmanager
def raw_channel(address: str) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(address) as channel:
        yield channel


class RawMember:
    """A view of two: one is `honest`; the other's Exchange, worker-1's unless said otherwise, is spoken by hand."""

    def __init__(
        self, spec: JobSpec, server: RunningServer, tensors: Sequence[TensorSpec] = TENSORS, index: int = 1
    ) -> None:
        self.spec = spec
        self.index = index
        self.layout = plan_layout(tensors, spec)
        self._stack = contextlib.ExitStack()
        with ThreadPoolExecutor(1) as pool:
            honest = pool.submit(join, server.address, f"worker-{1 - index}", tensors)
            channel, coordination, _ = introduce(server.address, f"worker-{index}")
            self._stack.callback(channel.close)
            self.admission = coordination.get_ready(ready(self.layout), DEADLINE_S)
            self.honest = honest.result(DEADLINE_S)
        self._stack.callback(self.honest.vanish)
        self.raw = self._stack.enter_context(raw_channel(server.address))

    def __enter__(self) -> RawMember:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def hello(self, **changes: Any) -> wire.WorkerMessage:
        values = {
            "protocol_version": rpc.PROTOCOL_VERSION,
            "job_id": self.spec.job_id,
            "job_digest": bytes.fromhex(self.spec.digest()),
            "view": self.admission.view,
            "coordinator_incarnation": self.admission.coordinator_incarnation,
            "worker_ids": self.admission.worker_ids,
            "worker_index": self.index,
            "shard": 0,
            "tensors": tensor_messages(self.layout.tensors),
            "layout_digest": self.layout.digest(),
            "round": 0,
        }
        return wire.WorkerMessage(hello=wire.Hello(**{**values, **changes}))

    def open(self, **changes: Any) -> tuple[RawStream, int]:
        stream = RawStream(self.raw, EXCHANGE)
        stream.put(self.hello(**changes))
        return stream, stream.next_of("welcome").incarnation

    def contribution(self, own: int, number: int, /, **changes: Any) -> wire.WorkerMessage:
        cut = self.layout.buckets[number]
        codec = push_codec(self.layout, self.spec) if cut.kind == "gradient" else state_codec(self.layout)
        key = RandomKey(seed=0, round=0, source=self.index)
        encoded = codec.encode(np.ones(cut.n, np.float32), cut.start, key)
        values = {
            "view": 1,
            "round": 0,
            "bucket": number,
            "codec": codec.wire_name,
            "scales": encoded.scales.tobytes(),
            "payload": bytes(encoded.payload),
            "parameter_digest": DIGEST,
            "incarnation": own,
        }
        return wire.WorkerMessage(contribution=wire.Contribution(**{**values, **changes}))

    def finish_round(self, stream: RawStream, incarnation: int, round_: int = 0) -> np.ndarray:
        """Contributes properly, as the honest worker does, and returns that one's average gradient."""
        gradient = np.ones(self.layout.d, np.float32)
        with ThreadPoolExecutor(1) as pool:
            state = np.ones(self.layout.e, np.float32)
            average = pool.submit(self.honest.exchange.average, round_, gradient, state, DIGEST)
            for bucket in range(len(self.layout.buckets)):
                stream.put(self.contribution(incarnation, bucket, round=round_))
            average.result(DEADLINE_S)
        return gradient
