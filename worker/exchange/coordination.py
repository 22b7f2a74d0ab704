"""The worker's side of the control plane: Join and Leave."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass

import grpc

from common.config import JobSpec, Topology
from common.errors import DatpsError, MismatchError, PeerLostError, clipped, refusal
from common.events import Emitter
from common.layout import Layout, TensorSpec
from common.spec_sources import job_spec_from_json
from common.wire import rpc
from common.wire.v1 import ps_pb2 as wire

LEAVE_S = 5.0
LOOK_S = 0.5
GOOD_ENDINGS = (wire.ENDING_COMPLETED, wire.ENDING_STOPPED)


@dataclass(frozen=True, kw_only=True)
class End:
    """How our part ends, as Goodbye and Leave say it."""

    ending: wire.Ending
    text: str = ""
    retry: bool = True

    @classmethod
    def after(cls, error: BaseException) -> End:
        """The end that an error of ours means: one that peers caused is passed on, not claimed."""
        if isinstance(error, (PeerLostError, MismatchError)):
            return cls(ending=wire.ENDING_ABORTED, text=str(error), retry=isinstance(error, PeerLostError))
        text = str(error) if isinstance(error, DatpsError) else f"defect: {error!r}"
        return cls(ending=wire.ENDING_FAILED, text=clipped(text))


@dataclass(frozen=True, kw_only=True)
class Admission:
    """This worker's place in the view.

    Attributes:
        shard_addresses: host:port by shard; with dedicated servers, shard 0 is reached as the coordinator is.
        worker_addresses: what each worker said of itself when it was ready, by worker_index, if they said anything.
    """

    worker_index: int
    view: int
    worker_ids: tuple[str, ...]
    samples: tuple[int, ...]
    shard_addresses: tuple[str, ...]
    coordinator_incarnation: int
    worker_addresses: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ReadyReplica:
    """What a worker says of itself when it is ready.

    Attributes:
        address: host:port that it serves on, if the topology asks for one.
    """

    layout: Layout
    replica_digest: bytes
    round: int
    samples: int
    classes: str
    address: str = ""


def connect(
    address: str, deadline_s: float, keepalive_s: float, give_up: Callable[[], None] = lambda: None
) -> grpc.Channel:
    """Opens a channel and waits until its server answers.

    Args:
        address: host:port.
        deadline_s: how long to wait.
        keepalive_s: interval of the HTTP/2 pings.
        give_up: called now and then; raises if waiting has become pointless.

    Raises:
        PeerLostError: no server answers within the deadline.
    """
    channel = grpc.insecure_channel(address, options=rpc.channel_options(keepalive_s))
    ready, until_s = grpc.channel_ready_future(channel), time.monotonic() + deadline_s
    try:
        while (left_s := until_s - time.monotonic()) > 0:
            with suppress(grpc.FutureTimeoutError):
                ready.result(timeout=min(left_s, LOOK_S))
                return channel
            give_up()
    except BaseException:
        channel.close()
        raise
    channel.close()
    raise PeerLostError(refusal(f"a server that answers within {deadline_s:g} s", "server", address))


class Coordination:
    """One worker's Join stream: opened at the start, open until it leaves."""

    def __init__(self, channel: grpc.Channel, address: str, worker_id: str, emit: Emitter) -> None:
        self._channel = channel
        self._address = address
        self._worker_id = worker_id
        self._emit = emit
        self._incarnation = 0
        self._view = 0
        self._topology = Topology.DEDICATED
        self._outgoing: queue.SimpleQueue[wire.JoinRequest | None] = queue.SimpleQueue()
        self._responses = rpc.stub(channel, rpc.COORDINATOR, "Join")(self._requests())
        self._watcher: threading.Thread | None = None
        self._left = False

    def _shard_addresses(self, admission: wire.Admission) -> tuple[str, ...]:
        match self._topology:
            case Topology.DEDICATED:
                return (self._address, *admission.shard_addresses[1:])
            case Topology.COLOCATED:
                return tuple(admission.worker_addresses)
            case Topology.COLLECTIVE:
                return ()

    def introduce(self, job_id: str | None, deadline_s: float) -> JobSpec:
        """Says who we are; returns the job spec.

        Raises:
            MismatchError: the server refuses us.
            PeerLostError: the server is gone or does not answer in time, or has no place for us now.
        """
        introduction = wire.Introduction(
            protocol_version=rpc.PROTOCOL_VERSION, job_id=job_id or "", worker_id=self._worker_id
        )
        self._outgoing.put(wire.JoinRequest(introduction=introduction))
        offer = self._await("offer", deadline_s).offer
        self._incarnation = offer.incarnation
        spec = job_spec_from_json(offer.job_spec)
        self._topology = spec.exchange.topology
        return spec

    def get_ready(self, replica: ReadyReplica, deadline_s: float) -> Admission:
        """Says that the replica is built; returns once the view has formed.

        `deadline_s` should be longer than the server's own, which knows who is missing.

        Raises:
            MismatchError: the replica differs from the other workers'.
            PeerLostError: the server is gone, or the other workers did not come in time.
        """
        readiness = wire.Readiness(
            layout_digest=replica.layout.digest(),
            replica_digest=replica.replica_digest,
            round=replica.round,
            samples=replica.samples,
            classes=replica.classes,
            address=replica.address,
        )
        self._outgoing.put(wire.JoinRequest(readiness=readiness))
        admission = self._await("admission", deadline_s).admission
        self._view = admission.view
        return Admission(
            worker_index=admission.worker_index,
            view=admission.view,
            worker_ids=tuple(admission.worker_ids),
            samples=tuple(admission.samples),
            shard_addresses=self._shard_addresses(admission),
            worker_addresses=tuple(admission.worker_addresses),
            coordinator_incarnation=self._incarnation,
        )

    def watch(
        self, aborted: Callable[[str, bool], None], stop_requested: Callable[[str], None] = lambda _: None
    ) -> None:
        """From now on calls `aborted(text, retry)` if the server ends the job or is gone.

        And `stop_requested(text)` if it asks to stop after the round.
        """

        def read() -> None:
            try:
                for response in self._responses:
                    if response.WhichOneof("kind") == "stop":
                        stop_requested(response.stop.text)
                    elif response.WhichOneof("kind") == "abort":
                        aborted(response.abort.text, response.abort.retry)
                        return
                text = f"server {self._address} closed the Join stream"
            except grpc.RpcError as error:
                text = f"server {self._address} is gone: {status_text(error)}"
            except Exception as error:
                aborted(f"defect in the reader of the Join stream: {error!r}", True)
                raise
            if not self._left:
                aborted(text, True)

        self._watcher = threading.Thread(target=read, name="join", daemon=True)
        self._watcher.start()

    def leave(self, end: End, replica_digest: bytes = b"") -> None:
        """Ends our part; a server that is gone is no error any more.

        Raises:
            MismatchError: our final state is not that of the workers that left before us.
        """
        self._left = True
        try:
            if self._view:
                self._say_leave(end, replica_digest)
        finally:
            self.close()

    def _say_leave(self, end: End, replica_digest: bytes) -> None:
        request = wire.LeaveRequest(
            worker_id=self._worker_id,
            view=self._view,
            incarnation=self._incarnation,
            ending=end.ending,
            text=end.text,
            retry=end.retry,
            replica_digest=replica_digest,
        )
        try:
            rpc.stub(self._channel, rpc.COORDINATOR, "Leave")(request, timeout=LEAVE_S)
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.FAILED_PRECONDITION and end.ending in GOOD_ENDINGS:
                raise MismatchError(error.details()) from None
            self._emit("stopping", text=f"Leave was not heard: {status_text(error)}")

    def close(self) -> None:
        """Ends the Join stream; without `leave` before it, the server takes us for lost."""
        self._left = True
        self._outgoing.put(None)
        if self._watcher:
            self._watcher.join(LEAVE_S)
        self._responses.cancel()

    def _requests(self) -> Iterator[wire.JoinRequest]:
        while (request := self._outgoing.get()) is not None:
            yield request

    def _await(self, kind: str, deadline_s: float) -> wire.JoinResponse:
        started_s = time.monotonic()
        timer = threading.Timer(deadline_s, self._responses.cancel)
        timer.daemon = True
        timer.start()
        try:
            for response in self._responses:
                match response.WhichOneof("kind"):
                    case "waiting":
                        self._report(response.waiting)
                    case "refusal":
                        later = response.refusal.reason in (wire.REASON_VIEW_FULL, wire.REASON_WORKER_ID)
                        refused = PeerLostError if later else MismatchError
                        raise refused(f"{self._address} refuses: {response.refusal.text}")
                    case "abort":
                        error = PeerLostError if response.abort.retry else MismatchError
                        raise error(response.abort.text)
                    case received if received == kind:
                        return response
        except grpc.RpcError as error:
            if time.monotonic() - started_s >= deadline_s:
                rule = f"an {kind} within {deadline_s:g} s"
                raise PeerLostError(refusal(rule, "server", self._address, "it is there, but says nothing")) from None
            raise PeerLostError(f"server {self._address} is gone: {status_text(error)}") from None
        finally:
            timer.cancel()
        waited_s = time.monotonic() - started_s
        raise PeerLostError(f"server {self._address} closed the Join stream after {waited_s:.1f} s, before any {kind}")

    def _report(self, waiting: wire.Waiting) -> None:
        missing = [*waiting.worker_ids, *([f"{waiting.missing} more to join"] if waiting.missing else [])]
        self._emit("waiting", missing=missing, waited_s=waiting.waited_s, round=waiting.round)


def tensor_messages(tensors: tuple[TensorSpec, ...]) -> list[wire.Tensor]:
    """The layout's input as it travels."""
    return [wire.Tensor(name=t.name, shape=t.shape, buffer=t.buffer) for t in tensors]


def status_text(error: grpc.RpcError) -> str:
    """Code and first line of a gRPC error."""
    code = error.code().name if hasattr(error, "code") and error.code() else "UNKNOWN"
    details = (error.details() or "") if hasattr(error, "details") else ""
    return f"{code} {details.splitlines()[0] if details else ''}".strip()
