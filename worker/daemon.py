"""The worker process: join, train, leave; signals, exit codes, events."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from common.config import WORKER_ID, WORKER_ID_RULE, JobSpec
from common.errors import (
    EXIT_INTERRUPTED,
    EXIT_TERMINATED,
    CheckpointError,
    DatpsError,
    MismatchError,
    PeerLostError,
    SpecError,
    refusal,
)
from common.events import Emitter
from common.layout import plan_layout
from common.spec_sources import differences, load_job_spec
from common.wire.v1 import ps_pb2 as wire
from worker.checkpoint import Checkpoint, find_checkpoint, has_checkpoints, load_checkpoint
from worker.data import BatchPlan, Dataset
from worker.datasets import load_dataset
from worker.evaluation import evaluate
from worker.exchange.coordination import Admission, Coordination, End, ReadyReplica, connect
from worker.exchange.ps import GRACE_S, ParameterServerExchange
from worker.models import build_model
from worker.record import RunFolder, RunRecorder, accuracies, describe_data
from worker.replica import Replica, load_model
from worker.trainer import Trainer

FREE_ON_RESUME = ("job_id", "servers", "exchange.", "evaluation.", "checkpoint.", "deadlines.")
"""Keys of the job spec that may differ from the checkpoint's: none of them changes a parameter."""
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
        threads: of the CPU; None leaves it to torch.
        out: run folder to write to; None writes nothing.
        resume: a checkpoint, or a run folder, to go on from.
        connect_s: how long to wait for a server to answer.
    """

    server: str
    worker_id: str
    job_id: str | None = None
    data: Path | None = None
    download: bool = False
    device: str = "cpu"
    threads: int | None = None
    out: Path | None = None
    resume: Path | None = None
    connect_s: float = 60.0

    def __post_init__(self) -> None:
        if not WORKER_ID.fullmatch(self.worker_id):
            raise SpecError(refusal(WORKER_ID_RULE, "worker_id", repr(self.worker_id)))
        host, _, port = self.server.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 65536:
            raise SpecError(refusal("host:port", "server", repr(self.server)))


class Stopped(BaseException):
    """A signal came while nothing had to be saved yet."""


class StopFlag:
    """SIGTERM and Ctrl-C: at once while joining, after the round while training, at once if they come again."""

    def __init__(self) -> None:
        self.exit_code: int | None = None
        self.training = False

    @contextmanager
    def handling_signals(self) -> Iterator[None]:
        """Handles signals in the main thread; elsewhere they are not ours."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        numbers = (signal.SIGTERM, signal.SIGINT)
        before = [signal.signal(number, self._on_signal) for number in numbers]
        try:
            yield
        finally:
            for number, handler in zip(numbers, before, strict=True):
                signal.signal(number, handler)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        code = EXIT_INTERRUPTED if number == signal.SIGINT else EXIT_TERMINATED
        if self.exit_code is not None:
            os._exit(code)
        self.exit_code = code
        if not self.training:
            raise Stopped


class AbortRelay:
    """An Abort can come on the Join stream before there is an exchange that it ends."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._abort: tuple[str, bool] | None = None
        self._fail: Callable[[str, bool], None] | None = None

    def aborted(self, text: str, retry: bool) -> None:
        """The job has been aborted, or the coordinator is gone."""
        with self._lock:
            self._abort = self._abort or (text, retry)
            if self._fail:
                self._fail(*self._abort)

    def attach(self, fail: Callable[[str, bool], None]) -> None:
        """From now on aborts are passed on at once; also one that has come already."""
        with self._lock:
            self._fail = fail
            if self._abort:
                fail(*self._abort)

    def raise_if_aborted(self) -> None:
        """Raises what an Abort means.

        Raises:
            PeerLostError: a new try can succeed.
            MismatchError: it cannot.
        """
        with self._lock:
            if self._abort:
                text, retry = self._abort
                raise (PeerLostError if retry else MismatchError)(text)


def run(options: WorkerOptions, emit: Emitter) -> int:
    """Takes part in one job; returns the exit code when the training is complete, stopped or failed."""
    stop = StopFlag()
    with stop.handling_signals():
        try:
            return _work(options, emit, stop)
        except DatpsError as error:
            emit("error", text=str(error), exit_code=error.exit_code)
            return error.exit_code
        except Stopped:
            emit("stopping", text="stopped outside of a round, nothing to save")
            return stop.exit_code or EXIT_TERMINATED


def evaluate_checkpoint(
    path: Path,
    *,
    settings: Sequence[str],
    data: Path | None,
    device: str,
    threads: int | None,
    environment: Mapping[str, str] | None = None,
    reserved: frozenset[str] = frozenset(),
) -> dict[str, Any]:
    """TA and RA of a checkpoint, on its job's test data and with its evaluation attack unless settings say otherwise.

    `settings`, `environment` and `reserved` are those of `load_job_spec`.

    Raises:
        SpecError: no checkpoint there, a bad setting or device, another model, or data that the model was not made for.
        CheckpointError: the checkpoint is damaged.
        DataError: the test data is missing.
    """
    checkpoint = load_checkpoint(find_checkpoint(path))
    spec = load_job_spec(
        yaml_text=checkpoint.spec.to_yaml(),
        yaml_name=str(checkpoint.path),
        environment=environment,
        settings=settings,
        reserved=reserved,
    )
    if spec.model != checkpoint.spec.model:
        rule = f"the checkpoint's model ({checkpoint.spec.model.name}, width={checkpoint.spec.model.width})"
        raise SpecError(refusal(rule, "model", f"{spec.model.name}, width={spec.model.width}", str(checkpoint.path)))
    target = _device(device, threads)
    dataset = load_dataset(spec.data, root=data)
    _refuse_other_data(checkpoint, dataset)
    model = build_model(
        spec.model,
        in_channels=checkpoint.in_channels,
        image_size=checkpoint.image_size,
        classes=checkpoint.classes,
        mean=checkpoint.mean,
        std=checkpoint.std,
        seed=spec.seed,
    )
    load_model(model, checkpoint.tensors)
    attack = spec.evaluation_attack
    evaluation = evaluate(
        model.to(target), dataset.test, attack, batch=spec.evaluation.batch, seed=spec.seed, device=target
    )
    return {
        "checkpoint": str(checkpoint.path),
        "round": checkpoint.round,
        "rounds": checkpoint.rounds,
        "model": spec.model.name.value,
        "data": spec.data.name.value,
        "samples": evaluation.samples,
        **accuracies(evaluation),
        "attack": attack.model_dump(mode="json"),
    }


def _work(options: WorkerOptions, emit: Emitter, stop: StopFlag) -> int:
    device = _device(options.device, options.threads)
    checkpoint = _checkpoint_to_resume(options)
    emit("connecting", address=options.server)
    with ExitStack() as stack:
        channel = connect(options.server, options.connect_s, KEEPALIVE_S)
        stack.callback(channel.close)
        coordination = Coordination(channel, options.server, options.worker_id, emit)
        stack.callback(coordination.close)
        spec = coordination.introduce(options.job_id, options.connect_s)
        model = f"{spec.model.name} on {spec.data.name}"
        emit("offered", job_id=spec.job_id, model=model, workers=spec.workers, servers=spec.servers)
        job = _Job(options, emit, stop, spec, device, checkpoint)
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
    ) -> None:
        self._options, self._emit, self._stop = options, emit, stop
        self._spec, self._device = spec, device
        self.round = checkpoint.round if checkpoint else 0
        self._dataset = load_dataset(spec.data, root=options.data, download=options.download)
        self._replica = Replica(_model(spec, self._dataset).to(device), spec.optimizer)
        if checkpoint:
            _refuse_other_job(checkpoint, spec)
            _refuse_other_data(checkpoint, self._dataset)
            self._replica.load_state(checkpoint.tensors)
        self._layout = plan_layout(self._replica.tensors, spec)
        self._folder = None
        if options.out:
            self._folder = RunFolder(options.out, resumed=checkpoint, anew=options.resume is not None)
        self._recorder: RunRecorder | None = None

    def take_part(self, coordination: Coordination, stack: ExitStack) -> bool:
        """From readiness to Leave; True if the training is complete.

        Whatever goes wrong in between, the others hear what it was.
        """
        end, exchange = End(ending=wire.ENDING_FAILED, text="a defect"), None
        try:
            admission = coordination.get_ready(self._ready_replica(), self._spec.deadlines.join_s + GRACE_S)
            relay = AbortRelay()
            coordination.watch(relay.aborted)
            exchange = self._open_exchange(admission, relay, stack)
            relay.attach(exchange.fail)
            complete = self._train(exchange, admission)
            end = End(ending=wire.ENDING_COMPLETED if complete else wire.ENDING_STOPPED)
        except Stopped:
            end = End(ending=wire.ENDING_FAILED, text="stopped by a signal before its first round")
            raise
        except Exception as error:
            end = End.after(error)
            raise
        finally:
            if exchange:
                exchange.close(end)
            coordination.leave(end, self._replica.replica_digest())
        return complete

    def _ready_replica(self) -> ReadyReplica:
        return ReadyReplica(
            layout=self._layout,
            replica_digest=self._replica.replica_digest(),
            round=self.round,
            samples=len(self._dataset.train.labels),
            classes=describe_data(self._dataset),
        )

    def _open_exchange(self, admission: Admission, relay: AbortRelay, stack: ExitStack) -> ParameterServerExchange:
        channels = []
        for address in admission.shard_addresses:
            keepalive_s = self._spec.deadlines.keepalive_s
            channels.append(connect(address, self._options.connect_s, keepalive_s, relay.raise_if_aborted))
            stack.callback(channels[-1].close)
        return ParameterServerExchange(
            layout=self._layout,
            spec=self._spec,
            admission=admission,
            channels=channels,
            first_round=self.round,
            emit=self._emit,
        )

    def _train(self, exchange: ParameterServerExchange, admission: Admission) -> bool:
        """Runs all rounds; from here on a signal waits for the round's end."""
        trainer = self._trainer(exchange, admission)
        if self._folder:
            self._folder.begin(self._spec)
        self._stop.training = True
        complete = trainer.run()
        self.round = trainer.round
        return complete

    def finish(self) -> None:
        """Evaluates the trained model on this worker's whole test data, if there is a run folder to say so in.

        A first signal does not interrupt it: the training is complete, and only the result is missing.
        """
        if not self._folder or not self._recorder:
            return
        evaluation = evaluate(
            self._replica.model,
            self._dataset.test,
            self._spec.evaluation_attack,
            batch=self._spec.evaluation.batch,
            seed=self._spec.seed,
            device=self._device,
        )
        self._recorder.finish(evaluation)

    def _trainer(self, exchange: ParameterServerExchange, admission: Admission) -> Trainer:
        spec, dataset = self._spec, self._dataset
        plan = BatchPlan(
            samples_by_worker=admission.samples,
            split=spec.data.split,
            batch_per_worker=spec.data.batch_per_worker,
            workers=spec.workers,
            seed=spec.seed,
        )
        rounds = spec.schedule.epochs * plan.rounds_per_epoch
        self._recorder = RunRecorder(
            emit=self._emit, spec=spec, replica=self._replica, dataset=dataset, rounds=rounds, folder=self._folder
        )
        self._emit(
            "admitted",
            worker_index=admission.worker_index,
            workers=spec.workers,
            view=admission.view,
            parameters=self._layout.d,
            rounds=rounds,
            device=str(self._device),
            model=spec.model.name.value,
            data=spec.data.name.value,
        )
        return Trainer(
            spec=spec,
            replica=self._replica,
            dataset=dataset,
            plan=plan,
            worker_index=admission.worker_index,
            exchange=exchange,
            device=self._device,
            recorder=self._recorder,
            stop_requested=lambda: self._stop.exit_code is not None,
            first_round=self.round,
        )


def _model(spec: JobSpec, dataset: Dataset) -> torch.nn.Module:
    return build_model(
        spec.model,
        in_channels=dataset.in_channels,
        image_size=dataset.image_size,
        classes=len(dataset.classes),
        mean=dataset.mean,
        std=dataset.std,
        seed=spec.seed,
    )


def _refuse_other_job(checkpoint: Checkpoint, spec: JobSpec) -> None:
    """A run that goes on keeps its job, but for what does not touch the parameters."""
    for key, theirs, ours in differences(checkpoint.spec, spec):
        if not key.startswith(FREE_ON_RESUME):
            rule = f"{key}={theirs} as in {checkpoint.path}"
            raise CheckpointError(refusal(rule, key, ours, "a resumed run keeps its job"))


def _refuse_other_data(checkpoint: Checkpoint, dataset: Dataset) -> None:
    """A checkpoint says what data its model is made for."""
    ours = describe_data(dataset)
    if ours != checkpoint.data:
        raise SpecError(refusal(f"data of the checkpoint ({checkpoint.data})", "data", ours, str(checkpoint.path)))


def _device(name: str, threads: int | None) -> torch.device:
    """The device, with torch's settings for reproducible results."""
    if threads is not None:
        if threads < 1:
            raise SpecError(refusal("at least 1 thread", "threads", threads))
        torch.set_num_threads(threads)
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise SpecError(refusal("cpu or cuda", "device", name))
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).split("\n", maxsplit=1)[0]
        raise SpecError(refusal("a device that torch has here", "device", name, reason)) from None
    return device
