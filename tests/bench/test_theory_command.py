"""`datps bench theory`: what it prints, draws and refuses."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from bench.theory import laboratory
from bench.theory.laboratory import parse_seeds
from common.errors import SpecError
from deploy.cli import app

ONE = ("--smoke", "--only", "workers", "--seeds", "0,1")


def bench(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["bench", "theory", *arguments])


def test_the_result_has_every_seed_its_bound_and_the_fit() -> None:
    done = bench(*ONE, "--json")
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    (sweep,) = result["sweeps"]
    assert (result["kind"], result["lamb"], result["seeds"], sweep["name"]) == ("theory", "theorem", [0, 1], "workers")
    assert [point["label"] for point in sweep["points"]] == ["M=2", "M=8"]
    for point in sweep["points"]:
        measured = [seed["measured"] for seed in point["seeds"]]
        assert point["mean"] == pytest.approx(sum(measured) / 2)
        assert (point["smallest"], point["largest"]) == (min(measured), max(measured))
        assert all(seed["bound"] == pytest.approx(sum(seed["terms"].values())) for seed in point["seeds"])
    two, eight = (point["mean"] for point in sweep["points"])
    assert sweep["fit"]["exponent"] == pytest.approx(np.log(eight / two) / np.log(4))
    assert sweep["bound_holds"] is True


def test_people_see_points_exponents_and_whether_the_bound_holds() -> None:
    done = bench(*ONE)
    assert done.exit_code == 0, done.output
    assert re.search(r"workers: M=8 +8 +0\.00\d+ \(", done.stdout)
    assert re.search(r"workers +M +-0\.5 +-0\.5 +[-+]\d\.\d\d ", done.stdout)
    assert "measured <= bound at every point with every seed: yes" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 100
    assert "2 of 2: workers, M=8: " in done.stderr


def test_a_bound_that_does_not_hold_would_be_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(laboratory.Measured, "bound", 1e-9)
    done = bench(*ONE)
    assert "measured <= bound at every point with every seed: NO" in done.stdout


def test_the_job_specs_lamb_is_measured_without_a_bound() -> None:
    done = bench(*ONE, "--lamb", "defaults")
    assert done.exit_code == 0, done.output
    assert "Theorem 2 does not speak of this LAMB" in done.stdout
    assert "every seed: yes" not in done.stdout


def test_every_sweep_runs_in_its_short_form_and_all_bounds_hold() -> None:
    done = bench("--smoke", "--seeds", "0", "--json")
    assert done.exit_code == 0, done.output
    sweeps = json.loads(done.stdout)["sweeps"]
    assert len(sweeps) == 9
    assert all(sweep["bound_holds"] for sweep in sweeps)


def test_a_figure_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "theory.png"
    done = bench(*ONE, "--only", "batch", "--plot", str(picture))
    assert done.exit_code == 0, done.output
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--lamb", "adam"), "expected one of theorem, defaults, got lamb=adam"),
        (("--only", "bit"), "expected one of rounds; rounds, noise; .* got only=bit"),
        (("--seeds", "0,x"), "expected different whole numbers .* got seeds=0,x"),
        (("--seeds", "1,1"), "expected different whole numbers .* got seeds=1,1"),
        (("--seeds", "-1"), "expected different whole numbers .* got seeds=-1"),
        (("--plot", "figure.pdf"), "expected a file name that ends in .png, got plot=figure.pdf"),
        (("--plot", "no/such/figure.png"), "expected a folder that is there, got plot=no/such/figure.png"),
    ],
)
def test_what_cannot_be_done_is_refused_in_words(arguments: tuple[str, ...], words: str) -> None:
    done = bench(*arguments)
    assert done.exit_code == 2
    assert re.search(words, done.stderr.replace("\n", " "))


def test_a_figure_without_matplotlib_is_refused_before_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    done = bench("--plot", "figure.png")
    assert done.exit_code == 2
    assert "pip install 'datps[report]'" in done.stderr


def test_seeds_are_numbers() -> None:
    assert parse_seeds("3, 0,12") == (3, 0, 12)
    with pytest.raises(SpecError):
        parse_seeds("")
