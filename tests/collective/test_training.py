"""Training without servers: the parameters of a run with servers, and the ends that people and programs expect."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from common.config import JobSpec
from common.events import Emitter
from common.layout import plan_layout
from common.wire.v1 import ps_pb2 as wire
from tests.collective.support import collective
from tests.processes.test_processes import WAIT_S, datps, read_until
from tests.support import DEADLINE_S, in_threads, introduce, job, ready, running_server, silent
from tests.training.test_trainer import ATTACK, Recording, model_for, plan_for, train
from worker.checkpoint import find_checkpoint, load_checkpoint
from worker.daemon import WorkerOptions, run
from worker.datasets import load_dataset
from worker.exchange.coordination import End
from worker.exchange.nodes import NodeOptions, make_node
from worker.readiness import backward_order
from worker.replica import Replica
from worker.trainer import Trainer

TRAINING_S = 60.0
SMALL = ("workers=3", "data.batch_per_worker=8", "model.name=resnet8", "model.width=4", *ATTACK)


def train_one(spec: JobSpec, address: str, number: int, rounds: int) -> tuple[Replica, Recording]:
    """One worker of a thread: joins, trains for a few rounds, leaves."""
    dataset = load_dataset(spec.data, root=None)
    channel, coordination, _ = introduce(address, f"worker-{number}")
    node = make_node(spec, NodeOptions(coordinator=address), silent())
    model = model_for(spec, dataset)
    replica = Replica(model, spec.optimizer, backward_order(model, dataset.train.images(torch.arange(2))))
    layout = plan_layout(replica.tensors, spec)
    own = ready(layout, replica_digest=replica.replica_digest(), address=node.address)
    admission = coordination.get_ready(own, DEADLINE_S)
    exchange = node.open(admission, layout, 0, lambda: None)
    recording = Recording()
    trainer = Trainer(
        spec=spec,
        replica=replica,
        dataset=dataset,
        plan=plan_for(spec, dataset),
        worker_index=admission.worker_index,
        exchange=exchange,
        layout=layout,
        device=torch.device("cpu"),
        recorder=recording,
        stop_requested=lambda: False,
    )
    trainer.rounds = rounds
    trainer.run()
    end = End(ending=wire.ENDING_COMPLETED)
    exchange.close(end)
    coordination.leave(end, replica.replica_digest())
    node.close()
    channel.close()
    return replica, recording


def train_together(spec: JobSpec, rounds: int) -> list[tuple[Replica, Recording]]:
    with running_server(spec) as server:
        return in_threads([lambda n=n: train_one(spec, server.address, n, rounds) for n in range(spec.workers)])


@pytest.mark.parametrize("codec", [("codec.bits=8",), ("codec.bits=4", "codec.block=layer")], ids=" ".join)
def test_a_one_sided_codec_gives_the_parameters_of_a_parameter_servers_run(codec: tuple[str, ...]) -> None:
    cut = "exchange.bucket_bytes=4096"
    by_servers = train(job(*SMALL, cut, *codec), 3)
    by_collectives = train_together(collective(*SMALL, cut, *codec), 3)
    digests = [[report.parameter_digest for report in told.reports] for _, told in [*by_servers, *by_collectives]]
    assert digests == [digests[0]] * 6
    assert len(set(digests[0])) == 3  # every round changed the parameters
    assert len({replica.replica_digest() for replica, _ in [*by_servers, *by_collectives]}) == 1


def test_without_codec_all_replicas_stay_bitwise_equal_and_a_second_run_gives_the_same_parameters() -> None:
    spec = collective(*SMALL, "codec.name=none")
    trained = [*train_together(spec, 3), *train_together(spec, 3)]
    assert len({replica.replica_digest() for replica, _ in trained}) == 1


# Workers as processes have them

FAST = ("model.width=4", "data.batch_per_worker=64", "attack.epsilon=0.2", "attack.steps=1", "attack.step_size=0.1")
FAST = (*FAST, "evaluation.every_epochs=0", "evaluation.attack.steps=1", "checkpoint.every_epochs=0")


def work(address: str, worker_id: str, **options: Any) -> tuple[int, list[dict[str, Any]]]:
    """One worker; returns its exit code and events."""
    log = io.StringIO()
    code = run(WorkerOptions(server=address, worker_id=worker_id, **options), Emitter(worker_id, stream=log))
    return code, [json.loads(line) for line in log.getvalue().splitlines()]


def error_of(events: list[dict[str, Any]]) -> str:
    return "\n".join(event["text"] for event in events if event["event"] == "error")


class Watched(io.StringIO):
    """A log that calls somebody at the first round."""

    def __init__(self, at_first_round: Any) -> None:
        super().__init__()
        self._at_first_round = at_first_round

    def write(self, text: str) -> int:
        if '"event": "round"' in text and self._at_first_round:
            self._at_first_round()
            self._at_first_round = None
        return super().write(text)


def test_a_server_that_is_asked_to_stop_stops_all_with_143_and_they_resume_to_the_end_of_an_undisturbed_run(
    tmp_path: Path,
) -> None:
    spec = collective("workers=2", "schedule.epochs=1", *FAST)
    out = tmp_path / "stopped"
    with running_server(spec) as server, ThreadPoolExecutor(2) as pool:
        log = Watched(lambda: server.call(server.server.request_stop, "server got SIGTERM"))
        options = WorkerOptions(server=server.address, worker_id="worker-0", out=out)
        first: Future[int] = pool.submit(run, options, Emitter("worker-0", stream=log))
        second = pool.submit(work, server.address, "worker-1")
        assert (first.result(TRAINING_S), second.result(TRAINING_S)[0]) == (143, 143)
        assert server.outcome.result(DEADLINE_S).exit_code == 143
    assert 1 <= load_checkpoint(find_checkpoint(out)).round < 11
    finish(spec, out, resume=out)
    finish(spec, tmp_path / "undisturbed", resume=None)
    results = [json.loads((folder / "result.json").read_text()) for folder in (out, tmp_path / "undisturbed")]
    assert results[0]["parameter_digest"] == results[1]["parameter_digest"]
    assert results[0]["rounds"] == results[1]["rounds"] == 11
    assert results[0]["pushed_bytes_per_round"] == results[1]["pushed_bytes_per_round"] > 0


def finish(spec: JobSpec, out: Path, resume: Path | None) -> None:
    with running_server(spec) as server, ThreadPoolExecutor(2) as pool:
        first = pool.submit(work, server.address, "worker-0", out=out, resume=resume)
        second = pool.submit(work, server.address, "worker-1", resume=resume)
        assert (first.result(TRAINING_S)[0], second.result(TRAINING_S)[0]) == (0, 0)


@contextmanager
def processes(address: str, count: int) -> Iterator[list[Any]]:
    """Workers as real processes, worker-1 and up."""
    with ExitStack() as stack:
        yield [
            stack.enter_context(
                datps("worker", "--json", "--server", address, "--worker-id", f"worker-{number}", "--threads", "1")
            )
            for number in range(1, count + 1)
        ]


LONG = ("schedule.epochs=1000", "deadlines.join_s=90", *FAST)


@pytest.mark.processes
def test_a_process_that_is_killed_ends_the_others_with_75_naming_it() -> None:
    spec = collective("workers=3", *LONG)
    with running_server(spec) as server, ThreadPoolExecutor(1) as pool, processes(server.address, 2) as (second, third):
        first = pool.submit(work, server.address, "worker-0")
        read_until(second.stdout, event="round")
        third.kill()
        code, events = first.result(WAIT_S)
        output, errors = second.communicate(timeout=WAIT_S)
    text = "worker-2 is gone: its Join stream ended"
    assert (code, error_of(events)) == (75, text)
    assert (second.returncode, text in output, errors) == (75, True, "")


@pytest.mark.processes
def test_a_process_that_gets_sigterm_stops_all_with_143_after_the_round_and_saves(tmp_path: Path) -> None:
    spec = collective("workers=2", *LONG)
    with running_server(spec) as server, ThreadPoolExecutor(1) as pool, processes(server.address, 1) as (second,):
        first = pool.submit(work, server.address, "worker-0", out=tmp_path / "run")
        read_until(second.stdout, event="round")
        second.terminate()
        code, events = first.result(WAIT_S)
        output, errors = second.communicate(timeout=WAIT_S)
    assert (code, second.returncode, errors) == (143, 143, "")
    saved = load_checkpoint(find_checkpoint(tmp_path / "run")).round
    assert events[-1]["text"] == f"stopped after round {saved}, state saved"
    assert f"stopped after round {saved}, nothing saved" in output
