"""A training that catastrophic overfitting ends: complete, saved, and its result says why; or only warned of."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.processes.test_worker_in_thread import train_alone
from worker.checkpoint import find_checkpoint, load_checkpoint
from worker.judging.evaluation import evaluate_model

OVERFITS = ("attack.name=fgsm", "attack.epsilon=0.3", "overfitting.least_ratio=1", "model.width=8")
"""At the ratio 1 any difference is one."""


def test_where_overfitting_ends_a_training_it_is_complete_and_its_result_says_why(tmp_path: Path) -> None:
    code, events = train_alone(tmp_path, None, *OVERFITS, "overfitting.stop=true", "schedule.epochs=40")
    assert code == 0
    result = json.loads((tmp_path / "result.json").read_text())
    told = [event for event in events if event["event"] == "overfitting"]
    assert [event["round"] for event in told] == [result["rounds"]]
    assert told[0]["text"].endswith("; the training ends here")
    rounds = result["rounds"]
    assert rounds % 11 == 0
    assert rounds < 440
    assert result["ended"].startswith(f"ended after round {rounds} of 440: catastrophic overfitting, accuracy on 128 ")
    checkpoint = load_checkpoint(find_checkpoint(tmp_path))
    assert (checkpoint.round, checkpoint.rounds) == (rounds, 440)
    assert len((tmp_path / "rounds.jsonl").read_text().splitlines()) == rounds
    checks = [event for event in events if event["event"] == "overfitting_check"]
    assert [event["round"] for event in checks] == list(range(11, rounds + 1, 11))
    assert checks[-1]["pgd_accuracy"] < checks[-1]["attacked_accuracy"]
    assert evaluate_model(str(tmp_path))["robust_accuracy"] == result["robust_accuracy"]


def test_where_it_only_warns_the_training_goes_on_to_its_end(tmp_path: Path) -> None:
    code, events = train_alone(tmp_path, None, *OVERFITS, "schedule.epochs=6")
    assert code == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["rounds"], "ended" in result) == (66, False)
    told = [event["text"] for event in events if event["event"] == "overfitting"]
    assert told
    assert all("catastrophic overfitting" in text and "ends here" not in text for text in told)


@pytest.mark.parametrize("settings", [("attack.name=pgd",), ("attack.name=fgsm", "overfitting.check_every_epochs=0")])
def test_no_other_training_is_checked(settings: tuple[str, ...]) -> None:
    code, events = train_alone(None, None, *settings)
    assert code == 0
    assert not [event for event in events if event["event"].startswith("overfitting")]
