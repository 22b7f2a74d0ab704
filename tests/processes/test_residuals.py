"""Error feedback over a stop: a run goes on with the residuals of all its workers, or says whose is missing."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from common.config import JobSpec
from common.events import Emitter
from deploy.cluster import DatpsCommands
from tests.deploy.test_cli import calls, datps
from tests.processes.test_worker_in_thread import error_of
from tests.support import DEADLINE_S, job, running_server
from worker.daemon import WorkerOptions, run

__all__ = ["calls"]
TRAINING_S = 60.0
SIGN = ("codec.name=sign", "codec.two_sided=false", "codec.block=64")
SMALL = (
    *("workers=2", "model.width=4", "data.batch_per_worker=64", "schedule.epochs=1", "attack.name=none"),
    *("evaluation.every_epochs=0", "evaluation.attack.steps=1", "checkpoint.every_epochs=0"),
)


class Log(io.StringIO):
    """A worker's events; calls somebody at its first round."""

    def __init__(self, at_first_round: Callable[[], object] = lambda: None) -> None:
        super().__init__()
        self._at_first_round = at_first_round

    def write(self, text: str) -> int:
        if '"event": "round"' in text and '"round": 1,' in text:
            self._at_first_round()
        return super().write(text)


def train(spec: JobSpec, out: Path, *, resume: bool = False, stop: bool = False) -> list[tuple[int, str]]:
    """Two workers of threads; exit code and error of each. Worker 0 keeps the run folder, both their residuals."""
    with running_server(spec) as server, ThreadPoolExecutor(2) as pool:

        def work(number: int) -> tuple[int, str]:
            options = WorkerOptions(
                server=server.address,
                worker_id=f"worker-{number}",
                out=out if number == 0 else None,
                state=out / "residuals",
                resume=out if resume else None,
            )
            log = Log((lambda: server.call(server.server.request_stop, "enough")) if stop else lambda: None)
            code = run(options, Emitter(options.worker_id, stream=log))
            return code, error_of([json.loads(line) for line in log.getvalue().splitlines()])

        ended = [future.result(TRAINING_S) for future in [pool.submit(work, number) for number in range(2)]]
        server.outcome.result(DEADLINE_S)
    return ended


@pytest.mark.parametrize("topology", ["dedicated", "collective"])
def test_a_run_that_is_stopped_and_resumed_ends_with_the_parameters_of_an_undisturbed_one(
    topology: str, tmp_path: Path
) -> None:
    spec, out = job(*SMALL, *SIGN, f"exchange.topology={topology}"), tmp_path / "stopped"
    assert train(spec, tmp_path / "undisturbed") == [(0, "")] * 2
    assert train(spec, out, stop=True) == [(143, "")] * 2
    (saved,) = (path.name for path in (out / "checkpoints").iterdir())
    assert 1 <= int(saved.removeprefix("round-")) < 11
    own = out / "residuals" / saved
    assert sorted(path.name for path in own.iterdir()) == ["residual-0.safetensors", "residual-1.safetensors"]
    missing = own / "residual-1.safetensors"
    content = missing.read_bytes()
    missing.unlink()
    (told, told_text), (cause, text) = train(spec, out, resume=True)
    assert (told, cause) == (75, 65)
    assert str(missing) in text
    assert "worker-1 failed: expected this worker's residual" in told_text
    missing.write_bytes(content)
    assert train(spec, out, resume=True) == [(0, "")] * 2
    undisturbed, result = (
        json.loads((folder / "result.json").read_text()) for folder in (tmp_path / "undisturbed", out)
    )
    assert result["parameter_digest"] == undisturbed["parameter_digest"]
    assert result["rounds"] == 11
    assert 0.1 < result["pushed_bytes_per_round"] / result["parameters"] < 0.3


def test_train_gives_all_workers_a_folder_for_residuals_and_goes_on_where_those_of_all_are(tmp_path: Path) -> None:
    for round_, workers in ((5, 2), (10, 2), (15, 1)):
        (tmp_path / "checkpoints" / f"round-{round_:06d}").mkdir(parents=True)
        for worker in range(workers):
            file = tmp_path / "residuals" / f"round-{round_:06d}" / f"residual-{worker}.safetensors"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch()
    common: dict[str, Any] = {"folder": tmp_path, "data": None, "device": "cpu", "threads": 1, "resume": True}
    kept, plain = (DatpsCommands(spec=job("workers=2", *codec), **common) for codec in (SIGN, ()))
    for index in range(2):
        words = " ".join(kept.worker(index=index, server="a:1"))
        assert f"--state {tmp_path / 'residuals'} " in words
        assert words.endswith(f"--resume {tmp_path / 'checkpoints' / 'round-000010'}")
        words = " ".join(plain.worker(index=index, server="a:1"))
        assert "--state" not in words
        assert words.endswith(f"--resume {tmp_path}")


def test_the_folder_for_residuals_reaches_the_worker(calls: list[Any]) -> None:
    assert datps("worker", "--server", "a:1", "--state", "here").exit_code == 0
    assert datps("worker", "--server", "a:1", DATPS_STATE="there").exit_code == 0
    assert [options.state for options in calls] == [Path("here"), Path("there")]


@pytest.mark.parametrize("codec", ["sign", "topk"])
def test_a_run_without_the_folder_of_its_residuals_is_not_resumed(codec: str, tmp_path: Path) -> None:
    spec = job(*SMALL, *SIGN, f"codec.name={codec}", "workers=1")
    with running_server(spec) as server:
        options = WorkerOptions(server=server.address, worker_id="worker-0", out=tmp_path / "run")
        assert run(options, Emitter("worker-0", stream=io.StringIO())) == 0
    with running_server(spec) as server:
        options = WorkerOptions(server=server.address, worker_id="worker-0", resume=tmp_path / "run")
        log = io.StringIO()
        assert run(options, Emitter("worker-0", stream=log)) == 2
    assert f"expected --state FOLDER, which holds this worker's residual (codec {codec})" in log.getvalue()
