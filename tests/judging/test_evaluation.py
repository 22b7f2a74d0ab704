"""`evaluate_model` from end to end, in this process: what it counts, keeps, takes up again and refuses."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import worker.judging.judge
from common.errors import SpecError, StorageError
from tests.judging.support import nearest_mean
from tests.method.support import state_of
from worker.data import Dataset
from worker.evaluation import evaluate
from worker.judging.evaluation import choose, evaluate_model
from worker.judging.judge import Judge, Unit
from worker.judging.run import Unwatched
from worker.judging.verdicts import Verdict
from worker.trained import open_model

JOB = ("attack.epsilon=0.1", "evaluation.batch=90")


@pytest.fixture
def judged(monkeypatch: pytest.MonkeyPatch) -> list[Unit]:
    """The units that have been worked on."""
    seen: list[Unit] = []
    whole = Judge.judge_one

    def judge_one(self: Judge, unit: Unit, begins: Any) -> Verdict:
        seen.append(unit)
        return whole(self, unit, begins)

    monkeypatch.setattr(worker.judging.judge.Judge, "judge_one", judge_one)
    return seen


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "samples.tsv").open(newline="") as stream:
        return list(csv.DictReader(stream, delimiter="\t"))


# What is counted


def test_without_an_attack_it_is_what_training_reports(module_name: str, digits: Dataset) -> None:
    settings = (*JOB, "evaluation.attack.steps=3", "seed=5")
    result = evaluate_model(f"{module_name}:linear", settings=settings)
    opened = open_model(f"{module_name}:linear", settings=settings)
    counted = evaluate(opened.module, digits.test, opened.spec.evaluation_attack, batch=90, seed=5)
    assert (result["samples"], result["clean_correct"]) == (360, counted.clean_correct)
    assert result["clean_accuracy"] == counted.clean_accuracy
    assert (result["robust_accuracy"], result["robust_correct"]) == (counted.robust_accuracy, counted.robust_correct)
    assert result["attack"]["steps"] == 3
    assert [attack["attack"] for attack in result["attacks"]] == ["pgd:3"]


def test_worst_case_is_the_intersection_and_the_files_match_the_counts(module_name: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    attacks = ["pgd:3x2", "fgsm", "pgd:3,norm=l2,epsilon=1"]
    result = evaluate_model(f"{module_name}:linear", settings=JOB, attacks=attacks, out=out)
    rows = rows_of(out)

    assert json.loads((out / "evaluation.json").read_text()) == result
    assert [int(row["index"]) for row in rows] == list(range(360))
    assert sum(row["predicted"] == row["label"] for row in rows) == result["clean_correct"]
    for attack, counts in zip(attacks, result["attacks"], strict=True):
        robust = [row for row in rows if row[f"{attack} robust"] == "1"]
        assert counts["attack"] == attack
        assert len(robust) == counts["robust_correct"]
        assert sum(row["predicted"] == row["label"] for row in robust) == counts["robust_and_clean_correct"]
        assert all(row[f"{attack} predicted"] == row["label"] for row in robust)
        far = [float(row[f"{attack} distance"]) for row in rows if row[f"{attack} distance"]]
        assert max(far) == pytest.approx(counts["greatest_distance"], rel=1e-6)
        assert len(far) == 360 - len(robust)
    all_of = [row for row in rows if all(row[f"{attack} robust"] == "1" for attack in attacks)]
    assert [row["robust"] for row in rows] == ["1" if row in all_of else "0" for row in rows]
    assert len(all_of) == result["robust_correct"] < min(a["robust_correct"] for a in result["attacks"])
    assert "attack" not in result


def test_a_sweep_tells_ra_for_each_value_and_runs_each_attack_once(
    module_name: str, judged: list[Unit], tmp_path: Path
) -> None:
    result = evaluate_model(
        f"{module_name}:linear",
        settings=(*JOB, "evaluation.batch=360"),
        attacks=["pgd:4", "pgd:4,random_start=false"],
        sweeps=["epsilon=0,0.05,0.1", "steps=1,4"],
        out=tmp_path / "out",
    )
    by_epsilon, by_steps = result["sweeps"]
    assert [row["epsilon"] for row in by_epsilon["rows"]] == [0, 0.05, 0.1]
    assert [row["steps"] for row in by_steps["rows"]] == [1, 4]
    assert [attack["robust_accuracy"] for attack in by_epsilon["rows"][0]["attacks"]] == [result["clean_accuracy"]] * 2
    at_job = by_epsilon["rows"][2]["attacks"], by_steps["rows"][1]["attacks"]
    assert [a["robust_correct"] for a in at_job[0]] == [a["robust_correct"] for a in at_job[1]]
    for row in (*by_epsilon["rows"], *by_steps["rows"]):
        assert row["robust_accuracy"] <= min(attack["robust_accuracy"] for attack in row["attacks"])
    assert by_steps["attacks"] == ["pgd", "pgd,random_start=false"]
    assert len(judged) == 1 + 3 * 2 + 1 * 2
    assert (result["attacks"], "robust_accuracy" in result) == ([], False)
    assert "robust" not in rows_of(tmp_path / "out")[0]


def test_a_limit_takes_a_permutation_of_the_seed_and_smaller_ones_are_within_larger_ones(digits: Dataset) -> None:
    hundred, ten, other = choose(digits, 100, 0), choose(digits, 10, 0), choose(digits, 10, 1)
    assert len(hundred) == len(set(hundred)) == 100
    assert list(hundred) == sorted(hundred)
    assert set(ten) < set(hundred)
    assert ten != other
    assert choose(digits, None, 0) == choose(digits, 360, 0) == tuple(range(360))
    for wrong in (0, 361):
        with pytest.raises(SpecError, match=f"expected 1 to 360 samples \\(digits\\), got limit={wrong}"):
            choose(digits, wrong, 0)


def test_limited_samples_get_the_starts_that_they_have_among_all(module_name: str, tmp_path: Path) -> None:
    for name, limit in (("all", None), ("some", 50)):
        evaluate_model(f"{module_name}:linear", settings=JOB, attacks=["pgd:2"], limit=limit, out=tmp_path / name)
    whole = {row["index"]: row for row in rows_of(tmp_path / "all")}
    some = rows_of(tmp_path / "some")
    assert len(some) == 50
    assert [row["pgd:2 robust"] for row in some] == [whole[row["index"]]["pgd:2 robust"] for row in some]


def test_batch_norm_statistics_modes_and_gradients_are_left_as_they_were(
    module_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = open_model(f"{module_name}:WithBatchNorm", settings=JOB)
    opened.module.train()
    opened.module.norm.eval()
    next(opened.module.parameters()).grad = torch.full((10, 64), 3.0)
    before = dict(state_of(opened.module))
    monkeypatch.setattr("worker.judging.evaluation.open_model", lambda *_, **__: opened)
    result = evaluate_model("theirs", attacks=["pgd:2x2", "fgsm"])
    assert dict(state_of(opened.module)) == before
    assert 0 < result["robust_correct"] < result["clean_correct"]


# What is kept


def test_finished_attacks_are_not_done_again(module_name: str, tmp_path: Path, judged: list[Unit]) -> None:
    options: dict[str, Any] = {"settings": JOB, "out": tmp_path / "out"}
    first = evaluate_model(f"{module_name}:linear", attacks=["pgd:2"], **options)
    judged.clear()
    both = evaluate_model(f"{module_name}:linear", attacks=["fgsm", "pgd:2,epsilon=0.1"], **options)

    clean, fgsm = [Unit(None, batch) for batch in range(4)], [Unit(0, batch) for batch in range(4)]
    assert judged == [*clean, *fgsm]
    assert both["attacks"][1]["robust_correct"] == first["attacks"][0]["robust_correct"]
    assert both["attacks"][1]["seconds"] == first["attacks"][0]["seconds"]
    judged.clear()
    evaluate_model(f"{module_name}:linear", attacks=["pgd:2"], batch=100, **options)
    assert len(judged) == 8, "other batches are rounded differently"
    judged.clear()
    evaluate_model(f"{module_name}:linear", attacks=["pgd:2"], **{**options, "settings": (*JOB, "seed=1")})
    assert len(judged) == 8, "another seed has other starts"


def test_an_interrupted_evaluation_goes_on_batch_by_batch(module_name: str, tmp_path: Path, judged: list[Unit]) -> None:
    options: dict[str, Any] = {"settings": JOB, "attacks": ["pgd:2", "fgsm"]}
    expected = evaluate_model(f"{module_name}:linear", **options)

    class Interrupts(Unwatched):
        def judged(self, label: str, samples: int, right: int) -> None:  # noqa: ARG002
            if (label, samples) == ("pgd:2", 180):
                raise KeyboardInterrupt

    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        evaluate_model(f"{module_name}:linear", out=out, watcher=Interrupts(), **options)
    assert not (out / "evaluation.json").exists()
    part = next((out / "parts").glob("pgd*.jsonl"))
    part.write_text(part.read_text() + '{"batch": 2, "predicted": [1, 2')  # cut off while it was written
    judged.clear()
    result = evaluate_model(f"{module_name}:linear", out=out, **options)
    assert [unit for unit in judged if unit.attack == 0] == [Unit(0, 2), Unit(0, 3)]
    for name in ("clean_correct", "robust_correct", "robust_and_clean_correct"):
        assert result[name] == expected[name]
    assert len(part.read_text().splitlines()) == 5
    judged.clear()
    evaluate_model(f"{module_name}:linear", out=out, **options)
    assert {unit.attack for unit in judged} == {None}


def test_a_part_of_another_format_is_done_again(module_name: str, tmp_path: Path, judged: list[Unit]) -> None:
    options: dict[str, Any] = {"settings": JOB, "attacks": ["fgsm"], "out": tmp_path / "out"}
    first = evaluate_model(f"{module_name}:linear", **options)
    (part,) = (tmp_path / "out/parts").glob("fgsm-*.jsonl")
    part.write_text(part.read_text().replace('"format": 1', '"format": 0'))
    judged.clear()
    assert evaluate_model(f"{module_name}:linear", **options)["robust_correct"] == first["robust_correct"]
    assert len(judged) == 8


def test_a_folder_of_another_model_or_of_something_else_is_refused(module_name: str, tmp_path: Path) -> None:
    out, other = tmp_path / "out", tmp_path / "other"
    evaluate_model(f"{module_name}:linear", settings=JOB, attacks=["fgsm"], out=out)
    with pytest.raises(SpecError, match="expected an evaluation of this model"):
        evaluate_model(f"{module_name}:WithBatchNorm", settings=JOB, attacks=["fgsm"], out=out)
    other.mkdir()
    (other / "thesis.tex").touch()
    with pytest.raises(SpecError, match="expected a new or empty folder, or one of an earlier evaluation"):
        evaluate_model(f"{module_name}:linear", settings=JOB, attacks=["fgsm"], out=other)
    with pytest.raises(SpecError, match="expected a folder, got out="):
        evaluate_model(f"{module_name}:linear", settings=JOB, attacks=["fgsm"], out=other / "thesis.tex")
    with pytest.raises(StorageError, match="expected a folder with room to write"):
        evaluate_model(f"{module_name}:linear", settings=JOB, attacks=["fgsm"], out=other / "thesis.tex" / "x")


def test_the_result_says_what_it_depends_on(module_name: str) -> None:
    result = evaluate_model(
        f"{module_name}:linear", settings=(*JOB, "seed=9"), attacks=["autoattack,epsilon=0", "fgsm"], limit=20
    )
    assert (result["seed"], result["batch"], result["samples"], result["test_samples"]) == (9, 90, 20, 360)
    assert result["devices"] == ["cpu"]
    assert {"torch", "pyautoattack", "datps"} <= set(result["versions"])
    assert result["attacks"][0]["parameters"]["version"] == "standard"
    assert result["attacks"][1]["parameters"]["epsilon"] == 0.1
    assert len(result["model_digest"]) == 32
    assert "pyautoattack" not in evaluate_model(f"{module_name}:linear", attacks=["fgsm"])["versions"]


def test_digest_is_of_names_shapes_and_values(digits: Dataset) -> None:
    digest: Callable[[torch.nn.Module], str] = worker.judging.judge.model_digest
    one, two = nearest_mean(digits), nearest_mean(digits)
    assert digest(one) == digest(two)
    with torch.no_grad():
        two[1].bias[3] += 1e-6
    assert digest(one) != digest(two)
    assert digest(torch.nn.Linear(2, 3, bias=False)) != digest(torch.nn.Linear(3, 2, bias=False))


# What is refused


@pytest.mark.parametrize(
    ("attribute", "expected"),
    [
        ("four_classes", "expected a model with logits [N, 10], one for each class of digits, got logits=[N, 4]"),
        ("other_images", "expected a model of images [N, 1, 8, 8] (digits), got model="),
        ("Detached", "expected a model whose logits have a gradient with respect to the images"),
    ],
)
def test_a_model_that_does_not_fit_is_refused(module_name: str, attribute: str, expected: str) -> None:
    with pytest.raises(SpecError) as refused:
        evaluate_model(f"{module_name}:{attribute}")
    assert expected in str(refused.value)


def test_bad_attacks_are_refused_before_the_model_is_looked_for() -> None:
    with pytest.raises(SpecError, match="expected pgd, fgsm or autoattack"):
        evaluate_model("nowhere:model", attacks=["pdg"])
    with pytest.raises(SpecError, match="expected cpu:N"):
        evaluate_model("nowhere:model", devices="tpu:0")


def test_too_little_memory_is_told(module_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr("worker.judging.restarts.attack_batch", full)
    with pytest.raises(SpecError, match="expected fewer images per forward pass, got batch=90"):
        evaluate_model(f"{module_name}:linear", settings=JOB)
