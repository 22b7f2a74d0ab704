"""The codec table: its bytes, its errors against closed forms, and that people see whole numbers."""

from __future__ import annotations

import io
import json
import re

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from bench import codecs
from bench.codec_errors import HEAVY, Errors, Vectors, errors_of, estimate, gradients
from bench.codec_speed import SpeedPlan, speeds_of
from bench.codecs import VARIANTS, bars_of, bytes_of, print_codecs
from common.codecs import Float32
from common.config import CodecName, CodecSpec, DatasetName, DataSpec, ModelName
from deploy.cli import app
from worker.datasets import load_dataset

ELEMENTS = 5000
SMALL = 1 << 13
EXACT_BYTES = {
    "none": (4, 4),
    "bf16": (2, 2),
    "randomized 8": (1 + 4 * 10 / ELEMENTS, 1 + 4 * 10 / ELEMENTS),
    "paper 8": ((4 + ELEMENTS / 8 + ELEMENTS) / ELEMENTS,) * 2,
    # 9 blocks of 512, then 256 and 128 elements of the rest of 392, and 8 as they are
    "rotated 2": ((4 * 11 + (ELEMENTS - 8) / 4 + 4 * 8) / ELEMENTS,) * 2,
    # sums of 6 times 7 take 7 bits; the scales travel both ways
    "shared 4": (0.5 + 4 * 10 / ELEMENTS, 7 / 8 + 4 * 10 / ELEMENTS),
    "sign": (1 / 8 + 4 * 10 / ELEMENTS, 4),
    # 16 of 512, 13 of the last 392: float32, and places of 9 bits, each block's to whole bytes
    "topk 1/32": ((4 * (9 * 16 + 13) + 9 * 18 + 15) / ELEMENTS, 4),
}


def uniform(d: int) -> Float32:
    return np.random.default_rng(0).uniform(-1, 1, d).astype(np.float32)


def small_vectors(workers: int, data: object) -> Vectors:
    assert data is None
    rng = np.random.default_rng(1)
    sets = {"normal": rng.standard_normal((workers, SMALL)), HEAVY: rng.standard_t(3, (workers, SMALL))}
    return Vectors(by_name={name: values.astype(np.float32) for name, values in sets.items()})


def synthetic(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> str:
    """Standard output of the command with synthetic vectors only."""
    monkeypatch.setattr(codecs, "vectors", small_vectors)
    only = [part for name in EXACT_BYTES for part in ("--only", name)]
    command = ["bench", "codec", "--elements", str(ELEMENTS), "--repeats", "1", *only, *arguments]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.stderr
    return done.stdout


def test_command_gives_exact_bytes_and_all_numbers_as_json(monkeypatch: pytest.MonkeyPatch) -> None:
    result = json.loads(synthetic(monkeypatch, "--json"))
    assert (result["kind"], result["elements"], result["vectors"]) == ("codec", ELEMENTS, ["normal", HEAVY])
    assert [row["name"] for row in result["rows"]] == list(EXACT_BYTES)
    for row in result["rows"]:
        found = row["pushed_bytes_per_element"], row["pulled_bytes_per_element"]
        assert found == pytest.approx(EXACT_BYTES[row["name"]], rel=1e-12), row["name"]
        assert min(row["encode_ns"], row["decode_ns"]) > 0
        assert row["encode_over_copy"] == row["encode_ns"] / result["copy_ns"]
    assert {(bar["name"], bar["what"]) for bar in result["bars"]} == {
        ("randomized 8", "encode_over_copy"),
        ("randomized 8", "decode_over_copy"),
    }


def test_command_prints_a_table_in_which_nothing_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = synthetic(monkeypatch)
    assert "…" not in text
    lines = text.splitlines()
    assert max(map(len, lines)) <= 100
    (row, mean) = (line.split() for line in lines if line.startswith(" rotated 2"))
    assert row[2:4] == ["0.265", "0.265"]
    assert len(row) == 2 + 2 + 2 + 4
    assert len(mean) == 2 + 2 + 2


def test_widest_numbers_of_all_codecs_and_vectors_fit_into_the_tables() -> None:
    names = ("normal", HEAVY, "small_cnn", "resnet8", "resnet20")
    row = {
        "pushed_bytes_per_element": 4.0,
        "pulled_bytes_per_element": 4.0,
        "nmse": {name: {"one": 1.234e-05, "mean": 1.234e-06} for name in names},
        "squared_bias": -1.234e-05,
        "bias_standard_errors": -11.3,
        **{f"{what}_{unit}": 123.456 for what in ("encode", "decode") for unit in ("ns", "over_copy")},
    }
    result = {"vectors": names, "rows": [{"name": name, **row} for name in VARIANTS], "bars": []}
    result |= {"workers": 250, "biased_on": HEAVY, "copy_ns": 10.0, "repeats": 1000}
    for width in (40, 80, 120):
        said = io.StringIO()
        print_codecs(result, Console(file=said, width=width))
        text = said.getvalue()
        assert max(map(len, text.splitlines())) <= max(width, 100)
        assert text.count("1.2e-05") == len(VARIANTS) * (len(names) + 1)
        assert text.count("123.46") == len(VARIANTS) * 4
        assert all(len(re.findall(rf"^ {name} ", text, re.MULTILINE)) == 2 for name in VARIANTS)


def test_an_unknown_row_is_refused_with_all_names() -> None:
    done = CliRunner().invoke(app, ["bench", "codec", "--only", "rotated 5"])
    assert done.exit_code == 2
    assert "expected one of none, bf16" in " ".join(done.stderr.split())


def test_bytes_of_sums_follow_the_number_of_workers() -> None:
    spec = CodecSpec(name="shared", bits=8)
    pulled = [bytes_of(spec, 512, workers)["pulled_bytes_per_element"] for workers in (1, 2, 258)]
    assert pulled == [1 + 4 / 512, 2 + 4 / 512, 2 + 4 / 512]


def test_bars_say_whether_they_hold() -> None:
    rows = [
        {"name": "randomized 8", "encode_over_copy": 2.5, "decode_over_copy": 1.01},
        {"name": "randomized 2", "encode_over_copy": 3.1, "decode_over_copy": 9.0},
    ]
    found = [(bar["name"], bar["what"], bar["holds"]) for bar in bars_of(rows)]
    assert found == [
        ("randomized 8", "encode_over_copy", True),
        ("randomized 2", "encode_over_copy", False),
        ("randomized 8", "decode_over_copy", False),
    ]


# Errors, against closed forms


def errors(spec: CodecSpec, values: Float32) -> Errors:
    return errors_of(spec, Vectors(by_name={"uniform": values}, biased_on="uniform"))


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_error_of_the_quantizer_on_uniform_values_is_that_of_its_levels(bits: int) -> None:
    """Variance step^2 f (1 - f), f uniform: step^2 / 6, over E x^2 = 1/3; the scale of 512 elements is nearly 1."""
    values = np.tile(uniform(SMALL), (4, 1))
    levels = 2 ** (bits - 1) - 1
    for name in (CodecName.RANDOMIZED, CodecName.SHARED):
        found = errors(CodecSpec(name=name, bits=bits), values)
        assert found.nmse["uniform"]["one"] == pytest.approx(0.5 / levels**2, rel=0.03)
        assert found.nmse["uniform"]["mean"] == pytest.approx(0.5 / levels**2 / 4, rel=0.06)
        assert abs(found.bias_standard_errors) < 4
        assert abs(found.squared_bias) < 0.01 * found.nmse["uniform"]["one"]


def test_error_of_bf16_on_uniform_values_is_that_of_8_bits_of_significand() -> None:
    """Values in [2^-k-1, 2^-k) have the step 2^(-k-8), error step^2 / 12: sum over k of 2^(-k-1) 2^(-2k-16) / 12."""
    found = errors(CodecSpec(name="bf16"), np.stack([uniform(1 << 15), uniform(1 << 15)]))
    expected = sum(2.0 ** (-k - 1) * 2.0 ** (-2 * k - 16) / 12 for k in range(20)) / (1 / 3)
    assert found.nmse["uniform"]["one"] == pytest.approx(expected, rel=0.02)
    assert found.nmse["uniform"]["mean"] == pytest.approx(expected, rel=0.02)  # the same rounding at every worker
    assert found.bias_standard_errors > 5


def test_errors_of_sign_and_topk_on_uniform_values_are_what_they_leave_out() -> None:
    """1 - (E|x|)^2 / E x^2 = 1/4; and all but the 16 largest of 512: (1 - 16/512)^3 of the square."""
    values = uniform(1 << 15)[None]
    assert errors(CodecSpec(name="sign"), values).nmse["uniform"]["one"] == pytest.approx(0.25, rel=0.02)
    topk = errors(CodecSpec(name="topk"), values)
    assert topk.nmse["uniform"]["one"] == pytest.approx((31 / 32) ** 3, rel=0.01)
    assert topk.squared_bias == pytest.approx(topk.nmse["uniform"]["one"])


def test_codec_none_has_no_error_and_no_bias() -> None:
    found = errors(CodecSpec(name="none"), np.tile(uniform(SMALL), (2, 1)))
    assert (found.squared_bias, found.bias_standard_errors) == (0, 0)
    assert found.nmse["uniform"] == pytest.approx({"one": 0, "mean": 0}, abs=1e-12)


def test_mean_of_a_shared_codec_is_what_workers_and_server_make_of_it() -> None:
    values = np.stack([uniform(SMALL), -2 * uniform(SMALL), 3 * uniform(SMALL)])
    together = estimate(CodecSpec(name="shared", bits=8), list(values), 0)
    assert np.abs(together - values.mean(axis=0)).max() <= 3 / 127  # one level of the widest worker


def test_gradients_are_those_of_different_batches_and_the_same_each_time() -> None:
    digits = load_dataset(DataSpec(name=DatasetName.DIGITS), root=None)
    first, second = (gradients(ModelName.SMALL_CNN, digits, 2, steps=1) for _ in range(2))
    assert first.dtype == np.float32
    assert np.array_equal(first, second)
    assert not np.array_equal(first[0], first[1])
    assert np.isfinite(first).all()


def test_speeds_are_of_all_codecs_beside_a_copy() -> None:
    variants = {name: VARIANTS[name] for name in ("paper 8", "topk 1/32", "shared 3")}
    speeds = speeds_of(variants, SpeedPlan(elements=3000, bucket=1024, repeats=2), lambda _: None)
    for name in variants:
        row = speeds.row(name)
        assert min(row["encode_ns"], row["decode_ns"]) > 0
        assert row["decode_over_copy"] == row["decode_ns"] / speeds.copy_ns
