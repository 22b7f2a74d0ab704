"""The attacks and sweeps that a user names: what they mean, and what is refused."""

from __future__ import annotations

import pytest

from common.config import AttackName, AttackNorm, BatchNormMode, JobSpec
from common.errors import SpecError
from common.spec_sources import load_job_spec
from tests.judging.support import request
from worker.judging.requests import Name, make_plan, parse_attack, parse_sweep


def test_steps_restarts_and_keys_are_read() -> None:
    read = request("pgd:50x10, epsilon=8/255, step_size=0.01, norm=l2, random_start=true")
    assert (read.name, read.steps, read.restarts) == (Name.PGD, 50, 10)
    assert (read.epsilon, read.step_size, read.norm) == (8 / 255, 0.01, AttackNorm.L2)
    assert read.label == "pgd:50x10,epsilon=8/255,step_size=0.01,norm=l2,random_start=true"
    assert read.stages == tuple(f"restart {n}" for n in range(1, 11))
    assert request("pgd,steps=50,restarts=10").label == "pgd:50x10"


def test_what_is_left_out_is_the_jobs_evaluation_attack() -> None:
    job = ("attack.epsilon=0.2", "evaluation.attack.steps=7", "evaluation.attack.random_start=false")
    read = request("pgd", *job)
    assert read.spec == load_job_spec(settings=job).evaluation_attack
    assert request("pgd:20").spec == JobSpec().evaluation_attack
    assert request("pgd,epsilon=0.4", *job).step_size == 0.05
    assert request("pgd,epsilon=0.4", *job, "evaluation.attack.step_size=0.01").step_size == 0.01
    assert request("pgd,norm=l2,epsilon=0.4", *job, "evaluation.attack.step_size=0.01").step_size == 0.05


def test_fgsm_is_one_step_of_epsilon_from_the_image_in_eval_mode() -> None:
    spec = request("fgsm,epsilon=0.1").spec
    assert (spec.name, spec.resolved_step_size, spec.random_start) == (AttackName.FGSM, 0.1, False)
    assert spec.resolved_batch_norm is BatchNormMode.EVAL
    fast = request("fgsm,epsilon=0.1,random_start=true,step_size=0.125,restarts=3")
    assert (fast.random_start, fast.step_size, fast.restarts) == (True, 0.125, 3)


def test_autoattack_has_a_radius_and_a_norm_only() -> None:
    read = request("autoattack,norm=l2,epsilon=0.5")
    assert read.parameters() == {"name": "autoattack", "version": "standard", "norm": "l2", "epsilon": 0.5}
    assert read.stages == ("apgd-ce", "apgd-t", "fab-t", "square")


def test_a_radius_of_zero_is_allowed() -> None:
    assert request("pgd:5,epsilon=0").epsilon == 0
    assert request("fgsm,epsilon=0").step_size == 1e-12


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("pdg:20", "expected pgd, fgsm or autoattack as NAME"),
        ("", "expected pgd, fgsm or autoattack as NAME"),
        ("pgd:", "steps, and restarts behind an x"),
        ("pgd:20x", "steps, and restarts behind an x"),
        ("pgd:0", "expected a whole number from 1 to 1000, got steps=0"),
        ("pgd:2000", "expected a whole number from 1 to 1000, got steps=2000"),
        ("pgd:99999999999999999999", "expected a whole number from 1 to 1000"),
        ("pgd:20x0", "expected a whole number from 1 to 1000, got restarts=0"),
        ("pgd:20,steps=5", "expected steps once"),
        ("pgd,epsilon", "'epsilon' is no KEY=VALUE"),
        ("pgd,epsilon=", "'epsilon=' is no KEY=VALUE"),
        ("pgd,epsilom=0.1", "got key=epsilom (did you mean epsilon?)"),
        ("pgd,epsilon=-1/255", "expected a number of at least 0, or a fraction as 8/255, got epsilon=-1/255"),
        ("pgd,epsilon=nan", "got epsilon=nan"),
        ("pgd,epsilon=1/0", "got epsilon=1/0"),
        ("pgd,epsilon=1/2/3", "got epsilon=1/2/3"),
        ("pgd,epsilon=1.5", "expected at most 1, in pixel units (norm linf), got epsilon=1.5"),
        ("pgd,step_size=0", "expected a number above 0, got step_size=0"),
        ("pgd,norm=l1,epsilon=3", "expected linf or l2, got norm=l1"),
        ("pgd,random_start=yes", "expected true or false, got random_start=yes"),
        ("pgd:20x2,random_start=false", "expected random_start=true with restarts"),
        ("fgsm:2", "(fgsm), got key=steps"),
        ("fgsm,restarts=2", "expected random_start=true with restarts"),
        ("autoattack:20", "expected one of epsilon, norm (autoattack), got key=steps"),
        ("autoattack,restarts=5", "expected one of epsilon, norm (autoattack), got key=restarts"),
        ("autoattack,norm=l2", "expected epsilon=l2 radius"),
        ("pgd:20,norm=l2", "expected epsilon=l2 radius"),
    ],
)
def test_anything_else_is_refused(text: str, expected: str) -> None:
    with pytest.raises(SpecError) as refused:
        request(text)
    assert expected in str(refused.value)


def test_the_same_attack_twice_is_refused() -> None:
    attacks = [parse_attack(text) for text in ("pgd:20", "fgsm", "pgd:20x1")]
    with pytest.raises(SpecError, match=r"expected attacks that differ, got attack=pgd:20x1 \(the same as pgd:20\)"):
        make_plan(attacks, [], JobSpec())


def test_a_plan_without_attacks_has_the_jobs() -> None:
    plan = make_plan([], [], load_job_spec(settings=["evaluation.attack.steps=5"]))
    assert [each.label for each in plan.attacks] == ["pgd:5"]
    assert plan.attacks[0].spec.steps == 5
    assert plan.requests == plan.attacks


def test_a_sweep_has_every_attack_with_every_value() -> None:
    sweeps = [parse_sweep("epsilon=0, 2/255,8/255"), parse_sweep("steps=1,20")]
    plan = make_plan([parse_attack("pgd:20")], sweeps, JobSpec())
    assert plan.attacks == ()
    assert [row[0].epsilon for row in plan.sweeps[0].rows] == [0, 2 / 255, 8 / 255]
    assert [row[0].label for row in plan.sweeps[0].rows][1] == "pgd:20,epsilon=2/255"
    assert [row[0].steps for row in plan.sweeps[1].rows] == [1, 20]
    assert {row[0].step_size for row in plan.sweeps[1].rows} == {1 / 255}
    assert plan.sweeps[1].attacks == ("pgd",)
    assert len(plan.requests) == 4, "20 steps with the job's epsilon of 8/255 are in both sweeps, and run once"


@pytest.mark.parametrize(
    ("attacks", "sweep", "expected"),
    [
        ([], "restarts=1,2", "expected epsilon=VALUE,... or steps=VALUE,..."),
        ([], "epsilon", "expected epsilon=VALUE,... or steps=VALUE,..."),
        ([], "epsilon=0,,1", "expected epsilon=VALUE,... or steps=VALUE,..."),
        ([], "epsilon=0.2,51/255", "expected each epsilon once"),
        ([], "steps=1,zwei", "expected a whole number from 1 to 1000, got steps=zwei"),
        ([], "epsilon=2", "expected at most 1, in pixel units (norm linf), got epsilon=2"),
        (["pgd", "fgsm"], "steps=1,2", "(fgsm), got key=steps"),
        (["autoattack"], "steps=1,2", "(autoattack), got key=steps"),
        (["pgd:5", "pgd:10"], "steps=1,2", "expected attacks that differ in more than steps"),
    ],
)
def test_a_sweep_that_means_nothing_is_refused(attacks: list[str], sweep: str, expected: str) -> None:
    with pytest.raises(SpecError) as refused:
        make_plan([parse_attack(text) for text in attacks], [parse_sweep(sweep)], JobSpec())
    assert expected in str(refused.value)


def test_requests_that_do_the_same_are_equal_whatever_they_are_called() -> None:
    assert request("pgd:20,epsilon=8/255") == request("pgd:20")
    assert request("pgd:20,epsilon=4/255") != request("pgd:20")
