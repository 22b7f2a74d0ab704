"""`datps train` from the run folder to the baseline, with daemons that play scripts."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from datetime import datetime
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from common.config import AttackName, JobSpec
from common.errors import SpecError
from common.spec_sources import load_job_spec
from deploy import runs
from deploy.display import JsonLinesDisplay
from deploy.supervision import Outcome
from deploy.train import TrainOptions, baseline_spec, in_words, job_to_resume, robust_name, train
from tests.deploy.fakes import BRIEF, CONNECTS, LISTENS, FakeCommands, Script, result

SPEC = JobSpec(workers=1)


@dataclass
class Launch:
    """One call of `train`; `workers` is what worker-0 plays in each cluster, {folder} is its run folder."""

    folder: Path
    workers: list[Script]
    clusters: list[tuple[str, bool]] = field(default_factory=list)
    specs: list[JobSpec] = field(default_factory=list)
    output: StringIO = field(default_factory=StringIO)

    def commands(self, spec: JobSpec, folder: Path, resume: bool) -> FakeCommands:
        self.clusters.append((folder.name, resume))
        self.specs.append(spec)
        script = json.loads(json.dumps(self.workers.pop(0)).replace("{folder}", str(folder)))
        return FakeCommands({"server-0": [LISTENS], "worker-0": script})

    def run(self, **options: Any) -> Outcome:
        wanted = TrainOptions(**{"spec": SPEC, "title": "digits", "folder": self.folder, **options})
        return train(wanted, JsonLinesDisplay(self.output), commands=self.commands, patience=BRIEF)

    def events(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in map(json.loads, self.output.getvalue().splitlines()) if event["event"] == kind]


def completes(clean: float, robust: float) -> Script:
    return [CONNECTS, ["write", "{folder}/result.json", json.dumps(result(clean, robust))]]


def test_a_run_is_followed_by_its_baseline_and_both_are_in_the_result(tmp_path: Path) -> None:
    launch = Launch(tmp_path, [completes(0.98, 0.76), completes(0.99, 0.03)])

    outcome = launch.run()

    assert outcome.exit_code == 0
    assert launch.clusters == [(tmp_path.name, False), ("baseline", False)]
    written = json.loads((tmp_path / "result.json").read_text())
    assert written == {**result(0.98, 0.76), "baseline": {"clean_accuracy": 0.99, "robust_accuracy": 0.03}}
    (told,) = launch.events("result")
    assert told["baseline"] == written["baseline"]
    assert told["folder"] == str(tmp_path)
    files = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    logs = {f"logs/{name}" for name in ("server-0.jsonl", "server-0.stderr", "worker-0.jsonl", "worker-0.stderr")}
    own = {"job.yaml", "result.json", *logs}
    assert files == own | {f"baseline/{name}" for name in own}


def test_the_baseline_differs_in_its_attack_only_and_is_judged_by_the_same_one() -> None:
    spec = load_job_spec(settings=["attack.epsilon=0.2", "evaluation.every_epochs=3", "codec.bits=4"])

    baseline = baseline_spec(spec)

    assert baseline.attack.name is AttackName.NONE
    assert baseline.evaluation_attack == spec.evaluation_attack
    assert baseline.evaluation.every_epochs == 0
    kept = {"model", "data", "optimizer", "schedule", "codec", "seed", "workers", "objective"}
    assert baseline.model_dump(include=kept) == spec.model_dump(include=kept)


@pytest.mark.parametrize(
    "options", [{"baseline": False}, {"spec": load_job_spec(settings=["workers=1", "attack.name=none"])}]
)
def test_no_baseline_is_trained_where_none_is_wanted_or_it_is_the_run_itself(
    options: dict[str, Any], tmp_path: Path
) -> None:
    launch = Launch(tmp_path, [completes(0.98, 0.76)])

    assert launch.run(**options).exit_code == 0
    assert len(launch.clusters) == 1
    assert "baseline" not in json.loads((tmp_path / "result.json").read_text())


def test_a_failed_baseline_leaves_the_runs_result(tmp_path: Path) -> None:
    launch = Launch(tmp_path, [completes(0.98, 0.76), [CONNECTS, ["stderr", "no memory"], ["exit", 1]]])

    outcome = launch.run()

    assert (outcome.exit_code, outcome.text) == (1, "baseline: worker-0 failed with exit code 1")
    assert outcome.reason == "no memory"
    assert len(launch.events("result")) == 1
    assert json.loads((tmp_path / "result.json").read_text()) == result(0.98, 0.76)


def test_a_run_without_a_result_is_not_taken_for_complete(tmp_path: Path) -> None:
    outcome = Launch(tmp_path, [[CONNECTS]]).run()

    assert (outcome.exit_code, outcome.text) == (75, "worker-0 is complete, but there is no result.json")


def test_a_stopped_run_is_not_followed_by_its_baseline(tmp_path: Path) -> None:
    launch = Launch(tmp_path, [[CONNECTS, ["exit", 143]]])

    assert launch.run() == Outcome(exit_code=143, text="stopped")
    assert len(launch.clusters) == 1


def test_a_complete_run_is_not_trained_again_but_gets_the_baseline_it_lacks(tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text(json.dumps(result(0.98, 0.76)))
    launch = Launch(tmp_path, [completes(0.99, 0.03)])

    assert launch.run(resume=True).exit_code == 0
    assert launch.clusters == [("baseline", False)]
    assert launch.events("complete")[0]["text"] == f"{tmp_path} is complete: 4 rounds"

    again = Launch(tmp_path, [])
    assert again.run(resume=True).exit_code == 0
    assert again.clusters == []
    assert again.events("result")[0]["baseline"] == {"clean_accuracy": 0.99, "robust_accuracy": 0.03}


def test_a_stopped_baseline_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text(json.dumps(result()))
    (tmp_path / "baseline/checkpoints/round-000002").mkdir(parents=True)
    launch = Launch(tmp_path, [completes(0.99, 0.03)])

    assert launch.run(resume=True).exit_code == 0
    assert launch.clusters == [("baseline", True)]


def test_a_baseline_that_saved_nothing_starts_anew(tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text(json.dumps(result()))
    (tmp_path / "baseline").mkdir()
    (tmp_path / "baseline/rounds.jsonl").write_text('{"round": 1}\n')
    launch = Launch(tmp_path, [completes(0.99, 0.03)])

    assert launch.run(resume=True).exit_code == 0
    assert launch.clusters == [("baseline", False)]
    assert not (tmp_path / "baseline/rounds.jsonl").exists()


def resumable(folder: Path) -> Path:
    runs.write_job(folder, load_job_spec(settings=["seed=5"]), "digits")
    (folder / "checkpoints/round-000010").mkdir(parents=True)
    return folder


def resume(folder: Path, *settings: str, **variables: str) -> tuple[JobSpec, str]:
    return job_to_resume(folder, settings=settings, environment=variables, reserved=frozenset({"DATPS_DATA"}))


def test_a_resumed_run_has_the_job_and_title_of_its_folder(tmp_path: Path) -> None:
    spec, title = resume(resumable(tmp_path), "seed=5", DATPS_DATA="images", DATPS_CODEC__BITS="8")

    assert (spec.seed, title) == (5, "digits")


def test_settings_that_would_make_a_resumed_run_another_job_are_refused(tmp_path: Path) -> None:
    resumable(tmp_path)
    where = f"as in {tmp_path}/job.yaml, got"

    with pytest.raises(SpecError, match=f"^expected seed=5 {where} seed=6 \\(a resumed run keeps its job\\)$"):
        resume(tmp_path, "seed=6")
    with pytest.raises(SpecError, match=f"^expected codec.bits=8 {where} codec.bits=4"):
        resume(tmp_path, DATPS_CODEC__BITS="4")


def test_a_folder_that_cannot_be_resumed_is_refused_with_what_it_lacks(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"^expected a run folder with job.yaml, got resume=.*No such file"):
        resume(tmp_path)
    runs.write_job(tmp_path, SPEC, "digits")
    with pytest.raises(SpecError, match=r"^expected a run folder with checkpoints, got resume=.*none found"):
        resume(tmp_path)
    (tmp_path / "result.json").write_text("{")
    with pytest.raises(SpecError, match=r"^expected a whole result, got path="):
        resume(tmp_path)


def test_run_folders_are_named_by_recipe_and_time_and_never_taken_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    now = datetime(2026, 1, 2, 3, 4, 5)

    first = runs.new_run_folder("digits", None, now)
    second = runs.new_run_folder("digits", None, now)
    runs.point_latest_to(first)
    runs.point_latest_to(second)

    assert [str(first), str(second)] == ["runs/digits-20260102-030405", "runs/digits-20260102-030405-2"]
    assert (tmp_path / "runs/latest").resolve() == tmp_path / second
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == [
        "digits-20260102-030405",
        second.name,
        "latest",
    ]
    assert runs.without_links(Path("runs/latest")) == second


def test_another_folder_must_be_new_or_empty_and_leaves_latest_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    now = datetime(2026, 1, 2)

    folder = runs.new_run_folder("digits", tmp_path / "a/b", now)
    runs.point_latest_to(folder)
    assert runs.new_run_folder("digits", folder, now) == folder
    (folder / "file").touch()

    assert not (tmp_path / "runs").exists()
    with pytest.raises(SpecError, match=r"^expected a new or empty folder \(or --resume\), got out=.*a/b"):
        runs.new_run_folder("digits", folder, now)
    with pytest.raises(SpecError, match=r"^expected a folder that can be made, got out=.*file"):
        runs.new_run_folder("digits", folder / "file", now)


def test_a_job_is_told_in_words() -> None:
    spec = load_job_spec(settings=["attack.epsilon=8/255", "codec.two_sided=true"])

    assert in_words(spec) == "small_cnn on digits, pgd epsilon 8/255, 10 steps, lamb, 8-bit randomized both ways"
    assert robust_name(spec) == "PGD-20, epsilon 8/255"
    spec = load_job_spec(settings=["attack.name=none", "codec.name=none", "evaluation.attack.epsilon=0.2"])
    assert in_words(spec) == "small_cnn on digits, no attack, lamb, none one way"
    settings = ["optimizer.name=sgd", "optimizer.learning_rate=0.1", "optimizer.base_batch=64", "workers=8"]
    assert "sgd at 0.8 (0.1 for 64 samples)" in in_words(load_job_spec(settings=settings))
    assert robust_name(spec) == "PGD-20, epsilon 0.2"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["attack.norm=l2", "attack.epsilon=0.5", "attack.steps=4"], "pgd epsilon 0.5 (l2), 4 steps"),
        (["attack.name=fgsm", "attack.replays=4"], "fgsm epsilon 8/255, 4 replays"),
        (["attack.loss=kl", "objective.name=trades"], "pgd epsilon 8/255, 10 steps, KL, TRADES beta 6"),
        (["attack.warmup=1/3"], "pgd epsilon 8/255, 10 steps, epsilon warm-up 0.333"),
        (
            ["attack.norm=l2", "attack.epsilon=1", "smoothing.noise_std=0.25", "smoothing.samples=20"],
            "pgd epsilon 1 (l2), 10 steps, noise 0.25, 20 copies",
        ),
        (["attack.name=none", "smoothing.noise_std=0.5"], "no attack, noise 0.5"),
    ],
)
def test_attack_smoothing_and_objective_are_told_in_words(settings: list[str], words: str) -> None:
    spec = load_job_spec(settings=settings)
    assert in_words(spec) == f"small_cnn on digits, {words}, lamb, 8-bit randomized one way"


def test_an_l2_evaluation_says_so() -> None:
    assert robust_name(load_job_spec(settings=["attack.norm=l2", "attack.epsilon=0.5"])) == "PGD-20, epsilon 0.5 (l2)"


@pytest.mark.parametrize(
    "settings",
    [
        ["attack.name=fgsm", "attack.replays=4"],
        ["attack.loss=kl", "objective.name=trades"],
        ["attack.name=fgsm", "overfitting.check_every_epochs=2"],
        ["attack.norm=l2", "attack.epsilon=2", "smoothing.noise_std=0.25"],
    ],
    ids=" ".join,
)
def test_every_method_has_a_baseline_without_attack_judged_by_the_same_one(settings: list[str]) -> None:
    spec = load_job_spec(settings=settings)
    baseline = baseline_spec(spec)
    assert baseline.attack.name is AttackName.NONE
    assert baseline.evaluation_attack == spec.evaluation_attack
    assert baseline.smoothing == spec.smoothing
    assert baseline.overfitting_check_epochs == 0
