"""`datps certify` as a user runs it: rows, interruptions, results, pictures and refusals."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
from typer.testing import CliRunner, Result

import deploy.certified_plot
from common.errors import SpecError
from deploy.cli import app

MODULE = """
import torch
from torch import nn

passes, stop_at = 0, None

class Corners(nn.Module):
    # a linear model: noise changes its answer now and then
    def __init__(self, scale=1.0):
        super().__init__()
        self.weight = nn.Parameter(scale * torch.randn(64, 10, generator=torch.Generator().manual_seed(1)))

    def forward(self, images):
        global passes
        passes += 1
        if passes == stop_at:
            raise KeyboardInterrupt
        return images.flatten(1) @ self.weight

class Grumpy(nn.Module):
    def forward(self, images):
        raise ValueError("three channels, please")

first, second = Corners(), Corners(2.0)
"""
ORDERS = ("--noise-std", "0.25", "--n0", "50", "--n", "300", "--alpha", "0.01", "--every", "30", "--batch", "100")
PASSES = 1 + 4
"""Of a sample: 1 before them all, to try the model, then 1 for n0 and 3 for n."""


def datps(*arguments: object, **variables: str) -> Result:
    return CliRunner().invoke(app, ["certify", *map(str, arguments)], env=variables)


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> ModuleType:
    """A module in the working directory, of a name that no other test has imported."""
    name = "their_model_" + "".join(c if c.isalnum() else "_" for c in request.node.name)
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return importlib.import_module(name)


def rows(path: Path) -> list[str]:
    """Lines of the file without their seconds."""
    return [line.rpartition("\t")[0] for line in path.read_text().splitlines()]


def test_rows_result_and_picture_agree(module: ModuleType, tmp_path: Path) -> None:
    picture = tmp_path / "accuracy.png"

    ended = datps(
        f"{module.__name__}:first", *ORDERS, "--out", "a.tsv", "--plot", picture, "--radii", "0,0.1", "--json"
    )

    assert ended.exit_code == 0, ended.output
    assert ended.stderr == ""
    result = json.loads(ended.stdout)
    table = [line.split("\t") for line in Path("a.tsv").read_text().splitlines()[2:]]
    assert [int(row[0]) for row in table] == list(range(0, 360, 30))
    right = [float(row[3]) for row in table if row[1] == row[2]]
    assert 0 < sum(row[2] == "abstain" for row in table) < 12
    assert result["abstained"] == sum(row[2] == "abstain" for row in table) / 12
    assert result["samples"] == 12
    assert result["smoothed_accuracy"] == len(right) / 12
    assert result["average_certified_radius"] == pytest.approx(sum(right) / 12)
    assert result["certified"] == [
        {"radius": 0.0, "accuracy": len(right) / 12},
        {"radius": 0.1, "accuracy": sum(radius >= 0.1 for radius in right) / 12},
    ]
    assert (result["noise_std"], result["n0"], result["n"], result["alpha"]) == (0.25, 50, 300, 0.01)
    assert max(float(row[3]) for row in table) <= result["maximal_radius"]
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("after", [1, 3, 11])
def test_an_interrupted_run_goes_on_to_the_same_rows(module: ModuleType, after: int) -> None:
    model = f"{module.__name__}:first"
    assert datps(model, *ORDERS, "--out", "whole.tsv").exit_code == 0
    module.stop_at = module.passes + 1 + 4 * after + 3

    stopped = datps(model, *ORDERS, "--out", "parts.tsv")
    partial = rows(Path("parts.tsv"))
    resumed = datps(model, *ORDERS, "--out", "parts.tsv", "--resume", "--batch", "75", "--json")

    assert (stopped.exit_code, resumed.exit_code) == (130, 0)
    assert stopped.stderr == f"stopped: {after} of 12 samples are certified, --resume goes on\n"
    assert partial == rows(Path("whole.tsv"))[: 2 + after]
    assert rows(Path("parts.tsv")) == rows(Path("whole.tsv"))
    assert json.loads(resumed.stdout)["samples"] == 12


def test_rows_of_the_earlier_process_are_not_made_again(module: ModuleType) -> None:
    model = f"{module.__name__}:first"
    assert datps(model, *ORDERS, "--out", "a.tsv", "--limit", "5").exit_code == 0
    before, passes = Path("a.tsv").read_bytes(), module.passes

    longer = datps(model, *ORDERS, "--out", "a.tsv", "--limit", "7", "--resume", "--json")
    shorter = datps(model, *ORDERS, "--out", "a.tsv", "--limit", "2", "--resume", "--json")

    assert module.passes - passes == (1 + 2 * 4) + 1
    assert Path("a.tsv").read_bytes().startswith(before)
    assert len(rows(Path("a.tsv"))) == 2 + 7
    assert (json.loads(longer.stdout)["samples"], json.loads(shorter.stdout)["samples"]) == (7, 2)


def test_people_get_a_table(module: ModuleType) -> None:
    ended = datps(f"{module.__name__}:first", *ORDERS, "--limit", "3", "--radii", "0, 0.25", COLUMNS="100")

    assert ended.exit_code == 0, ended.output
    assert ended.stderr == ""
    words = [line.split() for line in ended.stdout.splitlines()]
    assert ["samples", "3"] in words
    assert ["radius", "certified", "accuracy"] in words
    assert [row[0] for row in words if row and row[-1] == "%" and len(row) == 3] == ["abstained", "0", "0.25"]
    assert list(Path.cwd().glob("*.tsv")) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--noise-std", "0.5"], "expected noise_std=0.25 as in a.tsv, got noise_std=0.5"),
        (["--alpha", "0.02"], "expected alpha=0.01 as in a.tsv, got alpha=0.02"),
        (["--n", "301"], "expected n=300 as in a.tsv, got n=301"),
        (["--n0", "51"], "expected n0=50 as in a.tsv, got n0=51"),
        (["--every", "10"], "expected every=30 as in a.tsv, got every=10"),
        (["--set", "seed=7"], "expected seed=0 as in a.tsv, got seed=7"),
    ],
)
def test_going_on_with_other_parameters_is_refused(module: ModuleType, changes: list[str], message: str) -> None:
    model = f"{module.__name__}:first"
    assert datps(model, *ORDERS, "--out", "a.tsv", "--limit", "1").exit_code == 0

    ended = datps(model, *ORDERS, *changes, "--out", "a.tsv", "--resume")

    assert ended.exit_code == 2
    assert ended.stderr == f"error: {message} (a certification that goes on keeps its parameters)\n"


def test_going_on_with_another_model_is_refused(module: ModuleType) -> None:
    assert datps(f"{module.__name__}:first", *ORDERS, "--out", "a.tsv", "--limit", "1").exit_code == 0

    ended = datps(f"{module.__name__}:second", *ORDERS, "--out", "a.tsv", "--resume")

    assert ended.exit_code == 2
    assert ended.stderr.startswith("error: expected model_digest=")


@pytest.mark.parametrize(
    ("attribute", "flags", "message"),
    [
        ("first", ["--n", "300"], "expected --noise-std, got noise_std=None"),
        ("first", ["--noise-std", "-1"], "expected a standard deviation above 0, got noise_std=-1.0"),
        ("first", ["--noise-std", "1", "--n", "5"], "expected at least 10 draws, got n=5"),
        ("first", ["--noise-std", "1", "--radii", "0.1,x"], "expected radii of at least 0, separated by commas"),
        ("first", ["--noise-std", "1", "--radii", "-1"], "expected radii of at least 0, separated by commas"),
        ("first", ["--noise-std", "1", "--radii", "nan"], "expected radii of at least 0, separated by commas"),
        ("first", ["--noise-std", "1", "--resume"], "expected --out with --resume, got out=None"),
        ("first", ["--noise-std", "1", "--plot", "a.txt"], "expected a file name that ends in one of"),
        ("first", ["--noise-std", "1", "--plot", "absent/a.png"], "expected a folder that is there"),
        ("Grumpy", ["--noise-std", "1"], "got model={module}:Grumpy (ValueError: three channels, please)"),
        ("absent", ["--noise-std", "1"], "expected module:attribute, a torch module or a function that makes one"),
    ],
)
def test_a_mistake_ends_with_words_and_2(module: ModuleType, attribute: str, flags: list[str], message: str) -> None:
    ended = datps(f"{module.__name__}:{attribute}", *flags)

    assert ended.exit_code == 2
    assert ended.stderr.startswith("error: expected")
    assert message.format(module=module.__name__) in ended.stderr
    assert module.passes <= 1


def test_a_picture_without_matplotlib_is_refused_before_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)

    with pytest.raises(SpecError, match=r"expected matplotlib.*pip install 'datps\[report\]'.*got plot=a.png"):
        deploy.certified_plot.refuse_unless_drawable(Path("a.png"))
