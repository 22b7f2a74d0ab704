"""The worker process: join, train, leave; signals, exit codes, events."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from common.codecs.cpu import warm
from common.config import WORKER_ID, WORKER_ID_RULE, JobSpec
from common.errors import EXIT_TERMINATED, DatpsError, SpecError, refusal
from common.events import Emitter
from common.memory import keep_freed_memory
from common.timeline import Timeline
from common.wire.v1 import ps_pb2 as wire
from worker.checkpoint import Checkpoint, find_checkpoint, has_checkpoints, load_checkpoint
from worker.conclusion import conclude
from worker.exchange.base import Exchange
from worker.exchange.coordination import Admission, Coordination, End, ReadyReplica, connect
from worker.exchange.nodes import NodeOptions, make_node
from worker.exchange.ps import GRACE_S
from worker.interruptions import AbortRelay, StopFlag, Stopped
from worker.local.devices import parse_devices
from worker.local.processes import LocalProcesses, Order
from worker.local.team import LocalTeam, refuse_unfit
from worker.pretrained import initial_weights
from worker.pseudo_labels import load_training_data
from worker.record import RunFolder, RunRecorder, describe_training_data
from worker.residuals import Residuals
from worker.trainer import Trainer
from worker.workplace import Workplace, open_device

KEEPALIVE_S = 10.0
"""Of the Join stream, which is open before the job spec is known."""


@dataclass(frozen=True, kw_only=True)
class WorkerOptions:
    """What belongs to one worker process.

    Attributes:
        server: host:port of the coordinator.
        worker_id: stable name.
        job_id: refuse to join another job; None joins whatever job the server has.
        data: data folder, if the data set needs one.
        download: fetch the data set if it is missing.
        device: `cpu`, `cuda`, `cuda:1`.
        devices: several local devices instead, one process each: `cuda:0,cuda:1`, `cpu:2`.
        threads: of each local process on the CPU; None leaves it to torch.
        unlabeled: file of pseudo-labeled images, if the job has any.
        init: file or folder of initial parameters, if the job starts from any.
        out: run folder to write to; None writes nothing.
        resume: a checkpoint, or a run folder, to go on from.
        connect_s: how long to wait for a server to answer.
        host: this node's address for its shard or store; None: found out.
        shard_command: how this node's shard is run, if the job is colocated.
        trace: file that the timeline is written to at the end.
        state: folder for what is this worker's alone, the residual of a biased codec; None keeps it in memory only.
    """

    server: str
    worker_id: str
    job_id: str | None = None
    data: Path | None = None
    download: bool = False
    device: str = "cpu"
    devices: str | None = None
    threads: int | None = None
    out: Path | None = None
    resume: Path | None = None
    connect_s: float = 60.0
    host: str | None = None
    shard_command: tuple[str, ...] = ()
    trace: Path | None = None
    state: Path | None = None
    unlabeled: Path | None = None
    init: Path | None = None

    def __post_init__(self) -> None:
        if not WORKER_ID.fullmatch(self.worker_id):
            raise SpecError(refusal(WORKER_ID_RULE, "worker_id", repr(self.worker_id)))
        host, _, port = self.server.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 65536:
            raise SpecError(refusal("host:port", "server", repr(self.server)))
        self.local_devices  # noqa: B018 (refuses a bad list now, not later)

    @property
    def local_devices(self) -> tuple[str, ...]:
        """One for each local process.

        Raises:
            SpecError: a list that means nothing.
        """
        return (self.device,) if self.devices is None else parse_devices(self.devices)


def run(options: WorkerOptions, emit: Emitter) -> int:
    """Takes part in one job; returns the exit code when the training is complete, stopped or failed."""
    stop = StopFlag()
    keep_freed_memory()
    warm()
    with stop.handling_signals():
        try:
            return _work(options, emit, stop)
        except DatpsError as error:
            emit("error", text=str(error), exit_code=error.exit_code)
            return error.exit_code
        except Stopped:
            emit("stopping", text="stopped outside of a round, nothing to save")
            return stop.exit_code or EXIT_TERMINATED


def _work(options: WorkerOptions, emit: Emitter, stop: StopFlag) -> int:
    device = open_device(options.local_devices[0], options.threads)
    checkpoint = _checkpoint_to_resume(options)
    emit("connecting", address=options.server)
    with ExitStack() as stack:
        local = LocalProcesses(options.local_devices)
        stack.callback(local.close)
        channel = connect(options.server, options.connect_s, KEEPALIVE_S)
        stack.callback(channel.close)
        coordination = Coordination(channel, options.server, options.worker_id, emit)
        stack.callback(coordination.close)
        spec = coordination.introduce(options.job_id, options.connect_s)
        model = f"{spec.model.name} on {spec.data.name}"
        emit("offered", job_id=spec.job_id, model=model, workers=spec.workers, servers=spec.servers)
        refuse_unfit(spec, len(options.local_devices))
        job = _Job(options, emit, stop, spec, device, checkpoint, local)
        complete = job.take_part(coordination, stack)
    if not complete:
        saved = "state saved" if options.out else "nothing saved (no --out)"
        emit("stopping", text=f"stopped after round {job.round}, {saved}")
        return stop.exit_code or EXIT_TERMINATED
    job.finish()
    return 0


def _checkpoint_to_resume(options: WorkerOptions) -> Checkpoint | None:
    """The checkpoint to go on from; none in a run folder of ours that has none yet."""
    if options.resume is None:
        return None
    if options.out and options.resume.resolve() == options.out.resolve() and not has_checkpoints(options.resume):
        return None
    return load_checkpoint(find_checkpoint(options.resume))


class _Job:
    """One worker's part of one job, from the job spec on."""

    def __init__(
        self,
        options: WorkerOptions,
        emit: Emitter,
        stop: StopFlag,
        spec: JobSpec,
        device: torch.device,
        checkpoint: Checkpoint | None,
        local: LocalProcesses,
    ) -> None:
        self._options, self._emit, self._stop = options, emit, stop
        self._timeline = Timeline(emit.process, on=options.trace is not None)
        self._spec, self._device, self._local = spec, device, local
        self._dataset = load_training_data(
            spec.data, root=options.data, download=options.download, unlabeled=options.unlabeled
        )
        weights = None if checkpoint else initial_weights(spec.transfer, options.init)
        devices = options.local_devices
        team = LocalTeam(spec, 0, len(devices)) if len(devices) > 1 else None
        local.order(_order(options, spec, checkpoint))
        self._workplace = Workplace.build(spec, self._dataset, device, checkpoint, team, weights)
        if weights:
            emit("initialized", text=f"{weights.source}: {self._workplace.initialized}", sha256=weights.sha256)
        elif options.init and checkpoint:
            emit("initialized", text=f"from the checkpoint {checkpoint.path}, not from --init {options.init}")
        local.join(self._workplace)
        self._replica, self._layout = self._workplace.replica, self._workplace.layout
        self.round = self._workplace.round
        self._final_digest = b""
        self._folder = None
        if options.out:
            self._folder = RunFolder(options.out, resumed=checkpoint, anew=options.resume is not None)
        self._recorder: RunRecorder | None = None
        self._residuals: Residuals | None = None
        if checkpoint and spec.codec.keeps_residual and options.state is None:
            rule = f"--state FOLDER, which holds this worker's residual (codec {spec.codec.name})"
            raise SpecError(refusal(rule, "state", None, "a resumed run"))

    def take_part(self, coordination: Coordination, stack: ExitStack) -> bool:
        """From readiness to Leave; True if the training is complete.

        Whatever goes wrong in between, the others hear what it was.
        """
        end, exchange = End(ending=wire.ENDING_FAILED, text="a defect"), None
        try:
            node = make_node(self._spec, self._node_options(), self._emit)
            stack.callback(node.close)
            replica = self._ready_replica(node.address)
            admission = coordination.get_ready(replica, self._spec.deadlines.join_s + GRACE_S)
            relay = AbortRelay()
            coordination.watch(relay.aborted, relay.stop_requested)
            self._local.watch(relay.aborted)
            self._local.admit(admission)
            exchange = node.open(admission, self._layout, self.round, relay.raise_if_aborted)
            relay.attach(exchange)
            self._residuals = self._open_residuals(exchange, admission)
            complete = self._train(exchange, admission)
            end = End(ending=wire.ENDING_COMPLETED if complete else wire.ENDING_STOPPED)
        except Stopped:
            end = End(ending=wire.ENDING_FAILED, text="stopped by a signal before its first round")
            raise
        except DatpsError as error:
            cause = self._local.cause(error)
            end = End.after(cause)
            if cause is error:
                raise
            raise cause from error
        except Exception as error:
            end = End.after(error)
            raise
        finally:
            if exchange:
                exchange.close(end)
            coordination.leave(end, self._final_digest)
            if self._options.trace:
                failing = end.ending not in (wire.ENDING_COMPLETED, wire.ENDING_STOPPED)
                self._timeline.write(self._options.trace, failing=failing)
        node.finish()
        return complete

    def _open_residuals(self, exchange: Exchange, admission: Admission) -> Residuals | None:
        """What this worker alone saves; the exchange goes on with what it has saved before."""
        options, keep = self._options, self._spec.checkpoint.keep
        if exchange.feedback is None or options.state is None:
            return None
        residuals = Residuals(
            options.state, exchange.feedback, layout=self._layout, worker_index=admission.worker_index, keep=keep
        )
        residuals.begin(self.round, self._replica.parameter_digest(), anew=options.resume is not None)
        return residuals

    def _node_options(self) -> NodeOptions:
        options = self._options
        return NodeOptions(
            coordinator=options.server,
            host=options.host,
            shard_command=options.shard_command,
            connect_s=options.connect_s,
            timeline=self._timeline,
            shard_trace=options.trace.with_suffix(".shard.json") if options.trace else None,
            device=self._device,
            carried=self._workplace.team.carried(self._layout) if self._workplace.team else None,
        )

    def _ready_replica(self, address: str) -> ReadyReplica:
        return ReadyReplica(
            layout=self._layout,
            replica_digest=self._replica.replica_digest(),
            round=self.round,
            samples=self._dataset.labeled_samples,
            classes=describe_training_data(self._dataset, self._spec.data),
            address=address,
        )

    def _train(self, exchange: Exchange, admission: Admission) -> bool:
        """Runs all rounds; from here on a signal waits for the round's end."""
        trainer = self._trainer(exchange, admission)
        if self._folder:
            self._folder.begin(self._spec)
        self._stop.training = True
        complete = trainer.run()
        self.round = trainer.round
        self._final_digest = self._replica.replica_digest()
        self._local.finish(self._spec.deadlines.round_s)
        return complete

    def finish(self) -> None:
        """Evaluates what was trained on this worker's whole test data, if there is a run folder to say so in.

        A first signal does not interrupt it: the training is complete, and only the result is missing.
        """
        if not self._folder or not self._recorder:
            return
        selection = self._replica.selection
        if selection.is_over(self._spec.evaluation.patience):
            best = f"best after round {selection.round}, none of {selection.since} evaluations since was better"
            self._emit("early_stop", round=self.round, text=f"stopped early after round {self.round}: {best}")
        self._recorder.finish(conclude(self._workplace, self.round, self._folder.checkpoints))

    def _trainer(self, exchange: Exchange, admission: Admission) -> Trainer:
        spec, dataset, devices = self._spec, self._dataset, ",".join(self._options.local_devices)
        rounds = spec.schedule.epochs * self._workplace.plan(admission.samples).rounds_per_epoch
        self._recorder = RunRecorder(
            emit=self._emit,
            spec=spec,
            replica=self._replica,
            dataset=dataset,
            rounds=rounds,
            folder=self._folder,
            device=devices,
            residuals=self._residuals,
        )
        self._emit(
            "admitted",
            worker_index=admission.worker_index,
            workers=spec.workers,
            view=admission.view,
            parameters=self._layout.d,
            rounds=rounds,
            learning_rate=spec.peak_learning_rate,
            device=devices,
            model=spec.model.name.value,
            data=spec.data.name.value,
        )
        return self._workplace.trainer(
            exchange,
            admission,
            self._recorder,
            stop_requested=lambda: self._stop.exit_code is not None,
            timeline=self._timeline,
        )


def _order(options: WorkerOptions, spec: JobSpec, checkpoint: Checkpoint | None) -> Order:
    return Order(
        job_spec=spec.to_json(),
        devices=options.local_devices,
        threads=options.threads,
        data=str(options.data) if options.data else None,
        unlabeled=str(options.unlabeled) if options.unlabeled else None,
        init=str(options.init) if options.init else None,
        checkpoint=str(checkpoint.path) if checkpoint else None,
        saves=options.out is not None,
        connect_s=options.connect_s,
        trace=str(options.trace) if options.trace else None,
    )
