"""Early stopping as a function of the evaluations, against the whole history."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.evaluation import Evaluation
from worker.selection import Selection


def evaluation(robust: int, clean: int = 90) -> Evaluation:
    return Evaluation(samples=100, clean_correct=clean, robust_correct=robust)


def after(counts: list[int]) -> Selection:
    """Evaluations after 10, 20, 30, ... rounds."""
    selection = Selection()
    for number, robust in enumerate(counts, start=1):
        selection = selection.after(10 * number, evaluation(robust))
    return selection


@given(st.lists(st.integers(0, 100), min_size=1, max_size=30), st.integers(1, 5))
def test_the_selection_is_what_the_whole_history_says(counts: list[int], patience: int) -> None:
    selection = after(counts)
    best = counts.index(max(counts))
    assert (selection.round, selection.best) == (10 * (best + 1), evaluation(max(counts)))
    assert selection.since == len(counts) - 1 - best
    assert selection.is_over(patience) == (len(counts) - 1 - best >= patience)
    assert not selection.is_over(None)


def test_of_equally_good_models_the_first_is_the_best_whatever_their_clean_accuracy() -> None:
    selection = Selection().after(10, evaluation(50, clean=80)).after(20, evaluation(50, clean=99))
    assert (selection.round, selection.since) == (10, 1)


@given(st.lists(st.integers(0, 100), max_size=30))
def test_a_selection_survives_its_json(counts: list[int]) -> None:
    selection = after(counts)
    assert Selection.from_json(json.loads(json.dumps(selection.to_json()))) == selection


@pytest.mark.parametrize("content", [{}, {"round": 3}, {**(after([5]).to_json() or {}), "since": "many"}, 7])
def test_what_is_no_selection_is_refused(content: object) -> None:
    with pytest.raises((KeyError, TypeError, ValueError)):
        Selection.from_json(content)  # type: ignore[arg-type]
