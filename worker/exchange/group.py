"""The workers of a view as a group of torch.distributed: where they meet, and the collectives that they start together.

Worker 0's store is the meeting place. On the CPU collectives are gloo's. One that is under way cannot be broken off: it
ends when all have come, when a peer closes its connections, or after its deadline. So nobody blocks in one for long
(`Pending.ended`), and a group that has one under way is not destroyed, since its destructor would wait for it, but left
to the end of the process.

On CUDA devices they are NCCL's. An exchange is given vectors on the host, so each is copied to the device and its sum
back: right, but no faster than the copies.
"""

from __future__ import annotations

import ctypes
import os
import queue
import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any, Generic, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch.distributed.distributed_c10d import AllgatherOptions, AllreduceOptions

from common.codecs import Bytes, Float32
from common.errors import PeerLostError, SpecError, refusal
from worker.exchange.coordination import Admission

LOOK_S = 0.02
"""How often a worker looks whether the others have come, and whether NCCL is done."""
ANSWER_S = 2.0
"""How long worker 0's store may take to answer a question that can do without an answer."""
_SHORTEST_S = 0.002
"""What rounds to no milliseconds means for ever."""
T = TypeVar("T")


def open_store(host: str) -> tuple[dist.TCPStore, str]:
    """A store on a free port of this machine's address `host`, and that address as host:port.

    Raises:
        SpecError: it cannot be bound.
    """
    bare = host.strip("[]")
    try:
        family, _, _, _, address = socket.getaddrinfo(bare, 0, type=socket.SOCK_STREAM)[0]
        listener = socket.create_server(address[:2], family=family)
    except OSError as error:
        raise SpecError(refusal("an address of this machine", "host", host, str(error))) from None
    port = int(listener.getsockname()[1])
    store = dist.TCPStore(bare, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())
    return store, f"[{bare}]:{port}" if ":" in bare else f"{bare}:{port}"


class RollCall:
    """Who has come how far: for each worker the last round that it has contributed to, in worker 0's store."""

    def __init__(self, store: dist.Store, admission: Admission) -> None:
        self._store = store
        self._own = f"round/{admission.worker_index}"
        self._keys = [f"round/{worker}" for worker in range(len(admission.worker_ids))]
        self._worker_ids = admission.worker_ids
        self._question = threading.Thread()

    def say(self, round_: int) -> None:
        """This worker has contributed to a round; a first time, to say that it is here."""
        self._store.set(self._own, str(round_))

    def absent(self) -> list[str]:
        """Who has not said anything yet."""
        if self._store.check(self._keys):
            return []
        named = zip(self._keys, self._worker_ids, strict=True)
        return [worker_id for key, worker_id in named if not self._store.check([key])]

    def late(self, round_: int) -> list[str]:
        """Who has not contributed to a round yet; worker 0 if its store does not say."""
        answer: queue.SimpleQueue[list[bytes]] = queue.SimpleQueue()

        def ask() -> None:
            with suppress(RuntimeError):
                answer.put(self._store.multi_get(self._keys))

        if not self._question.is_alive():  # the store of a process that is frozen never answers
            self._question = threading.Thread(target=ask, name="roll-call", daemon=True)
            self._question.start()
        try:
            rounds = answer.get(timeout=ANSWER_S)
        except queue.Empty:
            return [self._worker_ids[0]]
        return [name for name, last in zip(self._worker_ids, rounds, strict=True) if int(last) < round_]


def meet(
    own: dist.Store, admission: Admission, first_round: int, deadline_s: float, give_up: Callable[[], None]
) -> tuple[dist.Store, RollCall]:
    """The store of the group, once all workers have come to it.

    Args:
        own: this worker's store.
        admission: this worker's place.
        first_round: the round to begin with.
        deadline_s: how long to wait.
        give_up: called now and then; raises if waiting has become pointless.

    Raises:
        PeerLostError: worker 0's store does not answer, or not all have come within the deadline.
    """
    until_s, address = time.monotonic() + deadline_s, admission.worker_addresses[0]
    missing: list[str] = [admission.worker_ids[0]]
    store, roll_call, reason = own, None, "its store does not answer"
    while time.monotonic() < until_s:
        try:
            if roll_call is None:
                store = own if admission.worker_index == 0 else _reach(address, deadline_s)
                roll_call = RollCall(store, admission)
                roll_call.say(first_round - 1)
            missing = roll_call.absent()
            if not missing:
                return store, roll_call
        except (OSError, RuntimeError) as error:  # the coordinator may know more, and sooner
            reason = str(error).split("\n", maxsplit=1)[0]
        give_up()
        time.sleep(LOOK_S)
    rule = f"all workers at {address} (store of {admission.worker_ids[0]}) within {deadline_s:g} s"
    raise PeerLostError(refusal(rule, "missing", ", ".join(missing), reason if roll_call is None else ""))


def _reach(address: str, deadline_s: float) -> dist.TCPStore:
    host, _, port = address.rpartition(":")
    bare = host.strip("[]")
    socket.create_connection((bare, int(port)), timeout=ANSWER_S).close()  # torch would try in vain for long, loudly
    timeout = timedelta(seconds=deadline_s)
    return dist.TCPStore(bare, int(port), is_master=False, wait_for_workers=False, timeout=timeout)


class Pending(Generic[T]):
    """A collective under way."""

    def __init__(self, work: Any, take: Callable[[], T], *, on_cpu: bool) -> None:
        self._work, self._take, self._on_cpu = work, take, on_cpu

    def ended(self, within_s: float) -> bool:
        """Waits for a while; True if it has ended, well or not."""
        if self._on_cpu:
            if within_s > _SHORTEST_S:
                with suppress(RuntimeError):  # also that of the wait, if it takes longer
                    self._work.wait(timedelta(seconds=within_s))
        else:
            until_s = time.monotonic() + within_s
            while not self._work.is_completed() and time.monotonic() < until_s:
                time.sleep(LOOK_S / 10)
        return bool(self._work.is_completed())

    def result(self) -> T:
        """What it has given, once it has ended.

        Raises:
            RuntimeError: it has failed.
        """
        self._work.wait()
        return self._take()


class Group:
    """The collectives of one worker; all workers start the same ones in the same order."""

    def __init__(
        self, store: dist.Store, admission: Admission, *, host: str, device: torch.device, deadline_s: float
    ) -> None:
        """Connects to all others, who have all come.

        Args:
            store: of the group.
            admission: this worker's place.
            host: this machine's address, which the others connect to.
            device: of the collectives.
            deadline_s: after which a collective fails.

        Raises:
            SpecError: this torch has no collectives on that device.
            PeerLostError: another worker does not connect.
        """
        self.workers = len(admission.worker_ids)
        self._device = device
        self._timeout = timedelta(seconds=deadline_s)
        backend, open_group = ("gloo", _open_gloo) if device.type == "cpu" else ("nccl", _open_nccl)
        if not dist.is_backend_available(backend):
            raise SpecError(refusal(f"a device for which torch has collectives ({backend})", "device", device))
        try:
            self._group = open_group(
                dist.PrefixStore(backend, store), admission.worker_index, self.workers, host, device
            )
        except RuntimeError as error:  # torch.distributed knows no other
            raise PeerLostError(f"the workers cannot connect to each other: {first_line(error)}") from None

    def all_reduce(self, vector: Float32) -> Pending[None]:
        """Replaces `vector` by the sum over all workers: the same bits on all of them."""
        host = torch.from_numpy(vector)
        tensor = host.to(self._device)
        options = AllreduceOptions()
        options.timeout = self._timeout
        work = self._group.allreduce([tensor], options)
        return Pending(work, lambda: _copy_back(tensor, host), on_cpu=tensor is host)

    def all_gather(self, own: Bytes) -> Pending[NDArray[np.uint8]]:
        """What each worker gives, all of the same length: uint8 of shape (workers, n), by worker_index."""
        tensor = torch.from_numpy(own).to(self._device)
        gathered = torch.empty((self.workers, len(own)), dtype=torch.uint8, device=self._device)
        options = AllgatherOptions()
        options.timeout = self._timeout
        work = self._group.allgather([list(gathered.unbind())], [tensor], options)
        return Pending(work, lambda: gathered.cpu().numpy(), on_cpu=self._device.type == "cpu")

    def release(self, under_way: Sequence[object]) -> None:
        """Closes all connections; `under_way`: collectives that have not ended, and maybe never will."""
        group, self._group = self._group, None
        if group is None:
            return
        if self._device.type != "cpu":
            if under_way:
                group._get_backend(self._device).abort()
            dist.destroy_process_group()
        elif under_way:
            _keep_for_ever((group, tuple(under_way)))


def first_line(error: Exception) -> str:
    """Of a text that goes on with a stack."""
    return str(error).split("\n", maxsplit=1)[0]


CONNECT_S = 20.0
"""How long gloo may take to connect workers that have all come; nothing can break it off."""


def _open_gloo(store: dist.Store, index: int, workers: int, host: str, _device: torch.device) -> Any:
    """A group of its own, not the process's only one: several workers can live in one process."""
    gloo: Any = dist.ProcessGroupGloo
    options = gloo._Options()
    options._devices = [gloo.create_device(hostname=host.strip("[]"))]
    options._timeout = timedelta(seconds=CONNECT_S)
    return gloo(store, index, workers, options)


def _open_nccl(store: dist.Store, index: int, workers: int, _host: str, device: torch.device) -> Any:
    """The process's default group; NCCL chooses its interface itself (NCCL_SOCKET_IFNAME)."""
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")  # else torch kills the process when a peer is lost
    if device.index is None:
        device = torch.device(device.type, torch.cuda.current_device())
    dist.init_process_group("nccl", store=store, rank=index, world_size=workers, device_id=device)
    return dist.group.WORLD


def _copy_back(tensor: torch.Tensor, host: torch.Tensor) -> None:
    if tensor is not host:
        host.copy_(tensor)


def _keep_for_ever(objects: object) -> None:
    """Keeps them alive until the process is gone, the interpreter's own end included."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(objects))
