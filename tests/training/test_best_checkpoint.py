"""The best checkpoint on disk: kept, replaced, copied, forgotten."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from common.config import JobSpec
from common.errors import CheckpointError
from worker.checkpoint import (
    BEST,
    best_checkpoint,
    copy_best,
    find_checkpoint,
    forget_after,
    load_checkpoint,
    save_checkpoint,
)
from worker.evaluation import Evaluation
from worker.selection import Selection

SELECTION = Selection(round=20, best=Evaluation(samples=100, clean_correct=90, robust_correct=50), since=3)


def description(round_: int, **more: Any) -> dict[str, Any]:
    shape = {"classes": 10, "in_channels": 1, "image_size": 8, "mean": [0.5], "std": [0.5]}
    return {"round": round_, "rounds": 90, "spec": JobSpec().model_dump(mode="json"), "data": "digits", **shape, **more}


def save(folder: Path, round_: int, *, best: bool = False, keep: int = 2, **more: Any) -> Path:
    tensors = {"model.weight": torch.full((3,), float(round_))}
    return save_checkpoint(folder, tensors, description(round_, **more), keep=keep, best=best)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_best_checkpoint_is_not_removed_when_newer_ones_are_saved(tmp_path: Path) -> None:
    save(tmp_path, 10)
    save(tmp_path, 10, best=True)
    for round_ in (20, 30, 40):
        save(tmp_path, round_)
    assert names(tmp_path) == ["best", "round-000030", "round-000040"]
    assert load_checkpoint(tmp_path / BEST).round == 10
    assert find_checkpoint(tmp_path).name == "round-000040"


def test_a_better_one_takes_its_place_and_what_a_crash_left_is_swept_away(tmp_path: Path) -> None:
    save(tmp_path, 10, best=True)
    (tmp_path / ".best.cafe").mkdir()
    save(tmp_path, 20, best=True)
    assert names(tmp_path) == ["best"]
    assert float(load_checkpoint(tmp_path / BEST).tensors["model.weight"][0]) == 20.0


def test_a_checkpoint_remembers_the_selection_and_one_of_before_has_none(tmp_path: Path) -> None:
    path = save(tmp_path, 30, selection=SELECTION.to_json())
    assert load_checkpoint(path).selection == SELECTION
    assert load_checkpoint(save(tmp_path, 40)).selection == Selection()
    assert load_checkpoint(save(tmp_path, 50, selection=None)).selection == Selection()


def test_a_damaged_selection_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, 30, selection={"round": 20})
    with pytest.raises(CheckpointError, match=r"expected a whole checkpoint.*KeyError"):
        load_checkpoint(path)


@pytest.mark.parametrize(("round_", "kept"), [(10, True), (9, False), (30, True)])
def test_going_on_from_an_earlier_round_forgets_a_best_model_of_a_later_one(
    tmp_path: Path, round_: int, kept: bool
) -> None:
    save(tmp_path, 10, best=True)
    forget_after(tmp_path, round_)
    assert (tmp_path / BEST).exists() == kept


def test_a_best_checkpoint_that_is_not_whole_is_forgotten(tmp_path: Path) -> None:
    path = save(tmp_path, 10, best=True)
    (path / "state.json").write_text("{")
    forget_after(tmp_path, 50)
    assert names(tmp_path) == []


def test_the_best_checkpoint_is_only_found_if_it_is_of_the_round_that_is_asked_for(tmp_path: Path) -> None:
    assert best_checkpoint(tmp_path, 10) is None
    save(tmp_path, 10, best=True)
    assert best_checkpoint(tmp_path, 10) == tmp_path / BEST
    assert best_checkpoint(tmp_path, 20) is None
    assert best_checkpoint(tmp_path, None) is None


def test_a_copy_is_the_same_checkpoint(tmp_path: Path) -> None:
    source, folder = save(tmp_path / "a", 30), tmp_path / "b"
    copy_best(source, folder)
    assert names(folder) == ["best"]
    assert json.loads((folder / BEST / "state.json").read_text()) == json.loads((source / "state.json").read_text())
    assert load_checkpoint(folder / BEST).round == 30
