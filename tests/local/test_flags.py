"""`--devices`: what reaches the worker, and what is refused before anything starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from common.errors import SpecError
from deploy.cluster import DatpsCommands
from tests.deploy.test_cli import calls, datps
from tests.local.support import SMALL
from tests.processes.test_worker_in_thread import error_of, work
from tests.support import job, running_server
from worker.daemon import WorkerOptions

__all__ = ["calls"]
WORKER = ("worker", "--server", "a:1")


@pytest.mark.parametrize(
    ("arguments", "variables", "devices"),
    [
        ((), {}, ("cpu",)),
        (("--device", "cuda:1"), {}, ("cuda:1",)),
        (("--devices", "cpu:2"), {}, ("cpu", "cpu")),
        ((), {"DATPS_DEVICES": "cuda:0,cuda:1"}, ("cuda:0", "cuda:1")),
        (("--devices", "cpu:2"), {"DATPS_DEVICE": "cuda"}, ("cpu", "cpu")),
        (("--device", "cuda"), {"DATPS_DEVICES": "cpu:2"}, ("cuda",)),
    ],
)
def test_a_worker_drives_the_devices_that_it_is_given_and_a_flag_wins_over_a_variable(
    calls: list[Any],
    arguments: tuple[str, ...],
    variables: dict[str, str],
    devices: tuple[str, ...],
) -> None:
    assert datps(*WORKER, *arguments, **variables).exit_code == 0
    assert calls[0].local_devices == devices


@pytest.mark.parametrize("command", [WORKER, ("train",)], ids=["worker", "train"])
@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (("--devices", "cpu:0"), "expected cpu:N (N processes), or cuda devices"),
        (("--devices", "cuda:0,cuda:0"), "got devices='cuda:0,cuda:0'"),
        (("--devices", "cpu:2", "--device", "cpu"), "expected --devices or --device, got flags=--devices and --device"),
    ],
)
def test_bad_lists_of_devices_and_two_flags_are_refused_with_2_and_leave_no_folder(
    calls: list[Any],
    tmp_path: Path,
    command: tuple[str, ...],
    flags: tuple[str, ...],
    text: str,
) -> None:
    ended = datps(*command, *flags)
    assert (ended.exit_code, text in ended.output) == (2, True), ended.output
    assert calls == []
    assert list(tmp_path.iterdir()) == []


def test_train_passes_the_devices_on_to_every_worker_and_divides_the_threads(tmp_path: Path) -> None:
    common: dict[str, Any] = {"spec": job("workers=2"), "folder": tmp_path, "data": None, "device": "cpu"}
    several = DatpsCommands(**common, threads=1, resume=False, devices="cpu:2")
    one = DatpsCommands(**common, threads=1, resume=False)
    for index in range(2):
        assert "--devices cpu:2 --threads 1" in " ".join(several.worker(index=index, server="a:1"))
        assert "--device cpu " in " ".join(one.worker(index=index, server="a:1"))


def test_a_bad_list_is_refused_before_the_worker_connects() -> None:
    with pytest.raises(SpecError, match="expected cpu:N"):
        WorkerOptions(server="a:1", worker_id="worker-0", devices="cpu:0")


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (("data.batch_per_worker=1",), "expected data.batch_per_worker of at least 2, one for each local process"),
        (("exchange.topology=collective",), "expected one device of each worker (exchange.topology=collective has no"),
        (("codec.name=sign",), "expected one device of each worker (codec sign: its residual is kept by one process)"),
        (("codec.name=topk",), "expected one device of each worker (codec topk: its residual is kept by one process)"),
    ],
)
def test_a_job_that_several_processes_cannot_do_is_refused_with_2(settings: tuple[str, ...], text: str) -> None:
    with running_server(job("workers=1", *SMALL, *settings)) as server:
        code, events = work(server.address, devices="cpu:2")
    assert (code, text in error_of(events)) == (2, True), error_of(events)
