"""What a report takes for one experiment, what its rows say of it, and which lines it draws over batch sizes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from common.errors import SpecError
from deploy.report.collect import collect
from deploy.report.experiments import by_size, experiments, told_apart
from deploy.report.page import Table, table_1, table_3, table_4
from tests.deploy.report_runs import make_run

SEMI = ("workers=12", "data.unlabeled_fraction=0.5")


def ours_of(table: Table | None) -> list[tuple[str, str, str]]:
    """(words, RA, runs) of our rows."""
    assert table is not None
    return [(cells[1].removeprefix("ours: "), cells[3], cells[-1]) for cells, is_ours in table.rows if is_ours]


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ("codec.bits=4", ("8 bits", "4 bits")),
        ("objective.name=trades", ("8 bits", "8 bits, trades")),
        ("optimizer.learning_rate=0.25", tuple(f"8 bits, optimizer.learning_rate={rate}" for rate in (0.01, 0.25))),
        ("attack.epsilon=0.3", ("8 bits, attack.epsilon=0.03137", "8 bits, attack.epsilon=0.3")),
        ("data.labeled=60", ("8 bits, data.labeled=null", "8 bits, data.labeled=60")),
        ("optimizer.beta1=0.95", ("8 bits, optimizer.beta1=0.9", "8 bits, optimizer.beta1=0.95")),
        ("schedule.epochs=7", ("8 bits, schedule.epochs=2", "8 bits, schedule.epochs=7")),
    ],
)  # fmt: skip
def test_another_job_is_another_row_that_says_in_what(tmp_path: Path, other: str, said: tuple[str, str]) -> None:
    usual = ("workers=6", "schedule.epochs=2", "optimizer.learning_rate=0.01")
    make_run(tmp_path / "a", *usual, robust=0.6)
    make_run(tmp_path / "b", *usual, other, robust=0.8)
    where = "digits, small_cnn, 6 x 64, randomized, "
    assert ours_of(table_1(collect([tmp_path]))) == [
        (where + said[0], "60.00", "1"),
        (where + said[1], "80.00", "1"),
    ]


@pytest.mark.parametrize(
    "same",
    [
        ("seed=1",),
        ("job_id=other",),
        ("exchange.bucket_bytes=4096",),
        ("deadlines.round_s=9",),
        ("checkpoint.keep=7",),
        ("transfer.sha256=" + "ab" * 32,),
        ("data.unlabeled_digest=" + "ab" * 16,),
    ],
)
def test_seed_and_how_a_job_is_carried_out_make_no_other_experiment(tmp_path: Path, same: tuple[str, ...]) -> None:
    init = ("transfer.init=true", "transfer.sha256=" + "cd" * 32)
    files = (*init, "data.unlabeled_fraction=0.5", "data.unlabeled_digest=" + "cd" * 16)
    make_run(tmp_path / "a", *files)
    make_run(tmp_path / "b", *files, *same)
    assert [len(experiment.runs) for experiment in experiments(collect([tmp_path]))] == [2]


def test_who_averages_makes_another_experiment(tmp_path: Path) -> None:
    make_run(tmp_path / "a", "codec.name=none")
    make_run(tmp_path / "b", "codec.name=none", "exchange.topology=collective")
    words = [each for each, _, _ in ours_of(table_4(collect([tmp_path])))]
    assert words == [f"{bits}; digits, small_cnn, 4 x 64, none" for bits in ("32 bits", "32 bits, HPC")]


def test_keys_that_the_words_speak_of_are_named_only_where_the_words_are_alike() -> None:
    keys = [{"bits": 8, "lr": 0.1}, {"bits": 4, "lr": 0.1}, {"bits": 4, "lr": 0.2}]
    assert told_apart(["none", "none", "none"], keys, ["bits"]) == [
        "none, lr=0.1, bits=8",
        "none, lr=0.1, bits=4",
        "none, lr=0.2",
    ]
    assert told_apart(["8", "4", "4"], keys, ["bits"]) == ["8, lr=0.1", "4, lr=0.1", "4, lr=0.2"]
    assert told_apart(["a", "a"], [{"x": 0.12345}, {"x": 0.12346}]) == ["a, x=0.12345", "a, x=0.12346"]


def test_a_wide_network_stands_below_the_papers_row_of_its_network(tmp_path: Path) -> None:
    for name, batch in (("preact_resnet18", 2048), ("wide_resnet28_10", 128), ("small_cnn", 16)):
        make_run(tmp_path / name, *SEMI, f"model.name={name}", f"data.batch_per_worker={batch}")
    table = table_3(collect([tmp_path]))
    assert table is not None
    settings = [cells[1].split(",")[:2] for cells, _ in table.rows]
    assert settings == [
        ["paper: ResNet-18", " 12 x 2048"],
        ["ours: digits", " preact_resnet18"],
        ["paper: ResNet-18", " 12 x 2048"],
        ["paper: WRN-28-10", " 12 x 128"],
        ["ours: digits", " wide_resnet28_10"],
        ["paper: WRN-28-10", " 12 x 128"],
        ["ours: digits", " small_cnn"],
    ]


def test_runs_that_only_prepare_others_are_left_out_unless_they_are_asked_for(tmp_path: Path) -> None:
    for part in ("row/seed-0", "row/tune-lr-0.1/seed-1000", "smoke", "smoke/first", "smoke/baseline", "first/seed-0"):
        if not (tmp_path / part).exists():
            make_run(tmp_path / part)
    found = [str(run.folder.relative_to(tmp_path)) for run in collect([tmp_path])]
    assert found == ["first/seed-0", "row/seed-0", "smoke"]  # a row of a study may be called `first`
    assert len(collect([tmp_path / "row/tune-lr-0.1"])) == 1
    assert len(collect([tmp_path / "smoke/first"])) == 1


def test_evaluations_of_a_run_within_a_run_are_not_its_own(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "smoke")
    nothing = json.dumps({"samples": 9, "attacks": [], "sweeps": []})
    for place in (folder / "evaluation", make_run(folder / "first") / "evaluation"):
        place.mkdir()
        (place / "evaluation.json").write_text(nothing)
    assert len(collect([tmp_path])[0].judged) == 1


def test_figures_1_and_2_average_seeds_but_never_experiments(tmp_path: Path) -> None:
    for batch, robust in ((16, 0.8), (32, 0.6)):
        for seed, more in ((0, 0.0), (1, 0.1)):
            make_run(
                tmp_path / f"{batch}-{seed}", f"data.batch_per_worker={batch}", f"seed={seed}", robust=robust + more
            )
        make_run(tmp_path / f"{batch}-e", f"data.batch_per_worker={batch}", "attack.epsilon=0.3", robust=0.1)
    make_run(tmp_path / "only-size-of-its-kind", "data.batch_per_worker=16", "attack.epsilon=0.4", robust=0.2)
    found = {
        name: {
            size: sorted(run.result["robust_accuracy"] for run in runs if run.result) for size, runs in sizes.items()
        }
        for name, sizes in by_size(collect([tmp_path])).items()
    }
    assert found == {
        "DAT-PGD, attack.epsilon=0.03137": {64: [0.8, 0.9], 128: [0.6, 0.7]},
        "DAT-PGD, attack.epsilon=0.3": {64: [0.1], 128: [0.1]},
    }


def test_workers_and_learning_rate_may_follow_the_size_along_a_line(tmp_path: Path) -> None:
    make_run(tmp_path / "a", "workers=2", "optimizer.learning_rate=0.01")
    make_run(tmp_path / "b", "workers=4", "optimizer.learning_rate=0.02")
    assert {name: list(sizes) for name, sizes in by_size(collect([tmp_path])).items()} == {"DAT-PGD": [128, 256]}
    make_run(tmp_path / "c", "workers=4", "optimizer.learning_rate=0.03")
    assert by_size(collect([tmp_path])) == {}  # two rates at one size: neither is the line's


def test_a_folder_with_nothing_but_preparations_is_refused(tmp_path: Path) -> None:
    make_run(tmp_path / "row/tune-lr-0.1/seed-1000")
    with pytest.raises(SpecError, match=r"but for folders tune-\*, first and baseline"):
        collect([tmp_path])
