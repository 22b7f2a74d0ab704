"""The job spec: one source of keys, four places to set them, refusals in one form, frozen, with a digest."""

from __future__ import annotations

import json
import math
import re

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from common.config import MAXIMAL_BLOCK, AttackSpec, BatchNormMode, JobSpec
from common.errors import EXIT_USAGE, SpecError, refusal
from common.spec_sources import environment_name, job_spec_from_json, load_job_spec, spec_keys

CHANGED: dict[str, object] = {
    "job_id": "night-run.2",
    "seed": (1 << 63) - 1,
    "workers": 7,
    "servers": 3,
    "model.name": "resnet20",
    "model.width": 24,
    "model.input_size": 64,
    "model.shortcut": "input",
    "data.name": "cifar100",
    "data.split": "own",
    "data.image_size": 224,
    "data.classes": ["apple", "7"],
    "data.mean": [0.5],
    "data.std": [0.25],
    "data.labeled": 40,
    "data.labeled_seed": 3,
    "data.unlabeled_fraction": 0.25,
    "data.unlabeled_digest": "0f" * 16,
    "data.augment": True,
    "data.batch_per_worker": 17,
    "data.validation": 0.1,
    "transfer.init": True,
    "transfer.sha256": "0f" * 32,
    "transfer.head": "new",
    "transfer.freeze": ["layer1.*", "conv1.weight"],
    "attack.name": "fgsm",
    "attack.norm": "l2",
    "attack.loss": "kl",
    "attack.epsilon": 4 / 255,
    "attack.steps": 7,
    "attack.step_size": 1 / 255,
    "attack.random_start": False,
    "attack.batch_norm": "train",
    "attack.warmup": 0.2,
    "attack.replays": 4,
    "smoothing.noise_std": 0.25,
    "smoothing.samples": 20,
    "overfitting.check_every_epochs": 2,
    "overfitting.steps": 20,
    "overfitting.least_ratio": 0.3,
    "overfitting.stop": True,
    "objective.name": "trades",
    "objective.clean_weight": 1.0,
    "objective.beta": 3.0,
    "optimizer.name": "sgd",
    "optimizer.learning_rate": 0.3,
    "optimizer.base_batch": 128,
    "optimizer.beta1": 0.8,
    "optimizer.beta2": 0.99,
    "optimizer.stability_eps": 1e-6,
    "optimizer.bias_correction": False,
    "optimizer.trust_low": 0.5,
    "optimizer.trust_high": 5.0,
    "optimizer.trust_coefficient": 0.02,
    "optimizer.momentum": 0.5,
    "optimizer.nesterov": True,
    "optimizer.weight_decay": 5e-4,
    "optimizer.decay_one_dimensional": False,
    "optimizer.adapt_one_dimensional": False,
    "optimizer.clip_norm": 2.5,
    "optimizer.ema_decay": 0.99,
    "schedule.name": "cosine",
    "schedule.epochs": 90,
    "schedule.warmup": 0.1,
    "schedule.decay_at": [0.25, 0.5, 0.75],
    "schedule.decay_factor": 0.2,
    "schedule.peak_at": 0.4,
    "compute.precision": "bfloat16",
    "compute.channels_last": True,
    "compute.compile": True,
    "codec.name": "paper",
    "codec.bits": 16,
    "codec.block": "layer",
    "codec.scale": "l2",
    "codec.density": 0.1,
    "codec.two_sided": True,
    "exchange.topology": "colocated",
    "exchange.bucket_bytes": 4096,
    "exchange.window_bytes": 8192,
    "exchange.read_ahead_bytes": 65536,
    "exchange.receive_buffer_bytes": 49152,
    "evaluation.every_epochs": 2,
    "evaluation.patience": 3,
    "evaluation.attack.epsilon": 2 / 255,
    "evaluation.attack.steps": 50,
    "evaluation.attack.step_size": 0.01,
    "evaluation.attack.random_start": False,
    "evaluation.batch": 100,
    "checkpoint.every_epochs": 1,
    "checkpoint.keep": 5,
    "deadlines.join_s": 2.5,
    "deadlines.round_s": 3.5,
    "deadlines.hello_s": 4.5,
    "deadlines.report_s": 5.5,
    "deadlines.keepalive_s": 6.5,
}
"""A valid value that is not the default, for every key there is."""
BESIDE = {
    "attack.replays": {"attack.name": "fgsm"},
    "smoothing.samples": {"smoothing.noise_std": 0.5},
    "evaluation.patience": {"data.validation": 0.2},
    "data.unlabeled_digest": {"data.unlabeled_fraction": 0.5},
    **{f"transfer.{name}": {"transfer.init": True} for name in ("sha256", "head", "freeze")},
}
"""What else a key needs, where its value is refused alone."""
APART = ("servers", "attack.replays", "data.unlabeled_digest")
"""Workers that hold the shards leave one server, the default; those with data of their own share no file."""
TOGETHER = {key: value for key, value in CHANGED.items() if key not in APART}
"""All of them that go together."""

FORM = re.compile(r"expected .+, got \S+=.* \(.+\)")
FLOATS = [key for key, value in CHANGED.items() if isinstance(value, float)]
BOUND = ("optimizer.trust_low", "data.unlabeled_fraction")
"""Floats that not every value goes with: of another key, or of the batch."""


def flag(key: str, value: object) -> str:
    return f"{key}={json.dumps(value)}"


def variable(key: str, value: object) -> dict[str, str]:
    return {environment_name(key): json.dumps(value)}


def document(key: str, value: object) -> str:
    *sections, name = key.split(".")
    nested: dict[str, object] = {name: value}
    for section in reversed(sections):
        nested = {section: nested}
    return yaml.safe_dump(nested)


def beside(key: str) -> list[str]:
    return [flag(name, value) for name, value in BESIDE.get(key, {}).items()]


def value_of(spec: JobSpec, key: str) -> object:
    value: object = spec.model_dump(mode="json")
    for part in key.split("."):
        assert isinstance(value, dict)
        value = value[part]
    return value


def values_of(specs: dict[str, JobSpec]) -> dict[str, object]:
    """Of each key, in a spec of its own."""
    return {key: value_of(spec, key) for key, spec in specs.items()}


DEFAULTS = values_of(dict.fromkeys(CHANGED, JobSpec()))


def refusal_of(*settings_: str, yaml_text: str | None = None, environment: dict[str, str] | None = None) -> str:
    with pytest.raises(SpecError) as caught:
        load_job_spec(settings=settings_, yaml_text=yaml_text, yaml_name="job.yaml", environment=environment)
    assert caught.value.exit_code == EXIT_USAGE
    return str(caught.value)


def outcome_of(setting: str) -> JobSpec | str:
    try:
        return load_job_spec(settings=[setting])
    except SpecError as error:
        return str(error)


def is_refusal(outcome: JobSpec | str) -> bool:
    return isinstance(outcome, str) and FORM.fullmatch(outcome) is not None


# Keys


def test_this_file_changes_every_key_that_there_is() -> None:
    assert set(CHANGED) == {key for key, _, _ in spec_keys()}


def test_every_key_has_a_help_text_that_is_a_sentence() -> None:
    for key, text, _ in spec_keys():
        assert len(text) > 8, key
        assert text.endswith("."), key


def test_keys_come_with_their_defaults() -> None:
    defaults = {key: default for key, _, default in spec_keys()}
    assert defaults["codec.bits"] == 8
    assert defaults["evaluation.attack.steps"] == 20
    assert defaults["model.width"] is None


def test_digest_changes_with_every_key() -> None:
    changed = {key: load_job_spec(settings=[*beside(key), flag(key, value)]) for key, value in CHANGED.items()}
    unchanged = {key: load_job_spec(settings=beside(key)).digest() for key in CHANGED}
    assert values_of(changed) == CHANGED
    assert [key for key, value in DEFAULTS.items() if value == CHANGED[key]] == []
    assert [key for key, spec in changed.items() if spec.digest() == unchanged[key]] == []


def test_equal_values_from_different_places_give_the_equal_digest() -> None:
    from_flags = load_job_spec(settings=[flag(key, value) for key, value in reversed(TOGETHER.items())])
    environment = {name: text for key, value in TOGETHER.items() for name, text in variable(key, value).items()}
    from_environment = load_job_spec(environment=environment)
    from_yaml = load_job_spec(yaml_text=from_flags.to_yaml())
    assert from_flags.digest() == from_environment.digest() == from_yaml.digest() != JobSpec().digest()


# Precedence


def test_flag_beats_environment_beats_yaml_beats_default_whatever_the_key() -> None:
    both = {key: (DEFAULTS[key], changed) for key, changed in CHANGED.items()}
    assert values_of(dict.fromkeys(CHANGED, load_job_spec())) == DEFAULTS
    in_yaml = {
        key: load_job_spec(yaml_text=document(key, changed), settings=beside(key)) for key, changed in CHANGED.items()
    }
    assert values_of(in_yaml) == CHANGED
    over_yaml = {
        key: load_job_spec(yaml_text=document(key, changed), environment=variable(key, default), settings=beside(key))
        for key, (default, changed) in both.items()
    }
    assert values_of(over_yaml) == DEFAULTS
    over_environment = {
        key: load_job_spec(
            yaml_text=document(key, default),
            environment=variable(key, changed),
            settings=[*beside(key), flag(key, default)],
        )
        for key, (default, changed) in both.items()
    }
    assert values_of(over_environment) == DEFAULTS


def test_four_places_set_four_different_values() -> None:
    text, environment, flags = document("codec.bits", 7), variable("codec.bits", 6), ["codec.bits=5"]
    assert load_job_spec(yaml_text=text, environment=environment, settings=flags).codec.bits == 5
    assert load_job_spec(yaml_text=text, environment=environment).codec.bits == 6
    assert load_job_spec(yaml_text=text).codec.bits == 7
    assert load_job_spec().codec.bits == 8


def test_last_of_two_flags_of_one_key_counts() -> None:
    assert load_job_spec(settings=["seed=1", "seed=2"]).seed == 2


def test_places_that_set_different_keys_are_merged() -> None:
    spec = load_job_spec(yaml_text="codec: {bits: 4}", environment={"DATPS_CODEC__BLOCK": "64"}, settings=["seed=3"])
    assert (spec.codec.bits, spec.codec.block, spec.seed) == (4, 64, 3)


def test_foreign_and_reserved_variables_are_passed_over() -> None:
    environment = {"HOME": "/root", "datps_seed": "4", "DATPS_ADDRESS": "10.0.0.1:50051", "DATPS_SEED": "3"}
    assert load_job_spec(environment=environment, reserved=frozenset({"DATPS_ADDRESS"})) == JobSpec(seed=3)


def test_empty_document_and_empty_section_change_nothing() -> None:
    assert load_job_spec(yaml_text="") == JobSpec()
    assert load_job_spec(yaml_text="codec: {}") == JobSpec()
    assert load_job_spec(yaml_text="codec:\n  # bits: 4\n") == JobSpec()


# Unknown names


def test_unknown_flag_is_refused_with_the_nearest_key() -> None:
    assert refusal_of("codec.bit=4") == "expected a known key; did you mean codec.bits?, got key=codec.bit (--set)"


def test_unknown_variable_is_refused_with_the_nearest_variable() -> None:
    expected = "expected a known variable; did you mean DATPS_CODEC__BITS?, got variable=DATPS_CODEC_BITS (environment)"
    assert refusal_of(environment={"DATPS_CODEC_BITS": "4"}) == expected


def test_unknown_yaml_key_is_refused_with_the_nearest_key() -> None:
    expected = "expected a known key; did you mean evaluation.attack.steps?, got key=evaluation.attack.step (job.yaml)"
    assert refusal_of(yaml_text="evaluation: {attack: {step: 4}}") == expected


def test_section_that_is_given_a_value_is_refused() -> None:
    assert "got key=codec (job.yaml)" in refusal_of(yaml_text="codec: 4")


def test_unknown_key_in_json_is_refused_with_the_nearest_key() -> None:
    with pytest.raises(SpecError) as caught:
        job_spec_from_json('{"optimizer": {"learningrate": 1}}')
    rule = "a known key; did you mean optimizer.learning_rate?"
    assert str(caught.value) == refusal(rule, "key", "optimizer.learningrate", "job spec as JSON")


# Values


def test_every_float_may_be_written_as_a_fraction() -> None:
    keys = [key for key in FLOATS if key not in ("optimizer.trust_low", "optimizer.trust_high")]
    in_flags = {key: load_job_spec(settings=[f"{key}=8/255"]) for key in keys}
    in_yaml = {key: load_job_spec(yaml_text=document(key, "8 / 255")) for key in keys}
    assert values_of(in_flags) == values_of(in_yaml) == dict.fromkeys(keys, 8 / 255)


def test_digits_are_names_of_classes_and_one_pattern_is_a_list() -> None:
    spec = load_job_spec(settings=["data.classes=[5, 6]", "transfer.freeze=all-but-head", "transfer.init=true"])
    assert (spec.data.classes, spec.transfer.freeze) == (("5", "6"), ("all-but-head",))


@pytest.mark.parametrize(
    ("batch", "fraction", "unlabeled"),
    [(64, "0.5", 32), (5, "0.5", 3), (10, "0.25", 3), (10, "0.24", 2), (3, "1/3", 1), (2, "0.3", 1), (64, "0", 0)],
)
def test_a_batch_has_the_fraction_of_unlabeled_images_with_halves_rounded_up(
    batch: int, fraction: str, unlabeled: int
) -> None:
    spec = load_job_spec(settings=[f"data.batch_per_worker={batch}", f"data.unlabeled_fraction={fraction}"])
    assert spec.data.unlabeled_per_batch == unlabeled


def test_fractions_may_stand_in_lists() -> None:
    spec = load_job_spec(settings=["schedule.decay_at=[2/3, 9/10]"])
    assert spec.schedule.decay_at == (2 / 3, 9 / 10)


def test_floats_that_are_no_finite_number_are_refused() -> None:
    wrong = [f"{key}={text}" for key in FLOATS for text in ("nan", ".nan", "inf", "-.inf", "1/0")]
    assert [setting for setting in wrong if not is_refusal(outcome_of(setting))] == []


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8, 16])
def test_supported_bits_are_taken(bits: int) -> None:
    assert load_job_spec(settings=[f"codec.bits={bits}"]).codec.bits == bits


@pytest.mark.parametrize("bits", [-8, 0, 1, 9, 15, 17, 32])
def test_other_bits_are_refused(bits: int) -> None:
    assert refusal_of(f"codec.bits={bits}") == f"expected 2 to 8, or 16, got bits={bits} (codec.bits, --set)"


@pytest.mark.parametrize("block", [8, 512, MAXIMAL_BLOCK, "layer", "all"])
def test_supported_blocks_are_taken(block: int | str) -> None:
    assert load_job_spec(settings=[f"codec.block={block}"]).codec.block == block


@pytest.mark.parametrize("block", [0, 4, 12, -8, MAXIMAL_BLOCK + 8, "vector", "true", "8.0"])
def test_other_blocks_are_refused(block: object) -> None:
    rule = f"a multiple of 8 from 8 to {MAXIMAL_BLOCK}, layer or all"
    message = refusal_of(f"codec.block={block}")
    assert message.startswith(f"expected {rule}, got block=")
    assert message.endswith(" (codec.block, --set)")


def test_switch_is_no_number() -> None:
    """YAML reads `yes` and `on` as true; `workers: on` must not mean one worker."""
    wrong = [f"{key}=yes" for key, value in CHANGED.items() if not isinstance(value, (bool, list, str))]
    assert [setting for setting in wrong if not is_refusal(outcome_of(setting))] == []


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("workers=0", "expected greater than or equal to 1, got workers=0 (--set)"),
        ("workers=many", "expected integer, got workers=many (--set)"),
        ("workers=2.5", "expected integer, got workers=2.5 (--set)"),
        ("seed=-1", "expected greater than or equal to 0, got seed=-1 (--set)"),
        (f"seed={1 << 63}", f"expected less than {1 << 63}, got seed={1 << 63} (--set)"),
        ("attack.epsilon=2", "expected at most 1, in pixel units (norm linf), got epsilon=2.0 (attack.epsilon, --set)"),
        ("attack.epsilon=eight", "expected number, got attack.epsilon=eight (--set)"),
        ("codec.two_sided=maybe", "expected boolean, got codec.two_sided=maybe (--set)"),
        ("model.name=vgg", None),
        ("job_id=-x", "expected match pattern '^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$', got job_id=-x (--set)"),
        (
            "exchange.bucket_bytes=1023",
            "expected greater than or equal to 1024, got exchange.bucket_bytes=1023 (--set)",
        ),
        ("schedule.decay_at=[a]", "expected number, got schedule.decay_at.0=a (--set)"),
        ("schedule.decay_at=[0.9, 0.5]", None),
        ("schedule.decay_at=[0.5, 0.5]", None),
        ("schedule.decay_at=[0, 0.5]", None),
        ("optimizer.trust_low=11", "expected trust_low <= trust_high=10.0, got trust_low=11.0 (optimizer, job spec)"),
        (
            "data.validation=1.5",
            "expected a fraction below 1, or a whole number, got validation=1.5 (data.validation, --set)",
        ),
        ("data.validation=-1", "expected greater than or equal to 0, got data.validation=-1 (--set)"),
        ("evaluation.patience=0", "expected greater than or equal to 1, got evaluation.patience=0 (--set)"),
        ("evaluation.patience=2", None),
        ("optimizer.base_batch=0", "expected greater than or equal to 1, got optimizer.base_batch=0 (--set)"),
        ("optimizer.clip_norm=0", "expected greater than 0, got optimizer.clip_norm=0 (--set)"),
        ("optimizer.ema_decay=1", "expected less than 1, got optimizer.ema_decay=1 (--set)"),
        ("schedule.peak_at=1", "expected less than 1, got schedule.peak_at=1 (--set)"),
        ("schedule.name=linear", None),
        ("data.labeled=0", None),
        ("data.labeled=1.5", None),
        ("data.labeled=100.0", None),
        ("data.labeled=many", None),
        (
            "data.classes=[a, b, a]",
            "expected at least two names, each once, got classes=['a', 'b', 'a'] (data.classes, --set)",
        ),
        ("data.classes=[a]", None),
        ("data.classes=[true, false]", None),
        ("data.std=[0.5, 0]", "expected numbers above 0, one for each channel, got std=[0.5, 0.0] (data.std, --set)"),
        ("data.std=[]", None),
        ("data.unlabeled_fraction=1", "expected less than 1, got data.unlabeled_fraction=1 (--set)"),
        (
            "data.unlabeled_fraction=0.001",
            "expected at least one labeled and one unlabeled image in a batch of batch_per_worker=64, "
            "got unlabeled_fraction=0.001 (0 unlabeled images) (data, job spec)",
        ),
        ("data.unlabeled_fraction=0.995", None),
        (
            f"data.unlabeled_digest={'0f' * 16}",
            "expected unlabeled_fraction above 0 with unlabeled_digest, got unlabeled_fraction=0.0 (data, job spec)",
        ),
        (
            f"data.unlabeled_digest={'0F' * 16}",
            f"expected 32 digits of 0-9 and a-f, got unlabeled_digest={'0F' * 16} (data.unlabeled_digest, --set)",
        ),
        (
            "transfer.head=new",
            "expected transfer.init=true (or datps train --init FILE), got head=new (transfer, job spec)",
        ),
        ("transfer.freeze=all-but-head", None),
        ("transfer.sha256=abc", None),
        ("codec.bits", "expected dotted.key=value, got setting=codec.bits (--set)"),
        ("codec.bits=[", "expected a YAML value, got codec.bits=[ (--set)"),
        ("job_id=2024-13-45", "expected a YAML value, got job_id=2024-13-45 (--set)"),
    ],
)
def test_refusal_says_rule_value_and_place(setting: str, expected: str | None) -> None:
    message = refusal_of(setting)
    assert message == expected or (expected is None and FORM.fullmatch(message)), message


def test_workers_with_data_of_their_own_share_no_file_that_could_be_named() -> None:
    mixed = ("data.unlabeled_fraction=0.5", f"data.unlabeled_digest={'0f' * 16}")
    assert load_job_spec(settings=mixed).data.unlabeled_digest == "0f" * 16
    assert refusal_of(*mixed, "data.split=own") == (
        "expected split=shared with unlabeled_digest, got split=own "
        "(with `own` each worker has a file of its own) (data, job spec)"
    )


def test_refusal_of_a_variable_names_it() -> None:
    message = refusal_of(environment={"DATPS_ATTACK__STEPS": "none"})
    assert message == "expected integer, got attack.steps=none (environment DATPS_ATTACK__STEPS)"


def test_all_wrong_values_are_told_at_once() -> None:
    lines = refusal_of("workers=0", "codec.bits=1", yaml_text="seed: -1").splitlines()
    assert sorted(lines) == [
        "expected 2 to 8, or 16, got bits=1 (codec.bits, --set)",
        "expected greater than or equal to 0, got seed=-1 (job.yaml)",
        "expected greater than or equal to 1, got workers=0 (--set)",
    ]


@pytest.mark.parametrize(
    "text", ["[1]", "a: [", "codec: &c {x: *c}", "{? [1] : 2}", "seed: 2024-13-45", "seed: !!python/name:os.system"]
)
def test_documents_that_are_no_job_spec_are_refused(text: str) -> None:
    assert FORM.fullmatch(refusal_of(yaml_text=text))


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "4", '{"seed": -1}', '{"attack": {"epsilon": NaN}}', "[" * 9999]
)
def test_json_that_is_no_job_spec_is_refused(text: str) -> None:
    with pytest.raises(SpecError) as caught:
        job_spec_from_json(text)
    assert FORM.fullmatch(str(caught.value)), str(caught.value)


@given(st.text(max_size=30))
@settings(max_examples=60, deadline=None)
def test_any_text_as_a_flag_is_taken_or_refused_with_a_reason(text: str) -> None:
    for setting in (text, f"codec.block={text}", f"job_id={text}"):
        outcome = outcome_of(setting)
        assert isinstance(outcome, JobSpec) or outcome.startswith("expected ")


@pytest.mark.parametrize("beside_", ["data.validation=0", "evaluation.every_epochs=0"])
def test_early_stopping_without_evaluations_on_validation_data_is_refused(beside_: str) -> None:
    message = refusal_of("data.validation=0.1", "evaluation.patience=2", beside_)
    assert message.startswith("expected data.validation and evaluation.every_epochs above 0 (early stopping")
    assert "got evaluation.patience=2" in message


def test_nesterov_without_momentum_is_refused() -> None:
    message = refusal_of("optimizer.name=sgd", "optimizer.nesterov=true", "optimizer.momentum=0")
    assert message == "expected momentum > 0 (nesterov), got momentum=0.0 (optimizer, job spec)"


# Frozen, and out and in again


def test_job_spec_and_its_sections_are_frozen() -> None:
    spec = JobSpec()
    with pytest.raises(ValidationError, match="frozen"):
        spec.seed = 1  # type: ignore[misc]
    with pytest.raises(ValidationError, match="frozen"):
        spec.evaluation.attack.steps = 1  # type: ignore[misc]


@st.composite
def job_specs(draw: st.DrawFn) -> JobSpec:
    keys = draw(st.sets(st.sampled_from(sorted(TOGETHER))))
    finite = {key: draw(st.floats(1e-9, 0.999)) for key in draw(st.sets(st.sampled_from(FLOATS)))}
    finite = {key: value for key, value in finite.items() if key not in BOUND}
    needed = {name: value for key in keys for name, value in BESIDE.get(key, {}).items()}
    values = needed | {key: CHANGED[key] for key in keys} | finite
    return load_job_spec(settings=[flag(key, value) for key, value in values.items() if key != "optimizer.trust_high"])


@given(job_specs())
@settings(max_examples=40, deadline=None)
def test_yaml_and_json_give_the_equal_spec_and_digest_back(spec: JobSpec) -> None:
    for again in (load_job_spec(yaml_text=spec.to_yaml()), job_spec_from_json(spec.to_json())):
        assert again == spec
        assert again.digest() == spec.digest()


def test_json_is_canonical_and_holds_every_key() -> None:
    text = JobSpec().to_json()
    assert text == json.dumps(json.loads(text), sort_keys=True, separators=(",", ":"))
    assert job_spec_from_json('{"seed": 0}').to_json() == text
    assert all(math.isfinite(value) for value in [DEFAULTS[key] for key in FLOATS] if isinstance(value, float))


# Defaults that depend on other keys


def test_step_size_follows_from_the_attack_where_it_is_absent() -> None:
    pgd = AttackSpec.model_validate({"name": "pgd", "epsilon": 0.2, "steps": 10})
    fgsm = AttackSpec.model_validate({"name": "fgsm", "epsilon": 0.2})
    given_ = AttackSpec.model_validate({"name": "fgsm", "epsilon": 0.2, "step_size": 0.1})
    assert (pgd.resolved_step_size, fgsm.resolved_step_size, given_.resolved_step_size) == (0.05, 0.25, 0.1)
    assert (pgd.resolved_batch_norm, fgsm.resolved_batch_norm) == (BatchNormMode.EVAL, BatchNormMode.TRAIN)


def test_evaluation_attack_takes_its_epsilon_from_training_and_steps_an_eighth_of_it() -> None:
    attack = load_job_spec(settings=["attack.epsilon=0.2", "attack.name=fgsm", "attack.steps=3"]).evaluation_attack
    assert (attack.name, attack.epsilon, attack.steps, attack.step_size) == ("pgd", 0.2, 20, 0.025)
    own = load_job_spec(
        settings=["evaluation.attack.epsilon=0.1", "evaluation.attack.step_size=0.05"]
    ).evaluation_attack
    assert (own.epsilon, own.step_size) == (0.1, 0.05)
