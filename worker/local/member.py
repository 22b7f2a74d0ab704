"""A local process of a worker, besides the worker's own: `python -m worker.local.member`, started by that.

It computes its part of the batch, exchanges its slice with the servers, and updates it. It admits to nobody that it
exists: Join, Leave, signals, checkpoints and reports are the worker's own process's.
"""

from __future__ import annotations

import dataclasses
import json
import os
import queue
import signal
import sys
import threading
from pathlib import Path
from typing import Any

from common.errors import EXIT_RETRY, DatpsError, MismatchError, PeerLostError
from common.events import Emitter
from common.memory import keep_freed_memory
from common.spec_sources import job_spec_from_json
from common.timeline import Timeline
from common.wire.v1 import ps_pb2 as wire
from worker.checkpoint import load_checkpoint
from worker.evaluation import Evaluation
from worker.exchange.coordination import Admission, End
from worker.exchange.ps import ParameterServerExchange
from worker.local.devices import describe
from worker.local.group import GroupBrokenError, join_store
from worker.local.processes import About, Order, built, trace_beside
from worker.local.team import LocalTeam
from worker.overfitting import OverfittingCheck
from worker.pretrained import initial_weights
from worker.pseudo_labels import load_training_data
from worker.trainer import RoundReport
from worker.workplace import Workplace, open_device

EXIT_DEFECT = 1


class Silent:
    """A recorder: process 0 tells and keeps everything, but needs everyone's part of what it keeps."""

    def __init__(self, workplace: Workplace, *, saves: bool) -> None:
        self._workplace = workplace
        self._saves = saves

    def round_closed(self, report: RoundReport) -> None:
        """See `worker.trainer.Recorder`."""

    def evaluated(self, round_: int, evaluation: Evaluation) -> None:
        """See `worker.trainer.Recorder`."""

    def checked(self, round_: int, check: OverfittingCheck, *, overfits: bool, ends: bool) -> None:
        """See `worker.trainer.Recorder`."""

    def save(self, round_: int) -> None:  # noqa: ARG002
        """See `worker.trainer.Recorder`: the optimizer's state is gathered."""
        if self._saves:
            self._workplace.replica.gather()

    def save_best(self, round_: int) -> None:
        """See `worker.trainer.Recorder`."""
        self.save(round_)


def build(order: Order) -> Workplace:
    """What this process trains.

    Raises:
        DatpsError: something does not fit; process 0 has found the same, or will.
    """
    device = open_device(order.devices[order.local_rank], order.threads)
    spec = job_spec_from_json(order.job_spec)
    dataset = load_training_data(spec.data, root=_path(order.data), unlabeled=_path(order.unlabeled))
    checkpoint = load_checkpoint(Path(order.checkpoint)) if order.checkpoint else None
    weights = None if checkpoint else initial_weights(spec.transfer, _path(order.init))
    team = LocalTeam(spec, order.local_rank, len(order.devices))
    return Workplace.build(spec, dataset, device, checkpoint, team, weights)


def _path(text: str | None) -> Path | None:
    return None if text is None else Path(text)


def take_part(workplace: Workplace, admission: Admission, order: Order, emit: Emitter) -> None:
    """All rounds, until the training is complete or process 0 stops.

    Raises:
        DatpsError: as an exchange and a group do.
    """
    team = workplace.team
    assert team is not None
    worker_id = admission.worker_ids[admission.worker_index]
    timeline = Timeline(f"{worker_id} {describe(order.devices, order.local_rank)}", on=order.trace is not None)
    exchange = ParameterServerExchange(
        layout=workplace.layout,
        spec=workplace.spec,
        admission=admission,
        first_round=workplace.round,
        emit=emit,
        timeline=timeline,
        carried=team.carried(workplace.layout),
        connect_s=order.connect_s,
    )
    try:
        recorder = Silent(workplace, saves=order.saves)
        complete = workplace.trainer(exchange, admission, recorder, timeline=timeline).run()
        workplace.replica.replica_digest()  # process 0 says it when it leaves
        end = End(ending=wire.ENDING_COMPLETED if complete else wire.ENDING_STOPPED)
    except GroupBrokenError as error:
        # Another local process is the cause. Which one, and how it failed, process 0 tells the servers, if our streams
        # do not end before it has.
        _tell(emit, error)
        threading.Event().wait()
        raise
    except Exception as error:
        exchange.close(_named(End.after(error), team))
        if order.trace:
            timeline.write(trace_beside(order.trace, order.local_rank), failing=True)
        raise
    exchange.close(end)
    if order.trace:
        timeline.write(trace_beside(order.trace, order.local_rank))


def main() -> int:
    """The process: orders on standard input, events on standard output; returns its exit code."""
    keep_freed_memory()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)  # process 0 decides what they mean
    words, emit = _leash(), Emitter("local process", as_json=True)
    try:
        order = Order(**words.get())
        workplace = build(order)
        assert workplace.team is not None
        emit("built", **built(workplace))
        workplace.team.meet(join_store(order.store_port), workplace.device)
        workplace.replica.replica_digest()  # process 0 says it when it is ready
        admission = Admission(**words.get()["admission"])
        take_part(workplace, admission, order, emit)
    except DatpsError as error:
        _tell(emit, error)
        return error.exit_code
    except Exception as error:
        emit("error", text=f"defect: {error!r}", exit_code=EXIT_DEFECT, about=About.OWN.value)
        raise
    emit("ended")
    return 0


def _leash() -> queue.SimpleQueue[dict[str, Any]]:
    """The words of process 0; where they end, so does this process, whatever it is doing."""
    words: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()

    def read() -> None:
        for line in sys.stdin:
            words.put(json.loads(line))
        os._exit(EXIT_RETRY)

    threading.Thread(target=read, name="leash", daemon=True).start()
    return words


def _tell(emit: Emitter, error: DatpsError) -> None:
    match error:
        case GroupBrokenError():
            about = About.GROUP
        case PeerLostError() | MismatchError():
            about = About.PEERS
        case _:
            about = About.OWN
    emit("error", text=str(error), exit_code=error.exit_code, about=about.value)


def _named(end: End, team: LocalTeam) -> End:
    """How our part ends, as the servers hear it: a failure of ours is that of a local process."""
    if end.ending != wire.ENDING_FAILED:
        return end
    return dataclasses.replace(end, text=f"local process {team.local_rank} of {team.size}: {end.text}")


if __name__ == "__main__":
    sys.exit(main())
