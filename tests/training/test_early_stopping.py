"""Early stopping in whole trainings: real servers, workers of threads, run folders."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from common.config import JobSpec
from common.errors import SpecError
from tests.local.support import CPU, dataset_of
from tests.local.support import train as train_locally
from tests.processes.test_worker_in_thread import TRAINING_S, error_of, image_folder, work
from tests.support import DEADLINE_S, checkpoint_of, job, running_server
from worker.checkpoint import load_checkpoint
from worker.datasets import load_dataset
from worker.evaluation import evaluate
from worker.judging.evaluation import evaluate_model
from worker.workplace import Workplace

JUDGED = ("evaluation.every_epochs=1", "evaluation.attack.steps=1", "attack.steps=1", "attack.epsilon=0.1")
STUCK = ("workers=2", "data.batch_per_worker=150", "optimizer.learning_rate=1e-30", "model.width=4", *JUDGED)
"""Four rounds an epoch, none of which changes a weight: no evaluation is better than the first."""
STOPPING = (*STUCK, "data.validation=200", "evaluation.patience=2", "checkpoint.every_epochs=1", "checkpoint.keep=5")


def run(
    spec: JobSpec, out: Path | None, resume: Path | None = None, data: Sequence[Path] = ()
) -> list[tuple[int, list[dict[str, Any]]]]:
    """All workers of a job; worker-0 has the run folder. Their exit codes and events."""
    with running_server(spec) as server, ThreadPoolExecutor(spec.workers) as pool:
        done = [
            pool.submit(
                work,
                server.address,
                f"worker-{n}",
                out=out if n == 0 else None,
                resume=resume,
                data=data[n] if data else None,
            )
            for n in range(spec.workers)
        ]
        results = [future.result(TRAINING_S) for future in done]
        if all(code == 0 for code, _ in results):
            server.outcome.result(DEADLINE_S)
    return results


def result_of(folder: Path) -> dict[str, Any]:
    result: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return result


def rounds_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]


def events_of(events: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [event for event in events if event["event"] == kind]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[tuple[int, list[dict[str, Any]]]]]:
    """A training of at most 40 rounds that nothing improves."""
    out = tmp_path_factory.mktemp("runs") / "stopped"
    return out, run(job(*STOPPING, "schedule.epochs=10"), out)


def test_training_stops_on_all_workers_in_the_round_in_which_patience_is_over(stopped: Any) -> None:
    """Judged after 4, 8 and 12 rounds; the third result is known at the end of round 13."""
    out, results = stopped
    assert [code for code, _ in results] == [0, 0]
    assert [events_of(events, "round")[-1]["round"] for _, events in results] == [13, 13]
    evaluations = events_of(results[1][1], "evaluation")
    assert [(e["round"], e["data"], e["samples"]) for e in evaluations] == [
        (4, "validation", 200),
        (8, "validation", 200),
        (12, "validation", 200),
    ]
    (told,) = events_of(results[0][1], "early_stop")
    assert "stopped early after round 13: best after round 4, none of 2 evaluations since was better" in told["text"]
    result = result_of(out)
    assert (result["rounds"], result["stopped_early"], result["best"]["round"]) == (13, True, 4)
    assert result["best"]["validation_robust_accuracy"] == evaluations[0]["robust_accuracy"]
    assert result["samples"] == 360


def test_the_best_model_is_kept_beside_the_newest_and_judged_on_test_data(stopped: Any) -> None:
    out, _ = stopped
    names = sorted(path.name for path in (out / "checkpoints").iterdir())
    assert names == ["best", "round-000004", "round-000008", "round-000012", "round-000013"]
    best = load_checkpoint(out / "checkpoints" / "best")
    assert best.round == best.selection.round == 4
    report, result = evaluate_model(str(out / "checkpoints" / "best")), result_of(out)
    assert report["robust_accuracy"] == result["best"]["robust_accuracy"]
    assert report["clean_accuracy"] == result["best"]["clean_accuracy"]


def test_the_result_tells_the_last_model_s_accuracy_on_validation_data_too(stopped: Any) -> None:
    out, _ = stopped
    spec, result = job(*STOPPING, "schedule.epochs=10"), result_of(out)
    dataset, last = load_dataset(spec.data, root=None), load_checkpoint(out / "checkpoints" / "round-000013")
    assert dataset.validation is not None
    with Workplace.build(spec, dataset, CPU, last, None).replica.judged() as model:
        found = evaluate(model, dataset.validation, spec.evaluation_attack, batch=200, seed=spec.seed, device=CPU)
    assert (result["validation_clean_accuracy"], result["validation_robust_accuracy"]) == (
        found.clean_accuracy,
        found.robust_accuracy,
    )
    assert result["validation_clean_accuracy"] != result["clean_accuracy"]


@pytest.mark.parametrize("round_", [8, 12, 13])
def test_a_resumed_run_remembers_the_best_and_stops_in_the_same_round(
    stopped: Any, tmp_path: Path, round_: int
) -> None:
    before, _ = stopped
    source = before / "checkpoints" / f"round-{round_:06d}"
    out = tmp_path / "resumed"
    assert [code for code, _ in run(job(*STOPPING, "schedule.epochs=10"), out, source)] == [0, 0]
    assert [line["round"] for line in rounds_of(out)] == [*range(round_ + 1, 14)]
    names = ("clean_accuracy", "robust_accuracy", "best", "rounds", "stopped_early", "parameter_digest")
    assert {name: result_of(out)[name] for name in names} == {name: result_of(before)[name] for name in names}
    assert load_checkpoint(out / "checkpoints" / "best").round == 4


def test_with_more_patience_a_stopped_run_can_go_on(stopped: Any, tmp_path: Path) -> None:
    before, _ = stopped
    spec = job(*STOPPING, "schedule.epochs=10", "evaluation.patience=3")
    run(spec, tmp_path / "on", before / "checkpoints" / "round-000013")
    assert result_of(tmp_path / "on")["rounds"] == 17


def test_what_was_judged_by_one_attack_is_not_compared_with_what_another_one_judges(stopped: Any) -> None:
    before, _ = stopped
    spec = job(*STOPPING, "schedule.epochs=10", "evaluation.attack.steps=2")
    results = run(spec, None, before / "checkpoints" / "round-000008")
    assert [code for code, _ in results] == [65, 65]
    assert "expected evaluation.attack.steps=1 as in" in error_of(results[0][1])


def test_without_patience_training_goes_to_its_end_and_the_last_model_is_a_candidate_too(tmp_path: Path) -> None:
    settings = ("workers=1", "data.batch_per_worker=300", "data.validation=200", "schedule.epochs=3", *JUDGED)
    out = tmp_path / "run"
    ((code, events),) = run(job(*settings, "model.width=8", "optimizer.learning_rate=0.03"), out)
    result = result_of(out)
    assert (code, result["rounds"], "stopped_early" in result) == (0, 12, False)
    judged = {event["round"]: event["robust_accuracy"] for event in events_of(events, "evaluation")}
    assert list(judged) == [4, 8]
    assert max(judged.values()) < result["best"]["validation_robust_accuracy"]  # it was still learning
    assert result["best"]["round"] == 12
    for name in ("robust_accuracy", "validation_robust_accuracy", "validation_clean_accuracy"):
        assert result["best"][name] == result[name], name
    assert load_checkpoint(out / "checkpoints" / "best").round == 12


def test_the_best_checkpoint_is_the_model_that_was_judged_and_not_the_one_a_round_later(tmp_path: Path) -> None:
    """With batch norm, whose statistics have moved on when the result is known, and with averaged weights.

    Each worker has images of its own: the last model is no candidate, since nobody has all validation data.
    """
    model = ("model.name=resnet8", "model.width=4", "optimizer.ema_decay=0.9", "schedule.epochs=3")
    data = ("data.name=imagefolder", "data.split=own", "data.validation=0.25", "data.batch_per_worker=4")
    spec, out = job("workers=2", *model, *data, *JUDGED), tmp_path / "run"
    roots = [image_folder(tmp_path / "a"), image_folder(tmp_path / "b", images=20)]
    results = run(spec, out, data=roots)
    evaluations = events_of(results[0][1], "evaluation")
    assert [(e["round"], e["samples"]) for e in evaluations] == [(6, 6 + 10), (12, 6 + 10)]
    result, path = result_of(out), out / "checkpoints" / "best"
    best = load_checkpoint(path)
    assert best.round == result["best"]["round"] in (6, 12)
    replica = Workplace.build(spec, load_dataset(spec.data, root=roots[0]), CPU, best, None).replica
    assert replica.parameter_digest().hex() == rounds_of(out)[best.round - 1]["parameter_digest"]
    assert json.loads((path / "state.json").read_text())["parameter_digest"] == replica.parameter_digest().hex()
    assert int(best.tensors["optimizer.t"]) == best.round

    assert result["weights"] == "ema"
    assert "validation_robust_accuracy" not in result
    averaged, raw = (evaluate_model(str(out), data=roots[0], weights=weights) for weights in (None, "raw"))
    assert averaged["weights"] == "ema"
    assert averaged["robust_accuracy"] == result["robust_accuracy"]
    assert averaged["clean_accuracy"] == result["clean_accuracy"]
    assert (raw["weights"], raw["samples"]) == ("raw", averaged["samples"])
    of_best = evaluate_model(str(path), data=roots[0])
    assert of_best["robust_accuracy"] == result["best"]["robust_accuracy"]


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ("ema", r"expected weights=raw \(trained without optimizer.ema_decay\), got weights=ema"),
        ("best", "expected raw or ema, got weights=best"),
    ],
)
def test_weights_that_are_not_there_are_refused(stopped: Any, weights: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        evaluate_model(str(stopped[0]), weights=weights)


# Workers of several local processes

SMALL = ("model.name=resnet8", "model.width=4", "data.batch_per_worker=200", "exchange.bucket_bytes=2048", *JUDGED)
AVERAGED = ("optimizer.ema_decay=0.9", "optimizer.clip_norm=1", "data.validation=200", "codec.name=none")


def test_one_worker_of_two_processes_averages_selects_and_stops_as_two_workers_do() -> None:
    same = ("attack.random_start=false", "evaluation.patience=1", "optimizer.learning_rate=1e-30", "schedule.epochs=9")
    two_workers = job("workers=2", *SMALL, *AVERAGED, *same)
    two_processes = job("workers=1", *SMALL, *AVERAGED, *same, "data.batch_per_worker=400")
    (one,), (other,) = train_locally(two_workers, [1, 1], 100)
    ((first, second),) = train_locally(two_processes, [2], 100)
    rounds = len(one.recording.reports)
    assert rounds < 27
    for share in (other, first, second):
        assert len(share.recording.reports) == rounds
        assert share.recording.best == one.recording.best != []
        assert share.workplace.replica.selection == one.workplace.replica.selection
        assert share.state.keys() == one.state.keys()
        assert all(torch.equal(tensor, one.state[name]) for name, tensor in share.state.items())
        assert share.replica_digest == one.replica_digest
    assert any(name.startswith("ema.") for name in one.state)


@pytest.mark.parametrize(("optimizer", "sizes"), [("lars", [2, 1]), ("adamw", [1, 1]), ("sgd", [1, 2])])
def test_a_resumed_run_with_averages_and_a_selection_is_bit_identical(optimizer: str, sizes: list[int]) -> None:
    settings = (f"optimizer.name={optimizer}", "optimizer.learning_rate=0.01", "schedule.name=cosine")
    more = ("schedule.warmup=0.1", "codec.name=randomized")
    spec = job("workers=2", *SMALL, *AVERAGED, *settings, *more)
    whole = train_locally(spec, sizes, 6)
    first = train_locally(spec, sizes, 4)[0][0]
    selection = first.workplace.replica.selection
    assert selection.round == 3
    saved = dataclasses.replace(checkpoint_of(spec, dataset_of(spec), first.state, 4), selection=selection)
    resumed = train_locally(spec, sizes, 6, saved)
    digests = {share.replica_digest for worker in [*whole, *resumed] for share in worker}
    assert len(digests) == 1
    assert resumed[0][0].workplace.replica.selection == whole[0][0].workplace.replica.selection
