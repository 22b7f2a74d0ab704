"""The launcher's decisions, without processes: rules 1 to 7 of `deploy/supervision.py`."""

from __future__ import annotations

import pytest

from deploy.supervision import (
    Done,
    Effect,
    Ended,
    Kill,
    Message,
    Outcome,
    Patience,
    Role,
    Said,
    Signalled,
    Start,
    Supervisor,
    Terminate,
    Tick,
)

PATIENCE = Patience(startup_s=100, aftermath_s=5, stop_s=50, farewell_s=15, kill_s=10)
CTRL_C, SIGTERM = Signalled(interrupt=True), Signalled(interrupt=False)


def running(*, servers: int = 1, workers: int = 2) -> Supervisor:
    """A cluster whose processes have all been started and heard, at time 0."""
    supervisor = Supervisor(servers=servers, workers=workers, patience=PATIENCE)
    supervisor.begin(0)
    for shard in [*range(1, servers), 0]:
        supervisor.handle(Said(process=f"server-{shard}", address=f"host:{shard}"), 0)
    for index in range(workers):
        supervisor.handle(Said(process=f"worker-{index}"), 0)
    return supervisor


def end(supervisor: Supervisor, now_s: float, **exit_codes: int) -> list[Effect]:
    """Ends processes one after the other, `worker_0=143`; returns the last effects."""
    effects: list[Effect] = []
    for name, exit_code in exit_codes.items():
        killed_by = "SIGKILL" if exit_code == -9 else None
        ended = Ended(process=name.replace("_", "-"), exit_code=exit_code, killed_by=killed_by)
        effects = supervisor.handle(ended, now_s)
    return effects


def outcome(effects: list[Effect]) -> Outcome:
    (done,) = effects
    assert isinstance(done, Done)
    return done.outcome


def test_one_server_starts_first_and_workers_when_it_listens() -> None:
    supervisor = Supervisor(servers=1, workers=2, patience=PATIENCE)

    assert supervisor.begin(0) == [Start(process="server-0", role=Role.SERVER, index=0)]
    assert supervisor.handle(Said(process="server-0", address="host:1"), 1) == [
        Start(process="worker-0", role=Role.WORKER, index=0, addresses=("host:1",)),
        Start(process="worker-1", role=Role.WORKER, index=1, addresses=("host:1",)),
    ]


def test_shard_0_starts_when_the_others_listen_and_is_told_their_addresses() -> None:
    supervisor = Supervisor(servers=3, workers=1, patience=PATIENCE)

    assert [effect.process for effect in supervisor.begin(0) if isinstance(effect, Start)] == ["server-1", "server-2"]
    assert supervisor.handle(Said(process="server-2", address="host:2"), 1) == []
    assert supervisor.handle(Said(process="server-1", address="host:1"), 1) == [
        Start(process="server-0", role=Role.SERVER, index=0, addresses=("host:1", "host:2"))
    ]


def test_a_complete_cluster_is_complete() -> None:
    assert outcome(end(running(), 9, worker_0=0, worker_1=0, server_0=0)) == Outcome(exit_code=0, text="complete")


def test_a_process_that_says_nothing_fails_the_cluster_by_name() -> None:
    supervisor = Supervisor(servers=1, workers=1, patience=PATIENCE)
    supervisor.begin(0)

    assert supervisor.handle(Tick(), 99) == []
    assert supervisor.handle(Tick(), 100) == [Kill(process="server-0")]
    ended = outcome(end(supervisor, 101, server_0=-9))
    assert (ended.exit_code, ended.process) == (75, "server-0")
    assert ended.reason == "expected a first word within 100 s of its start, got none"


@pytest.mark.parametrize(
    ("exit_codes", "exit_code", "process"),
    [
        ({"worker_1": 2, "worker_0": 75, "server_0": 75}, 2, "worker-1"),
        ({"worker_0": 75, "server_0": 75, "worker_1": 2}, 2, "worker-1"),
        ({"server_0": 76, "worker_0": 76, "worker_1": 65}, 65, "worker-1"),
        ({"worker_0": 75, "worker_1": 76, "server_0": 75}, 76, "worker-1"),
        ({"worker_0": 75, "worker_1": -9, "server_0": 75}, 75, "worker-1"),
        ({"worker_0": 75, "worker_1": 1, "server_0": 75}, 1, "worker-1"),
        ({"worker_1": 75, "worker_0": 75, "server_0": 75}, 75, "worker-1"),
    ],
)
def test_the_cause_is_told_and_not_its_consequences(exit_codes: dict[str, int], exit_code: int, process: str) -> None:
    ended = outcome(end(running(), 1, **exit_codes))

    assert (ended.exit_code, ended.process) == (exit_code, process)


def test_the_cause_is_told_with_its_error_event() -> None:
    supervisor = running()
    supervisor.handle(Said(process="worker-1", error="expected a data folder"), 1)

    ended = outcome(end(supervisor, 1, worker_1=2, worker_0=75, server_0=75))

    assert ended.text == "worker-1 failed with exit code 2"
    assert ended.reason == "expected a data folder"


def test_after_a_failure_the_others_may_end_by_themselves_then_are_terminated_then_killed() -> None:
    supervisor = running()

    assert end(supervisor, 10, worker_1=-9) == []
    assert supervisor.handle(Tick(), 14) == []
    assert supervisor.handle(Tick(), 15) == [Terminate(process="server-0"), Terminate(process="worker-0")]
    assert supervisor.handle(Tick(), 24) == []
    assert supervisor.handle(Tick(), 25) == [Kill(process="server-0"), Kill(process="worker-0")]
    assert outcome(end(supervisor, 26, server_0=-9, worker_0=-9)) == Outcome(
        exit_code=75, text="worker-1 was killed by SIGKILL", process="worker-1"
    )


def test_servers_without_workers_need_not_wait_for_the_aftermath() -> None:
    supervisor = running()
    end(supervisor, 10, worker_0=2, worker_1=2)

    assert supervisor.handle(Tick(), 11) == [Terminate(process="server-0")]
    assert outcome(end(supervisor, 12, server_0=143)).exit_code == 2


@pytest.mark.parametrize(("signalled", "exit_code"), [(SIGTERM, 143), (CTRL_C, 130)])
def test_a_signal_stops_the_workers_and_then_the_servers(signalled: Signalled, exit_code: int) -> None:
    supervisor = running()

    assert supervisor.handle(signalled, 1) == [Terminate(process="worker-0"), Terminate(process="worker-1")]
    assert supervisor.awaited == ["worker-0", "worker-1"]
    assert end(supervisor, 2, worker_0=143, worker_1=143) == [Terminate(process="server-0")]
    assert outcome(end(supervisor, 3, server_0=143)) == Outcome(exit_code=exit_code, text="stopped")


def test_a_signal_before_the_workers_have_started_stops_the_servers() -> None:
    supervisor = Supervisor(servers=1, workers=1, patience=PATIENCE)
    supervisor.begin(0)

    assert supervisor.handle(SIGTERM, 1) == [Terminate(process="server-0")]
    assert supervisor.handle(Said(process="server-0", address="host:1"), 1) == []
    assert outcome(end(supervisor, 2, server_0=-15)).exit_code == 143


def test_a_worker_that_saves_has_longer_than_one_that_is_thrown_out() -> None:
    supervisor = running()
    supervisor.handle(SIGTERM, 0)

    assert supervisor.handle(Tick(), 49) == []
    assert supervisor.handle(Tick(), 50) == [Kill(process="worker-0"), Kill(process="worker-1")]
    ended = outcome(end(supervisor, 51, worker_0=-9, worker_1=-9, server_0=143))
    assert ended.exit_code == 75
    assert ended.text == "worker-0 did not stop within 50 s and was ended"


def test_a_second_signal_kills_everything_at_once() -> None:
    supervisor = running()
    supervisor.handle(CTRL_C, 1)

    assert supervisor.handle(CTRL_C, 2) == [
        Kill(process="server-0"), Kill(process="worker-0"), Kill(process="worker-1")
    ]  # fmt: skip
    assert outcome(end(supervisor, 3, server_0=-9, worker_0=-9, worker_1=-9)).exit_code == 130


def test_a_training_that_completes_in_spite_of_the_signal_is_complete() -> None:
    supervisor = running()
    supervisor.handle(SIGTERM, 1)

    assert outcome(end(supervisor, 2, worker_0=0, worker_1=0, server_0=143)).exit_code == 0


def test_a_failure_during_the_stop_does_not_shorten_the_saving_of_the_others() -> None:
    supervisor = running()
    supervisor.handle(SIGTERM, 1)
    end(supervisor, 2, worker_1=1)

    assert supervisor.handle(Tick(), 40) == [Terminate(process="server-0")]
    assert outcome(end(supervisor, 41, worker_0=143, server_0=143)).exit_code == 143


def test_a_failed_stop_is_a_failure() -> None:
    supervisor = running()
    supervisor.handle(SIGTERM, 1)

    ended = outcome(end(supervisor, 2, worker_1=1, worker_0=75, server_0=75))
    assert (ended.exit_code, ended.process) == (1, "worker-1")


def test_a_worker_that_somebody_else_stopped_stops_all_in_good_order() -> None:
    supervisor = running()

    assert end(supervisor, 1, worker_1=143) == []
    assert supervisor.handle(Tick(), 6) == [Terminate(process="worker-0")]
    assert end(supervisor, 7, worker_0=143) == [Terminate(process="server-0")]
    assert outcome(end(supervisor, 8, server_0=143)) == Outcome(exit_code=143, text="stopped")


def test_servers_that_stay_after_complete_workers_are_terminated() -> None:
    supervisor = running()
    end(supervisor, 1, worker_0=0, worker_1=0)

    assert supervisor.handle(Tick(), 15) == []
    assert supervisor.handle(Tick(), 16) == [Terminate(process="server-0")]
    assert outcome(end(supervisor, 17, server_0=143)) == Outcome(exit_code=0, text="complete")


def test_the_same_trace_gives_the_same_effects() -> None:
    trace: list[tuple[Message, float]] = [
        (SIGTERM, 1.0),
        (Ended(process="worker-1", exit_code=143), 2.0),
        (Tick(), 60.0),
    ]
    first, second = ([supervisor.handle(m, t) for m, t in trace] for supervisor in (running(), running()))

    assert first == second
