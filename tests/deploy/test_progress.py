"""What `datps train` shows: the reducer, its picture, the table at the end, and the lines for programs."""

from __future__ import annotations

import json
from collections.abc import Iterable
from io import StringIO
from typing import Any

from rich.console import Console, RenderableType

from deploy.display import JsonLinesDisplay, TerminalDisplay, render, summary
from deploy.progress import ProcessState, ProcessView, RunView, update
from deploy.supervision import Role
from tests.deploy.fakes import result, round_event

EMPTY = RunView(title="digits-dat-pgd", folder="runs/one", job="small_cnn on digits, pgd epsilon 0.2")
STARTED: list[dict[str, Any]] = [
    {"event": "started", "process": "server-0", "role": "server", "pid": 10, "time": 100.0},
    {"event": "started", "process": "worker-0", "role": "worker", "pid": 11, "time": 100.0},
    {"event": "started", "process": "worker-1", "role": "worker", "pid": 12, "time": 100.0},
]
JOINED = [
    {"event": "listening", "process": "server-0", "address": "127.0.0.1:5000", "shard": 0, "job_id": "datps"},
    {"event": "joined", "process": "server-0", "worker_id": "worker-0", "joined": 1, "expected": 2},
    {"event": "joined", "process": "server-0", "worker_id": "worker-1", "joined": 2, "expected": 2},
]
ADMITTED = [
    {"event": "view", "process": "server-0", "view": 1, "workers": ["worker-0", "worker-1"]},
    *(
        {
            "event": "admitted", "process": f"worker-{index}", "worker_index": index, "workers": 2, "view": 1,
            "parameters": 75242, "rounds": 4, "device": "cpu", "model": "small_cnn", "data": "digits",
        }
        for index in range(2)
    ),
]  # fmt: skip
EVALUATION = {"round": 2, "clean_accuracy": 0.94, "robust_accuracy": 0.44, "samples": 360}


def seen(events: Iterable[dict[str, Any]], view: RunView = EMPTY) -> RunView:
    for event in events:
        view = update(view, event)
    return view


def rounds(*numbers: int) -> list[dict[str, Any]]:
    return [{**round_event(n), "process": f"worker-{index}"} for n in numbers for index in range(2)]


def ended(process: str, exit_code: int, killed_by: str | None = None) -> dict[str, Any]:
    return {"event": "ended", "process": process, "exit_code": exit_code, "killed_by": killed_by}


def states(view: RunView) -> list[str]:
    return [process.state.value for process in view.processes.values()]


def text_of(picture: RenderableType, width: int = 140) -> str:
    console = Console(record=True, width=width, file=StringIO())
    console.print(picture)
    return console.export_text()


def test_processes_go_from_starting_to_done() -> None:
    view = seen(STARTED)
    assert states(view) == ["starting", "starting", "starting"]
    assert view.processes["worker-1"] == ProcessView(name="worker-1", role=Role.WORKER, pid=12, started_s=100.0)

    view = seen(JOINED, view)
    assert states(view) == ["listening", "joined", "joined"]

    view = seen(ADMITTED, view)
    assert states(view) == ["training", "training", "training"]
    assert [process.place for process in view.processes.values()] == [
        "127.0.0.1:5000", "worker_index 0, cpu", "worker_index 1, cpu"
    ]  # fmt: skip

    view = seen([ended("worker-0", 0), ended("worker-1", 143), ended("server-0", 75)], view)
    assert states(view) == ["failed", "done", "stopped"]
    assert [process.note for process in view.processes.values()] == ["exit code 75", "", ""]


def test_a_failed_process_keeps_its_own_words_and_a_killed_one_its_signal() -> None:
    view = seen([*STARTED, {"event": "error", "process": "worker-0", "text": "no data"}])

    view = seen([ended("worker-0", 2), ended("worker-1", -9, "SIGKILL")], view)

    assert [(p.state, p.note) for p in view.processes.values()][1:] == [
        (ProcessState.FAILED, "no data"), (ProcessState.FAILED, "SIGKILL")
    ]  # fmt: skip


def test_rounds_add_up_bytes_of_all_workers_and_seconds_of_one() -> None:
    view = seen([*STARTED, *JOINED, *ADMITTED, *rounds(1, 2)])

    assert (view.round, view.rounds, view.epoch, view.loss) == (2, 4, 1.0, 1.0)
    assert (view.pushed_bytes, view.pulled_bytes) == (1000, 2000)
    assert (view.pushed_total_bytes, view.pulled_total_bytes) == (4000, 8000)
    assert (view.attack_s, view.compute_s, view.communication_s) == (0.8, 0.4, 0.2)
    assert (view.seconds, view.remaining_s) == (1.4, 1.4)


def test_a_warning_of_overfitting_is_shown_and_where_it_ended_the_training_so_is_the_end() -> None:
    text = "round 20: catastrophic overfitting, accuracy on 256 training images 0.010 under PGD-10, 0.970 attacked"
    view = seen([*STARTED, *ADMITTED, {"event": "overfitting", "process": "worker-1", "round": 20, "text": text}])
    assert view.message == text
    assert "catastrophic overfitting" in text_of(render(view))
    ended = {**result(0.9, 0.0), "ended": f"ended after round 20 of 150: {text}"}
    assert "ended after round 20 of 150" in text_of(summary("digits-dat-fgsm", "runs/a", ended, "PGD-20"))
    assert "ended" not in text_of(summary("digits-dat-fgsm", "runs/a", result(0.9, 0.0), "PGD-20"))


def test_a_late_round_of_a_slow_worker_does_not_turn_the_clock_back() -> None:
    first, late = rounds(2)[0], rounds(1)[1]

    view = seen([*STARTED, *ADMITTED, first, late])

    assert (view.round, view.loss, view.pushed_total_bytes) == (2, 1.0, 2000)


def test_the_newest_evaluation_is_shown_and_at_last_the_result() -> None:
    older = {"event": "evaluation", "process": "worker-1", **EVALUATION, "round": 1, "robust_accuracy": 0.1}

    view = seen([{"event": "evaluation", "process": "worker-0", **EVALUATION}, older])
    assert (view.clean_accuracy, view.robust_accuracy, view.evaluated_round) == (0.94, 0.44, 2)

    view = update(view, {"event": "result", "process": "worker-0", **result(0.98, 0.76)})
    assert (view.clean_accuracy, view.robust_accuracy, view.evaluated_round) == (0.98, 0.76, 4)


def test_who_is_waited_for_is_shown_until_the_next_round() -> None:
    waiting = {"event": "waiting", "process": "worker-0", "missing": ["worker-1"], "waited_s": 30.2, "round": 2}
    view = seen([*STARTED, *JOINED, *ADMITTED, *rounds(1), waiting])

    assert (view.waiting_for, view.processes["worker-0"].state) == (("worker-1",), ProcessState.WAITING)
    assert "waiting for worker-1 (30 s)" in text_of(render(view))

    view = seen(rounds(2), view)
    assert (view.waiting_for, view.processes["worker-0"].state) == ((), ProcessState.TRAINING)


def test_a_slow_start_is_said_aloud() -> None:
    view = seen([*STARTED, JOINED[0], {"event": "tick", "time": 102.0}])
    assert view.slow_starters == ()

    view = update(view, {"event": "tick", "time": 107.0})
    assert view.slow_starters == ("worker-0", "worker-1")
    assert "waiting for worker-0, worker-1 to start (7 s)" in text_of(render(view))


def test_what_cannot_be_shown_changes_nothing() -> None:
    view = seen(STARTED)

    strange = [
        {"event": "round", "process": "worker-0"},
        {"event": "new"},
        {"event": "listening", "process": "server-0"},
    ]

    assert seen([*strange, ended("stranger", 0)], view) == view


def test_the_picture_shows_what_a_person_wants() -> None:
    view = seen([*STARTED, *JOINED, *ADMITTED, *rounds(1, 2)])
    view = update(view, {"event": "evaluation", "process": "worker-0", **EVALUATION})

    text = text_of(render(view))

    for fact in (
        *("digits-dat-pgd", "small_cnn on digits, pgd epsilon 0.2", "run folder runs/one"),
        *("server-0", "127.0.0.1:5000", "worker_index 1, cpu", "training"),
        *("round 2/4", "epoch 1.0", "0:01 left", "loss 1, accuracy 50.0 %, learning rate 0.03"),
        "clean accuracy 94.0 %, robust accuracy 44.0 % (round 2)",
        "pushed 1.00 kB and pulled 2.00 kB per round and worker, 4.00 kB and 8.00 kB in all",
        "attacking 0.8 s, computing 0.4 s, communicating 0.2 s",
    ):
        assert fact in text


def test_a_large_cluster_is_cut_to_those_that_fare_worst() -> None:
    many = [{"event": "started", "process": f"worker-{n}", "role": "worker", "pid": n, "time": 0.0} for n in range(100)]
    joined = [{"event": "joined", "process": "server-0", "worker_id": f"worker-{n}"} for n in range(99)]

    text = text_of(render(seen([*many, *joined, ended("worker-50", 1)])))

    assert "worker-50" in text
    assert "worker-99" in text
    assert "and 85 more" in text


def test_the_end_compares_with_the_baseline_and_with_float32() -> None:
    baseline = {"clean_accuracy": 0.99, "robust_accuracy": 0.031}

    text = text_of(summary("digits-dat-pgd", "runs/one", {**result(), "baseline": baseline}, "PGD-20, epsilon 0.2"))

    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "model clean accuracy (TA) robust accuracy (RA, PGD-20, epsilon 0.2)" in lines
    assert "digits-dat-pgd 98.0 % 76.0 %" in lines
    assert "the same without attacks 99.0 % 3.1 %" in lines
    assert "time 12.5 s, of which 8.0 s attacking, 3.0 s computing, 1.5 s communicating (4 rounds, 2 workers)" in lines
    assert "pushed 1.01 kB per round and worker; float32 takes 4.00 kB (3.96 x)" in lines
    assert "run folder runs/one" in lines


def test_the_end_names_the_best_model_on_validation_data_too() -> None:
    best = {"round": 3, "clean_accuracy": 0.97, "robust_accuracy": 0.781, "validation_robust_accuracy": 0.8}

    def lines_with(best: dict[str, Any]) -> list[str]:
        text = text_of(summary("digits-dat-pgd", "runs/one", {**result(), "best": best}, "PGD-20, epsilon 0.2"))
        return [" ".join(line.split()) for line in text.splitlines()]

    assert "its best on validation data (round 3) 97.0 % 78.1 %" in lines_with(best)
    gone = {"round": 3, "validation_robust_accuracy": 0.8, "checkpoint": None}
    assert not any("its best" in line for line in lines_with(gone))


def test_an_evaluation_on_validation_data_is_called_one_and_early_stopping_is_told() -> None:
    view = seen([*STARTED, *JOINED, *ADMITTED, *rounds(1, 2)])
    event = {"event": "evaluation", "process": "worker-0", **EVALUATION, "data": "validation"}
    text = text_of(render(seen([event, {"event": "early_stop", "process": "worker-0", "text": "no better"}], view)))
    assert "validation clean accuracy 94.0 %" in " ".join(text.split())
    assert "worker-0: no better" in text
    assert "test clean accuracy 98.0 %" in " ".join(
        text_of(render(update(view, {"event": "result", "process": "worker-0", **result(0.98, 0.76)}))).split()
    )


def test_on_a_terminal_the_last_picture_stays() -> None:
    console = Console(file=StringIO(), force_terminal=True, width=120)
    with TerminalDisplay(console) as display:
        display.open(EMPTY)
        for event in [*STARTED, *JOINED, *ADMITTED, *rounds(1, 2, 3, 4), ended("worker-0", 0)]:
            display.observe(event)
        display.result("digits-dat-pgd", "runs/one", result(), "PGD-20")

    assert isinstance(console.file, StringIO)
    shown = console.file.getvalue()
    assert "round 4/4" in shown
    assert shown.index("round 4/4") < shown.rindex("robust accuracy (RA, PGD-20)")


def test_programs_get_json_lines_of_what_matters() -> None:
    stream = StringIO()
    many = [{**event, "time": 1000 + event["round"] / 4} for event in rounds(*range(1, 9))]
    with JsonLinesDisplay(stream) as display:
        display.open(EMPTY)
        for event in [*STARTED, {"event": "tick", "process": "train"}, *many]:
            display.observe(event)
        display.observe({"event": "result", "process": "worker-0"})
        display.result("digits-dat-pgd", "runs/one", result(), "PGD-20")

    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [line["event"] for line in lines] == ["run", *["started"] * 3, *["round"] * 3, "result"]
    assert {(line["process"], line["round"]) for line in lines if line["event"] == "round"} == {
        ("worker-0", 1), ("worker-0", 4), ("worker-0", 8)
    }  # fmt: skip
    assert lines[-1]["robust_accuracy"] == 0.76


def test_a_reader_that_has_gone_away_is_no_error_of_the_job() -> None:
    stream = StringIO()
    stream.close()

    with JsonLinesDisplay(stream) as display:
        display.say("error", "no one hears this")
