"""Recipes: each is a valid job, and the numbers that the paper or the README name are in it."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml

from common.config import JobSpec
from common.errors import SpecError
from common.spec_sources import differences, load_job_spec
from deploy import recipes
from deploy.report.collect import communication_of, method_of
from deploy.report.paper import TABLE_4
from worker.data import BatchPlan

NAMES = [each.name for each in recipes.all_recipes()]


def job(name: str, *settings: str) -> JobSpec:
    return load_job_spec(yaml_text=recipes.recipe(name).text, yaml_name=name, settings=settings)


def test_the_default_recipe_comes_first() -> None:
    assert NAMES[0] == recipes.DEFAULT
    assert NAMES[1:] == sorted(path.stem for path in recipes.FOLDER.glob("*.yaml") if path.stem != recipes.DEFAULT)


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_is_a_valid_job_with_a_description(name: str) -> None:
    recipe = recipes.recipe(name)

    assert isinstance(job(name), JobSpec)
    assert recipe.text.startswith(f"# {recipe.description}\n")
    assert len(recipe.description) > 20


def test_settings_win_over_a_recipe() -> None:
    assert job("digits-dat-pgd", "codec.bits=4", "seed=2").codec.bits == 4


def test_an_unknown_recipe_is_refused_with_the_nearest_one() -> None:
    with pytest.raises(
        SpecError, match=r"^expected a known recipe; did you mean cifar10-dat-pgd\?, got recipe=cifar-pgd"
    ):
        recipes.recipe("cifar-pgd")


def test_the_default_recipe_is_the_main_job() -> None:
    spec = job("digits-dat-pgd")

    assert (spec.seed, spec.workers, spec.servers, spec.data.batch_per_worker) == (0, 4, 1, 64)
    assert (spec.attack.name, spec.attack.epsilon, spec.attack.steps, spec.attack.step_size) == ("pgd", 0.2, 7, 0.05)
    assert (spec.optimizer.name, spec.optimizer.learning_rate) == ("lamb", 0.03)
    assert (spec.schedule.epochs, spec.schedule.warmup, spec.schedule.decay_at) == (30, 0.1, (2 / 3, 0.9))
    assert (spec.codec.name, spec.codec.bits, spec.codec.block, spec.codec.scale) == ("randomized", 8, 512, "linf")
    assert spec.evaluation_attack.steps == 20
    assert spec.evaluation_attack.resolved_step_size == 0.2 / 8


def test_the_imagenet_recipe_is_the_papers() -> None:
    spec = job("imagenet-dat-pgd")

    assert (spec.workers, spec.data.batch_per_worker, spec.data.image_size) == (6, 512, 224)
    assert (spec.attack.epsilon, spec.attack.steps, spec.evaluation_attack.steps) == (2 / 255, 4, 10)
    assert (spec.schedule.epochs, spec.schedule.warmup) == (30, 5 / 30)
    assert spec.schedule.decay_at == (20 / 30, 25 / 30, 28 / 30)
    assert spec.optimizer.weight_decay == 1e-4


@pytest.mark.parametrize(
    ("name", "method", "communication", "drawn"),
    [
        ("imagenet-at", "AT", "32 bits", "1 x 512"),
        ("imagenet-fast-at", "Fast AT", "32 bits", "1 x 512"),
        ("imagenet-dat-pgd", "DAT-PGD", "32 bits", "6 x 512"),
        ("imagenet-dat-fgsm", "DAT-FGSM", "32 bits", "6 x 512"),
        ("imagenet-dat-pgd-no-lalr", "DAT-PGD w/o LALR", "32 bits", "6 x 512"),
        ("imagenet-dat-fgsm-no-lalr", "DAT-FGSM w/o LALR", "32 bits", "6 x 512"),
        ("imagenet-dat-lsgd", "DAT-LSGD", "32 bits", "6 x 512"),
        ("imagenet-dat-pgd-16bit", "DAT-PGD", "16 bits", "6 x 512"),
        ("imagenet-dat-pgd-8bit", "DAT-PGD", "8 bits", "6 x 512"),
        ("imagenet-dat-pgd-8bit-2sided", "DAT-PGD", "8 bits 2-sided", "6 x 512"),
        ("imagenet-dat-pgd-paper-8bit-2sided", "DAT-PGD", "8 bits 2-sided", "6 x 512"),
        ("imagenet-dat-pgd-4bit-2sided", "DAT-PGD", "4 bits 2-sided", "6 x 512"),
        ("imagenet-dat-pgd-hpc", "DAT-PGD", "32 bits, HPC", "6 x 512"),
        ("imagenet-dat-fgsm-16bit", "DAT-FGSM", "16 bits", "6 x 512"),
        ("imagenet-dat-fgsm-8bit", "DAT-FGSM", "8 bits", "6 x 512"),
        ("imagenet-dat-fgsm-8bit-2sided", "DAT-FGSM", "8 bits 2-sided", "6 x 512"),
        ("imagenet-dat-fgsm-hpc", "DAT-FGSM", "32 bits, HPC", "6 x 512"),
        ("cifar10-semi-dat-pgd", "Semi-supervised DAT-PGD", "32 bits", "12 x 2048"),
        ("cifar10-semi-wrn-dat-fgsm", "Semi-supervised DAT-FGSM", "32 bits", "12 x 128"),
        ("cifar10-smooth-dat-012", "Smooth-DAT", "32 bits", "4 x 32"),
        ("cifar10-smooth-at-025", "Smooth-AT", "32 bits", "1 x 128"),
        ("cifar10-finetune-dat-pgd", "DAT-PGD, fine-tuned", "32 bits", "6 x 64"),
        ("cifar100-finetune-dat-pgd", "DAT-PGD, fine-tuned", "32 bits", "6 x 64"),
    ],
)
def test_every_row_of_the_papers_tables_has_a_recipe(name: str, method: str, communication: str, drawn: str) -> None:
    spec = job(name)
    assert (method_of(spec), communication_of(spec)) == (method, communication)
    assert f"{spec.workers} x {spec.data.batch_per_worker}" == drawn


def test_every_row_of_the_papers_table_of_bits_is_a_recipe_of_its_own() -> None:
    """Of `paper.TABLE_4`: the same job but for what is on the wire."""
    jobs = {
        name: job(name) for name in NAMES if re.fullmatch(r"imagenet-dat-(pgd|fgsm)(-\w+bit.*|-hpc|-paper.*|)", name)
    }
    rows = {(method_of(spec), communication_of(spec)) for spec in jobs.values()}
    assert {(row.method, row.setting) for row in TABLE_4} <= rows
    for spec in jobs.values():
        base = job("imagenet-dat-pgd" if spec.attack.name == "pgd" else "imagenet-dat-fgsm")
        assert base.codec.name == "none"
        assert spec.model_copy(update={"codec": base.codec, "exchange": base.exchange}) == base
    assert jobs["imagenet-dat-pgd-8bit-2sided"].codec == job("digits-dat-pgd").codec
    assert jobs["imagenet-dat-pgd-paper-8bit-2sided"].codec.name == "paper"


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith("digits")])
def test_the_best_epoch_of_the_papers_jobs_is_told_on_images_that_are_held_out(name: str) -> None:
    spec = job(name)
    assert (spec.data.validation > 0, spec.evaluation.every_epochs > 0) == (True, True)
    assert spec.evaluation.patience is None


@pytest.mark.parametrize(("name", "batch"), [("semi", 12 * 2048), ("semi-wrn", 12 * 128)])
@pytest.mark.parametrize("method", ["dat-pgd", "dat-fgsm"])
def test_semi_supervised_jobs_make_as_many_updates_as_passes_over_all_images_would(
    name: str, method: str, batch: int
) -> None:
    spec = job(f"cifar10-{name}-{method}")
    plan = BatchPlan(
        samples_by_worker=(50_000 - int(spec.data.validation),) * spec.workers,
        split=spec.data.split,
        batch_per_worker=spec.data.batch_per_worker,
        workers=spec.workers,
        seed=0,
        unlabeled=500_000,
        unlabeled_per_batch=spec.data.unlabeled_per_batch,
    )
    assert spec.schedule.epochs * plan.rounds_per_epoch == pytest.approx(100 * 550_000 / batch, rel=0.02)
    assert (spec.schedule.warmup, spec.schedule.decay_at) == (0.05, (20 / 30, 25 / 30, 28 / 30))


def test_semi_supervised_trades_differs_in_objective_and_attack_loss_only() -> None:
    trades, base = job("cifar10-semi-trades-dat-pgd"), job("cifar10-semi-dat-pgd")
    assert (trades.objective.name, trades.objective.beta, trades.attack.loss) == ("trades", 6.0, "kl")
    assert {key for key, _, _ in differences(trades, base)} == {"objective.name", "attack.loss"}
    assert trades.data.unlabeled_fraction == 0.5


def test_baselines_of_one_worker_with_sgd_do_not_warm_up() -> None:
    alone = [job(name) for name in NAMES if job(name).workers == 1]
    assert len(alone) == 6
    assert [spec.schedule.warmup for spec in alone] == [0] * 6


def test_the_cifar_recipes_are_the_papers() -> None:
    pgd, fgsm = job("cifar10-dat-pgd"), job("cifar10-dat-fgsm")

    assert (pgd.attack.epsilon, pgd.attack.steps, pgd.attack.step_size) == (8 / 255, 10, 2 / 255)
    assert fgsm.attack.resolved_step_size == 10 / 255
    assert pgd.schedule == fgsm.schedule
    assert (pgd.schedule.epochs, pgd.model.name, pgd.evaluation_attack.steps) == (100, "preact_resnet18", 20)


def merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    both = dict(base)
    for key, value in over.items():
        both[key] = merged(base[key], value) if isinstance(value, dict) and isinstance(base.get(key), dict) else value
    return both


def without(job: dict[str, Any], keys: list[str]) -> dict[str, Any]:
    """A copy; each dotted key must have been there."""
    copy = {name: dict(value) if isinstance(value, dict) else value for name, value in job.items()}
    for key in keys:
        section, last = key.split(".")
        del copy[section][last]
    return copy


def test_a_recipe_that_extends_another_has_its_keys_and_the_comments_of_both() -> None:
    base = (
        "# base: small\n# extends: root\n#\n# Table 1.\nseed: 0\nmodel:\n  name: resnet8   # small\n"
        "codec:\n  bits: 8   # table 4\n  scale: l2\nevaluation:\n  attack:\n    steps: 5\n"
    )
    text = (
        "# ours\n# extends: base\n# without: codec.scale\n#\n# Table 4.\n"
        "codec:\n  bits: 4   # less\n  block: 64\nworkers: 2\nevaluation:\n  every_epochs: 1\n"
    )
    whole = recipes.extended(base, text)
    assert whole == (
        "# ours\n# extends: base\n# without: codec.scale\n#\n# Table 4.\n"
        "#\n# What it extends (base) says:\n# Table 1.\n"
        "seed: 0\nmodel:\n  name: resnet8   # small\ncodec:\n  bits: 4   # less\n  block: 64\n"
        "evaluation:\n  attack:\n    steps: 5\n  every_epochs: 1\nworkers: 2\n"
    )
    assert yaml.safe_load(whole) == merged(without(yaml.safe_load(base), ["codec.scale"]), yaml.safe_load(text))


def test_every_recipe_that_extends_another_means_what_yaml_says() -> None:
    for path in sorted(recipes.FOLDER.glob("*.yaml")):
        text = path.read_text()
        _, second, third, *_ = text.splitlines()
        left_out = third.removeprefix("# without: ").split(", ") if third.startswith("# without: ") else []
        if second.startswith("# extends: "):
            base = yaml.safe_load(recipes.recipe(second.removeprefix("# extends: ")).text)
            meant = merged(without(base, left_out), yaml.safe_load(text))
            assert yaml.safe_load(recipes.recipe(path.stem).text) == meant, path.name
        else:
            assert not left_out
            assert recipes.recipe(path.stem).text == text


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_says_whose_its_numbers_are_and_names_no_key_that_nobody_reads(name: str) -> None:
    text, spec = recipes.recipe(name).text, job(name)
    assert "Numbers are ours unless a source is named" in text
    shown = {
        f"{section}.{key}" for section, keys in yaml.safe_load(text).items() if isinstance(keys, dict) for key in keys
    }
    unread = {
        *(["attack.steps"] if spec.attack.name == "fgsm" else []),
        *(["optimizer.momentum", "optimizer.base_batch"] if spec.optimizer.name == "lamb" else []),
        *(
            [f"optimizer.{key}" for key in ("beta1", "beta2", "trust_low", "trust_high")]
            if spec.optimizer.name == "sgd"
            else []
        ),
        *(["schedule.decay_at", "schedule.decay_factor"] if spec.schedule.name != "piecewise" else []),
    }
    assert not shown & unread
