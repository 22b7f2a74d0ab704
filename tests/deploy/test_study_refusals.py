"""`datps study`: what is refused, with words and an exit code, and mostly before anything is trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from common.errors import DatpsError, SpecError, StorageError
from deploy.cli import app
from deploy.studies.plan import read_study
from deploy.studies.run import CommandError, document_of
from deploy.studies.table import line_of, verdicts_of
from tests.deploy.studies import ROBUST, TEACHING, TWO_ROWS, Machine, study

TUNED = {"data.validation": 0.1}
RATES: dict[str, Any] = {"tune": {"optimizer.learning_rate": [0.1, 0.2]}}
LABELS: dict[str, Any] = {
    "name": "b",
    "unlabeled": "a",
    "settings": {"data.labeled": 60, "data.unlabeled_fraction": 0.5},
}


def with_labels(settings: dict[str, Any], **of_student: Any) -> dict[str, Any]:
    return {"rows": [{"name": "a", "settings": settings}, {**LABELS, "settings": LABELS["settings"] | of_student}]}


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"seeds": [1, 1]}, "expected different seeds, at least one, got seeds=[1, 1]"),
        ({"tune_seeds": []}, "expected different seeds, at least one, got tune_seeds=[]"),
        ({"rows": []}, "got rows=[]"),
        ({"rows": [{"name": "a"}, {"name": "a"}]}, "expected unique names, got rows=['a', 'a']"),
        ({"rows": [{"name": "a", "init": "b"}, {"name": "b"}]}, "expected a row before 'a', got row=b"),
        ({"rows": [{"name": "a", "settings": {"codec.bit": 4}}]}, "did you mean codec.bits?"),
        ({"rows": [{"name": "a", "recipe": "digits"}]}, "expected a known recipe; did you mean digits-dat-pgd?"),
        ({"row": []}, "expected a known key; did you mean rows?, got key=row"),
        ({"checks": [{"row": "z", "of": "x", "at_least": "a"}]}, "expected one of ['a'], got row=z"),
        # figures
        (
            {"checks": [{"row": "a", "of": "robust_acuracy", "at_least": "a"}]},
            "expected a figure of this study; did you mean 'robust_accuracy'?, got of=robust_acuracy",
        ),
        (
            {"checks": [{"row": "a", "of": "certified accuracy at 0.1", "at_least": "a"}]},
            "expected a figure of this study; did you mean",
        ),
        ({"columns": ["clean"]}, "did you mean 'clean_accuracy'?, got columns=clean"),
        # tuning
        ({"rows": [{"name": "a", **RATES}]}, "expected data.validation above 0 in a row that is tuned"),
        (
            {"rows": [{"name": "a", **RATES}], "settings": {**TUNED, "evaluation.every_epochs": 0}},
            "expected evaluation.every_epochs above 0 in a row that is tuned",
        ),
        (
            {"rows": [{"name": "a", **RATES}], "settings": {**TUNED, "data.split": "own", "data.name": "imagefolder"}},
            "expected data.split=shared in a row that is tuned, got data.split=own (a)",
        ),
        ({"rows": [{"name": "a", "tune": {"codec.bits": []}}]}, "got rows.0.tune.codec.bits=[]"),
        ({"grid": {"codec.bits": []}}, "got grid.codec.bits=[]"),
        (
            {"rows": [{"name": "a", **RATES}], "settings": TUNED, "seeds": [0, 1], "tune_seeds": [1, 2]},
            "expected seeds to tune with that are none of seeds=[0, 1], got tune_seeds=[1, 2]",
        ),
        # judging
        ({"evaluate": ["pgdd:20"]}, "expected pgd, fgsm or autoattack as NAME"),
        ({"evaluate": ["pgd:20", "pgd,steps=20"]}, "expected attacks that differ"),
        ({"certify": {"m": 1000}}, "expected one of noise_std, n0, n, alpha, every, limit, batch, got flag=m"),
        ({"certify": {"n": "many"}}, "got certify.n=many"),
        ({"certify": {"n": 1000}}, "expected noise_std in certify, or smoothing.noise_std above 0"),
        # what other rows have trained
        (
            with_labels({"data.labeled": 60}, **{"data.unlabeled_fraction": 0}),
            "data.unlabeled_fraction above 0 in a row",
        ),
        (with_labels({}), "expected data.labeled in row 'a', which labels the images held back for 'b'"),
        (
            with_labels({"data.labeled": 60, "data.labeled_seed": 1}),
            "data.labeled_seed=0 in row 'a', which labels the images held back, as in 'b', got data.labeled_seed=1",
        ),
        (with_labels({"data.labeled": 60}, **TUNED), "expected data.validation=0.1 in row 'a'"),
        (
            {"settings": {"data.unlabeled_fraction": 0.5}},
            "expected unlabeled: another row, with data.unlabeled_fraction=0.5, got unlabeled=None",
        ),
        (
            {"settings": {"transfer.init": True}},
            "expected init: another row, with transfer.init=true, got init=None (a)",
        ),
        # folders
        (
            {"rows": [{"name": "N = 2"}, {"name": "N-2"}]},
            "from 'N = 2': both runs would be in N-2/seed-0, got row='N-2'",
        ),
        ({"grid": {"codec.bits": [4, 4]}}, "both runs would be in a-bits-4/seed-0"),
        ({"rows": [{"name": "table.md"}]}, "expected a name that no file of the study has, got row=table.md"),
    ],
)
def test_a_study_that_makes_no_sense_is_refused(change: dict[str, Any], text: str) -> None:
    document = {"title": "t", "rows": [{"name": "a"}]} | change
    with pytest.raises(SpecError) as refused:
        read_study(json.dumps(document), "study.yaml")
    assert text in str(refused.value)


def test_seeds_to_tune_with_are_of_no_account_where_nothing_is_tuned() -> None:
    document = {"title": "t", "rows": [{"name": "a"}], "seeds": [1000], "certify": {}}
    assert read_study(json.dumps(document), "study.yaml").certify is None


def test_certificates_that_would_all_abstain_are_refused_before_anything_is_trained(tmp_path: Path) -> None:
    text = TWO_ROWS + "certify: {n: 3, noise-std: 0.5}\n"
    with pytest.raises(SpecError, match="expected at least 10 draws, got n=3"):
        study(text, tmp_path / "out", Machine(ROBUST))
    assert not (tmp_path / "out").exists()


# Checks


def test_a_figure_that_nobody_has_measured_does_not_hold() -> None:
    text = TWO_ROWS.split("checks:")[0] + (
        "checks:\n"
        "  - {row: 4 bits, of: validation_robust_accuracy, at_least: 32 bits}\n"
        "  - {row: 4 bits, of: robust_accuracy, at_least: 32 bits}\n"
    )
    spec = read_study(text, "two.yaml")
    figures = {
        "32 bits": {"robust_accuracy": 0.5},
        "4 bits": {"robust_accuracy": 0.6, "validation_robust_accuracy": 0.7},
    }
    lines = [line_of(row, row, (), {0: of, 1: of}) for row, of in figures.items()]
    assert verdicts_of(spec, lines[:1]) == []
    unmeasured, measured = verdicts_of(spec, lines)
    assert (unmeasured.found, unmeasured.least, unmeasured.holds) == (None, None, False)
    assert (measured.found, measured.holds) == (0.6, True)
    told = "validation robust accuracy of '4 bits' no lower than '32 bits': not measured: DOES NOT HOLD\n"
    assert told in document_of(spec, lines, [unmeasured, measured])


# Commands that fail


@pytest.mark.parametrize(
    ("status", "exit_code", "words"),
    [(75, 75, "ended with 75"), (65, 65, "ended with 65"), (1, 1, "ended with 1"), (-9, 137, "was ended by signal 9")],
)
def test_the_exit_code_is_that_of_the_command_that_failed(
    tmp_path: Path, status: int, exit_code: int, words: str
) -> None:
    machine = Machine(ROBUST, fail_at="32-bits/seed-0", status=status)
    with pytest.raises(CommandError, match=f"datps train {words}; error: expected a better day") as failed:
        study(TWO_ROWS, tmp_path, machine).run()
    assert failed.value.exit_code == exit_code
    assert DatpsError.exit_code == 2


def test_a_disk_that_is_full_is_worth_a_retry(tmp_path: Path) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    with pytest.raises(StorageError, match="No space left on device") as failed:
        study(TWO_ROWS, tmp_path, full).run()  # type: ignore[arg-type]
    assert failed.value.exit_code == 75


# On the command line


def datps_study(*arguments: object) -> tuple[int, str]:
    ended = CliRunner().invoke(app, ["study", *map(str, arguments)])
    assert ended.exception is None or isinstance(ended.exception, SystemExit), ended.exception
    return ended.exit_code, ended.stderr


def saved(folder: Path, text: str) -> Path:
    (folder / "study-it.yaml").write_text(text)
    return folder / "study-it.yaml"


@pytest.mark.parametrize(
    "text",
    ["title: 2024-13-45\nrows: [{name: a}]", "rows: " + "[" * 5000, "title: [", "title: \x00"],
    ids=["no date", "deep", "cut off", "no character"],
)
def test_a_document_that_is_no_yaml_ends_with_words(tmp_path: Path, text: str) -> None:
    code, told = datps_study(saved(tmp_path, text), "--plan")
    assert code == 2
    assert told.startswith(f"error: expected valid YAML, got document={tmp_path}")


@pytest.mark.parametrize("text", ["", "- a", "3"])
def test_a_document_of_something_else_ends_with_words(tmp_path: Path, text: str) -> None:
    code, told = datps_study(saved(tmp_path, text), "--plan")
    assert (code, told.startswith("error: expected a mapping of title, rows and more")) == (2, True)


def test_a_folder_that_cannot_be_made_ends_with_words(tmp_path: Path) -> None:
    document = saved(tmp_path, TWO_ROWS)
    for out in (document, document / "below", "/proc/nope"):
        code, told = datps_study(document, "--out", out)
        assert code == 2
        assert told.startswith(f"error: expected a folder that can be made and written, got out={out} (")
    assert document.read_text() == TWO_ROWS


def test_a_result_that_is_cut_off_ends_with_words(tmp_path: Path) -> None:
    study(TEACHING, tmp_path / "out", Machine(ROBUST)).run()
    (tmp_path / "out/32-bits/seed-0/result.json").write_text('{"clean')
    code, told = datps_study(saved(tmp_path, TEACHING), "--out", tmp_path / "out")
    assert (code, "expected a whole result, got path=" in told) == (2, True)
