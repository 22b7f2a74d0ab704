"""How grpc is told to read its sockets: as we have measured it, unless the user has said otherwise."""

from __future__ import annotations

import os

import pytest

from deploy.cluster import child_environment
from deploy.grpc_tuning import tune_grpc

NAME = "GRPC_EXPERIMENTS"


@pytest.fixture(autouse=True)
def untouched(monkeypatch: pytest.MonkeyPatch) -> None:
    """The variable is absent, and afterwards as it was."""
    monkeypatch.setenv(NAME, "recorded, so that it is restored")
    monkeypatch.delenv(NAME)


@pytest.mark.parametrize("theirs", ["tcp_frame_size_tuning", "-event_engine_client,tcp_rcv_lowat", ""])
def test_what_the_user_has_set_is_left_alone_even_if_it_is_nothing(theirs: str) -> None:
    os.environ[NAME] = theirs
    tune_grpc()
    assert os.environ[NAME] == theirs


def test_otherwise_readers_wake_for_whole_messages_and_no_thread_pool_reads_in_their_place() -> None:
    tune_grpc()
    experiments = set(os.environ[NAME].split(","))
    assert {"tcp_frame_size_tuning", "tcp_rcv_lowat"} <= experiments
    others = {each for each in experiments if each.startswith("-event_engine_")}
    assert {"-event_engine_client", "-event_engine_listener"} <= others
    assert len(experiments) == 2 + len(others)


def test_a_second_time_changes_nothing_and_processes_that_we_start_read_alike() -> None:
    tune_grpc()
    ours = os.environ[NAME]
    tune_grpc()
    assert os.environ[NAME] == child_environment(1)[NAME] == ours
