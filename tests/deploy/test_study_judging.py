"""`datps study`: what it takes from earlier runs, and judgements that are made again because the study has changed."""

from __future__ import annotations

import inspect
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from common.errors import DatpsError, SpecError
from deploy import runs
from deploy.certify_cli import certify
from deploy.studies.judging import evaluation_figures
from deploy.studies.plan import CertifySpec
from tests.deploy.studies import ROBUST, TEACHING, TWO_ROWS, Machine, study

ONE = TWO_ROWS.split("  - {name: 4 bits", maxsplit=1)[0].replace("seeds: [0, 1]", "seeds: [0]")
JUDGED = ONE + "evaluate: ['pgd:20', 'pgd:50x2,epsilon=8/255']\n"
CERTIFIED = ONE.replace("epochs: 2,", "epochs: 2, smoothing.noise_std: 0.25,") + "certify: {n: 1000, every: 6}\n"
STARTING = TWO_ROWS.replace("codec.bits: 4}}", "codec.bits: 4}, init: 32 bits}").replace("seeds: [0, 1]", "seeds: [0]")


def done_by(text: str, folder: Path, machine: Machine | None = None) -> list[str]:
    """What one more `datps study` does in a folder."""
    machine = machine or Machine(ROBUST)
    study(text, folder, machine).run()
    return machine.verbs


def figure(folder: Path, name: str) -> Any:
    """Of the first line of study.json."""
    return json.loads((folder / "study.json").read_text())["lines"][0]["figures"].get(name)


# What other runs have trained


def test_a_run_with_pseudo_labels_goes_on_with_them(tmp_path: Path) -> None:
    with pytest.raises(DatpsError, match="datps train ended with 75"):
        done_by(TEACHING, tmp_path, Machine(ROBUST, fail_at="4-bits/seed-0"))
    machine = Machine(ROBUST)  # refuses to train without them, as `datps train` does
    assert done_by(TEACHING, tmp_path, machine) == ["train 4-bits/seed-0"]
    labels = str(tmp_path / "32-bits/seed-0-pseudo-labels.safetensors")
    assert machine.commands[0][:5] == ["train", "--resume", str(tmp_path / "4-bits/seed-0"), "--unlabeled", labels]


def test_a_run_from_another_one_s_parameters_goes_on_from_its_own(tmp_path: Path) -> None:
    with pytest.raises(DatpsError, match="datps train ended with 75"):
        done_by(STARTING, tmp_path, Machine(ROBUST, fail_at="4-bits/seed-0"))
    machine = Machine(ROBUST)
    assert done_by(STARTING, tmp_path, machine) == ["train 4-bits/seed-0"]
    assert "--init" not in machine.commands[0]


def test_runs_from_parameters_that_have_been_trained_anew_are_refused(tmp_path: Path) -> None:
    assert done_by(STARTING, tmp_path) == ["train 32-bits/seed-0", "train 4-bits/seed-0"]
    assert done_by(STARTING, tmp_path) == []
    shutil.rmtree(tmp_path / "32-bits/seed-0")
    with pytest.raises(SpecError, match=r"\(or remove the folder\), got transfer.sha256=.*4-bits/seed-0\)"):
        done_by(STARTING, tmp_path, Machine(ROBUST, version="another "))
    shutil.rmtree(tmp_path / "4-bits/seed-0")
    assert done_by(STARTING, tmp_path) == ["train 4-bits/seed-0"]


def test_a_teacher_that_has_been_trained_anew_labels_anew_and_its_old_students_are_refused(tmp_path: Path) -> None:
    everything = ["train 32-bits/seed-0", "pseudo-label 32-bits/seed-0", "train 4-bits/seed-0"]
    assert done_by(TEACHING, tmp_path) == everything
    assert done_by(TEACHING, tmp_path) == []
    shutil.rmtree(tmp_path / "32-bits/seed-0")
    machine = Machine(ROBUST, version="another ")
    with pytest.raises(
        SpecError, match=r"\(or remove the folder\), got unlabeled=2 unlabeled images .*4-bits/seed-0\)"
    ):
        study(TEACHING, tmp_path, machine).run()
    assert machine.verbs == everything[:2]
    shutil.rmtree(tmp_path / "4-bits/seed-0")
    assert done_by(TEACHING, tmp_path, machine) == everything


def test_labels_that_were_removed_are_made_again_and_their_student_is_kept(tmp_path: Path) -> None:
    done_by(TEACHING, tmp_path)
    (tmp_path / "32-bits/seed-0-pseudo-labels.safetensors").unlink()
    assert done_by(TEACHING, tmp_path) == ["pseudo-label 32-bits/seed-0"]


@pytest.mark.parametrize("named", [True, False], ids=["named by the job", "by an earlier version"])
def test_a_student_without_checkpoints_is_known_by_its_job_if_that_names_its_labels(
    tmp_path: Path, named: bool
) -> None:
    done_by(TEACHING, tmp_path)
    student = tmp_path / "4-bits/seed-0"
    shutil.rmtree(student / "checkpoints")
    if not named:
        job, title = runs.read_job(student)
        earlier = job.model_copy(update={"data": job.data.model_copy(update={"unlabeled_digest": None})})
        runs.write_job(student, earlier, title)
    assert done_by(TEACHING, tmp_path) == []
    shutil.rmtree(tmp_path / "32-bits/seed-0")
    machine = Machine(ROBUST, version="another ")
    if named:
        with pytest.raises(SpecError, match=r"\(or remove the folder\), got unlabeled=[0-9a-f]{32} .*4-bits/seed-0\)"):
            study(TEACHING, tmp_path, machine).run()
    else:
        study(TEACHING, tmp_path, machine).run()
    assert machine.verbs == ["train 32-bits/seed-0", "pseudo-label 32-bits/seed-0"]


# Evaluation


def test_an_evaluation_that_answers_the_study_is_not_made_again(tmp_path: Path) -> None:
    assert done_by(JUDGED, tmp_path) == ["train 32-bits/seed-0", "evaluate 32-bits/seed-0"]
    assert done_by(JUDGED, tmp_path) == []
    assert done_by(JUDGED.replace("'pgd:20'", "'pgd,steps=20'"), tmp_path) == []
    assert done_by(JUDGED.replace("'pgd:20', ", ""), tmp_path) == []  # it has more than is asked for
    assert figure(tmp_path, "pgd:20 accuracy") is None


@pytest.mark.parametrize(
    ("old", "new"),
    [("'pgd:20'", "'pgd:21'"), ("evaluate:", "evaluate_images: 100\nevaluate:")],
    ids=["another attack", "fewer images"],
)
def test_a_study_that_asks_for_something_else_evaluates_again(tmp_path: Path, old: str, new: str) -> None:
    done_by(JUDGED, tmp_path)
    changed = JUDGED.replace(old, new)
    assert done_by(changed, tmp_path) == ["evaluate 32-bits/seed-0"]
    assert done_by(changed, tmp_path) == []
    assert done_by(JUDGED, tmp_path) == ["evaluate 32-bits/seed-0"]


@pytest.mark.parametrize("content", ['{"samples": 36', "[]", '{"samples": 360, "test_samples": 360, "attacks": 3}'])
def test_an_evaluation_that_is_cut_off_is_made_again(tmp_path: Path, content: str) -> None:
    done_by(JUDGED, tmp_path)
    (tmp_path / "32-bits/seed-0/evaluation/evaluation.json").write_text(content)
    assert done_by(JUDGED, tmp_path) == ["evaluate 32-bits/seed-0"]


def test_an_evaluation_that_stays_damaged_ends_the_study_with_words(tmp_path: Path) -> None:
    class Careless(Machine):
        def _evaluate(self, folder: Path, *_: Any) -> None:
            (folder / "evaluation").mkdir()
            (folder / "evaluation/evaluation.json").write_text("{")

    with pytest.raises(SpecError, match="expected an evaluation of the run's model by all attacks") as refused:
        done_by(JUDGED, tmp_path, Careless(ROBUST))
    assert refused.value.exit_code == 2


def test_figures_are_of_the_model_that_the_result_tells_of(tmp_path: Path) -> None:
    done_by(JUDGED, tmp_path)
    file = tmp_path / "32-bits/seed-0/evaluation/evaluation.json"
    assert evaluation_figures(file, ["pgd:20"], None, "32-bits/seed-0") == {"pgd:20 accuracy": 0.06}
    assert evaluation_figures(file, ["pgd:20"], None, None) == {"pgd:20 accuracy": 0.06}
    assert evaluation_figures(file, ["pgd:20"], None, "another") is None


# Certificates


def test_certificates_are_taken_from_the_file_if_they_are_all_there(tmp_path: Path) -> None:
    """`certification.done`, which an earlier version left, says nothing."""
    assert done_by(CERTIFIED, tmp_path) == ["train 32-bits/seed-0", "certify 32-bits/seed-0"]
    assert done_by(CERTIFIED, tmp_path) == []
    file = tmp_path / "32-bits/seed-0/certification.tsv"
    (file.parent / "certification.done").touch()
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:-1]))
    assert done_by(CERTIFIED, tmp_path) == ["certify 32-bits/seed-0"]


def test_a_study_with_other_certificates_makes_them_and_keeps_the_old_ones(tmp_path: Path) -> None:
    done_by(CERTIFIED, tmp_path)
    assert figure(tmp_path, "certified accuracy at 0.15") == [0.0]  # all radii are n / 10,000
    changed, machine = CERTIFIED.replace("n: 1000", "n: 2000"), Machine(ROBUST)
    assert done_by(changed, tmp_path, machine) == ["certify 32-bits/seed-0"]
    assert machine.commands[0][2:] == [
        *("--noise-std", "0.25", "--n0", "100", "--n", "2000", "--alpha", "0.001", "--every", "6", "--batch", "1000"),
        *("--out", str(tmp_path / "32-bits/seed-0/certification-2.tsv"), "--resume", "--device", "cpu"),
    ]
    assert figure(tmp_path, "certified accuracy at 0.15") == [1.0]
    assert done_by(changed, tmp_path) == []
    assert done_by(CERTIFIED, tmp_path) == []
    assert figure(tmp_path, "certified accuracy at 0.15") == [0.0]


def test_a_limit_takes_the_first_certificates_of_the_file(tmp_path: Path) -> None:
    limited = CERTIFIED.replace("every: 6", "every: 6, limit: 10")
    assert done_by(limited, tmp_path) == ["train 32-bits/seed-0", "certify 32-bits/seed-0"]
    assert done_by(limited, tmp_path) == []
    assert done_by(CERTIFIED, tmp_path) == ["certify 32-bits/seed-0"]
    assert done_by(limited, tmp_path) == []


def test_what_is_not_said_of_certificates_is_as_the_command_has_it() -> None:
    parameters = inspect.signature(certify).parameters
    for name, value in CertifySpec().model_dump().items():
        assert parameters[name].default == value, name


# What tuning looks at

TUNED = ONE.replace("epochs: 2,", "epochs: 2, data.validation: 0.1,").replace(
    "seeds: [0]", "seeds: [0]\ntune_seeds: [9]"
)
TUNED = TUNED.replace("codec.name: none}", "codec.name: randomized}, tune: {codec.bits: [4, 8]}")
ACCURACIES = {"32-bits/tune-bits-4/seed-9": 0.5, "32-bits/tune-bits-8/seed-9": 0.4, "32-bits/seed-0": 0.6}


class Told(Machine):
    """Tells of the best model's accuracy on validation data, too: a function of the folder makes the round and it."""

    def __init__(self, best: dict[str, tuple[int, float]], *, of_the_last: bool) -> None:
        super().__init__(ACCURACIES)
        self._best = best
        self._of_the_last = of_the_last

    def _train(self, arguments: Any, flags: dict[str, str]) -> int:
        status = super()._train(arguments, flags)
        file = Path(flags["--out"]) / "result.json"
        result = json.loads(file.read_text())
        if not self._of_the_last:
            del result["validation_robust_accuracy"]
        for key, (round_, accuracy) in self._best.items():
            if key in flags["--out"]:
                result["best"] = {"round": round_, "validation_robust_accuracy": accuracy}
        file.write_text(json.dumps(result))
        return status


def test_tuning_takes_the_last_model_s_accuracy_and_not_the_best_one_s(tmp_path: Path) -> None:
    best = {"bits-4": (3, 0.26), "bits-8": (3, 0.9)}
    lines, _ = study(TUNED, tmp_path, Told(best, of_the_last=True)).run()
    assert lines[0].chosen == {"codec.bits": 4}


def test_results_of_an_earlier_version_are_good_to_tune_with_where_the_last_model_was_the_best(tmp_path: Path) -> None:
    older = Told({"bits-4": (7, 0.3), "bits-8": (7, 0.4)}, of_the_last=False)
    lines, _ = study(TUNED, tmp_path / "last", older).run()
    assert lines[0].chosen == {"codec.bits": 8}
    older = Told({"bits-4": (7, 0.3), "bits-8": (5, 0.4)}, of_the_last=False)
    with pytest.raises(SpecError, match=r"remove these folders.*got result=32-bits/tune-bits-8/seed-9 \("):
        study(TUNED, tmp_path / "earlier", older).run()


def test_a_value_that_is_null_is_chosen_as_it_was_tried(tmp_path: Path) -> None:
    text = TUNED.replace("codec.bits: [4, 8]", "evaluation.attack.step_size: [null, 0.01]")
    robust = {"32-bits/tune-step_size-None/seed-9": 0.5, "32-bits/tune-step_size-0.01/seed-9": 0.4}
    machine = Machine(robust | {"32-bits/seed-0": 0.6})
    lines, _ = study(text, tmp_path, machine).run()
    assert lines[0].chosen == {"evaluation.attack.step_size": None}
    assert "evaluation.attack.step_size=null" in machine.commands[-1]
