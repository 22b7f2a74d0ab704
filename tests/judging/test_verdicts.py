"""Counts over samples, the worst case of attacks, and the table of samples."""

from __future__ import annotations

import csv

from worker.judging.verdicts import Verdict, alike, summary, table, worst_case

LABELS = [0, 1, 2, 3, 4]
CLEAN = Verdict(
    predicted=(0, 1, 2, 3, 9),
    distance=(None, None, None, None, 0.0),
    found_by=(None, None, None, None, "clean"),
    seconds=0.5,
)
ATTACK = Verdict(
    predicted=(0, 8, 2, 7, 4),
    distance=(None, 0.125, None, 0.1, None),
    found_by=(None, "restart 2", None, "restart 1", None),
    seconds=1.5,
)
"""Right on what it makes of sample 4, whose clean image is wrong."""


def test_ra_counts_samples_that_are_right_when_perturbed_and_those_that_were_right_before_apart() -> None:
    counts = summary(ATTACK, LABELS, CLEAN.right(LABELS), ("restart 1", "restart 2"))
    assert (counts["robust_correct"], counts["robust_accuracy"]) == (3, 0.6)
    assert counts["robust_and_clean_correct"] == 2
    assert counts["greatest_distance"] == 0.125
    assert counts["after"] == {"restart 1": 0.8, "restart 2": 0.6}


def test_samples_that_are_wrong_already_are_lost_before_the_first_stage() -> None:
    verdict = Verdict(predicted=(9, 1), distance=(0.0, None), found_by=("clean", None), seconds=0.0)
    assert summary(verdict, [0, 1], [False, True], ("apgd-ce", "square"))["after"] == {"apgd-ce": 0.5, "square": 0.5}


def test_one_stage_has_no_course() -> None:
    assert "after" not in summary(ATTACK, LABELS, CLEAN.right(LABELS), ("restart 1",))


def test_worst_case_is_the_intersection() -> None:
    assert worst_case([[True, True, False], [True, False, True]]) == [True, False, False]


def test_no_samples_have_accuracy_zero() -> None:
    counts = summary(Verdict.joined([]), [], [], ("restart 1",))
    assert (counts["robust_accuracy"], counts["greatest_distance"]) == (0.0, None)


def test_parts_are_joined_in_order() -> None:
    joined = Verdict.joined([ATTACK, CLEAN])
    assert joined.predicted == (0, 8, 2, 7, 4, 0, 1, 2, 3, 9)
    assert joined.seconds == 2.0
    assert joined.right([*LABELS, *LABELS]).count(True) == 7


def test_warnings_that_differ_in_numbers_only_are_told_once() -> None:
    told = ["3 points", "randomized", "17 points", "4 points"]
    assert alike(told) == ["3 points (3 such warnings)", "randomized"]


def test_table_has_a_line_for_each_sample() -> None:
    lines = list(table([5, 6, 7, 8, 9], LABELS, CLEAN, {"pgd:20x2": ATTACK}, worst=[True, False, True, False, True]))
    rows = list(csv.DictReader(lines, delimiter="\t"))
    assert [row["index"] for row in rows] == ["5", "6", "7", "8", "9"]
    assert [row["predicted"] for row in rows] == ["0", "1", "2", "3", "9"]
    assert rows[1] == {
        "index": "6",
        "label": "1",
        "predicted": "1",
        "pgd:20x2 predicted": "8",
        "pgd:20x2 robust": "0",
        "pgd:20x2 distance": "0.125",
        "pgd:20x2 found_by": "restart 2",
        "robust": "0",
    }
    assert [row["pgd:20x2 distance"] for row in rows] == ["", "0.125", "", "0.1", ""]
    assert sum(int(row["pgd:20x2 robust"]) for row in rows) == 3


def test_a_sweep_has_no_worst_case_in_the_table() -> None:
    header = next(table([5], [0], CLEAN, {}, worst=None))
    assert header == "index\tlabel\tpredicted"
