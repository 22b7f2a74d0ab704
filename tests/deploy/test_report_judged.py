"""What a report takes from evaluations and certificates, how it draws them, and what it says of damaged files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from deploy.cli import app
from deploy.report import figures
from deploy.report.collect import collect
from deploy.report.page import table_1
from deploy.report.write import at_paper_radii, certified_curves, names_of
from tests.deploy.report_runs import TITLE, certified, make_run
from worker.certificates import summarize


def report(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["report", *map(str, arguments)])


def evaluation(*attacks: tuple[str, str, float, float], samples: int = 1000, **more: object) -> str:
    """Of (name, norm, epsilon, accuracy)."""
    found = [
        {"attack": name, "parameters": {"name": name, "norm": norm, "epsilon": epsilon}, "robust_accuracy": accuracy}
        for name, norm, epsilon, accuracy in attacks
    ]
    return json.dumps({"samples": samples, "attacks": found, "sweeps": [], **more})


def autoattack_cells(path: Path) -> list[tuple[str, str]]:
    table = table_1(collect([path]))
    assert table is not None
    assert table.head[4:6] == ("AA %", "AA images")
    return [(cells[4], cells[5]) for cells, is_ours in table.rows if is_ours]


def test_aa_is_autoattack_at_the_jobs_radius_and_norm_with_its_number_of_images(tmp_path: Path) -> None:
    for seed, accuracy in ((0, 0.30), (1, 0.34)):
        folder = make_run(tmp_path / f"seed-{seed}", f"seed={seed}", "attack.epsilon=0.1") / "evaluation"
        folder.mkdir()
        others = ("pgd", "linf", 0.1, 0.9), ("autoattack", "linf", 0.2, 0.01), ("autoattack", "l2", 0.1, 0.02)
        (folder / "evaluation.json").write_text(evaluation(*others, ("autoattack", "linf", 0.1, accuracy)))
    assert autoattack_cells(tmp_path) == [("32.00", "1000")]


def test_aa_is_empty_unless_every_seed_has_it(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "seed-0", "attack.epsilon=0.1")
    make_run(tmp_path / "seed-1", "attack.epsilon=0.1", "seed=1")
    (folder / "evaluation.json").write_text(evaluation(("autoattack", "linf", 0.1, 0.3)))
    assert autoattack_cells(tmp_path) == [("", "")]


def test_of_several_autoattacks_the_one_on_most_images_counts_and_images_are_a_range_over_seeds(tmp_path: Path) -> None:
    for seed, sizes in ((0, {100: 0.5, 360: 0.4}), (1, {50: 0.2})):
        folder = make_run(tmp_path / f"seed-{seed}", f"seed={seed}", "attack.epsilon=0.1")
        for samples, accuracy in sizes.items():
            (folder / f"{samples}").mkdir()
            text = evaluation(("autoattack", "linf", 0.1, accuracy), samples=samples)
            (folder / f"{samples}" / "evaluation.json").write_text(text)
    assert autoattack_cells(tmp_path) == [("30.00", "50 to 360")]


def test_an_evaluation_of_another_model_than_the_results_is_not_its_aa(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", "attack.epsilon=0.1")
    result = json.loads((folder / "result.json").read_text()) | {"parameter_digest": "aa", "weights": "raw"}
    (folder / "result.json").write_text(json.dumps(result))
    attack = ("autoattack", "linf", 0.1, 0.3)
    (folder / "evaluation.json").write_text(evaluation(attack, parameter_digest="bb", weights="raw"))
    assert autoattack_cells(tmp_path) == [("", "")]
    (folder / "evaluation.json").write_text(evaluation(attack, parameter_digest="aa", weights="ema"))
    assert autoattack_cells(tmp_path) == [("", "")]
    (folder / "evaluation.json").write_text(evaluation(attack, parameter_digest="aa", weights="raw"))
    assert autoattack_cells(tmp_path) == [("30.00", "1000")]


@pytest.fixture
def axes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, str]]:
    """What is painted instead of a PNG: axes and title of each figure."""
    from matplotlib.figure import Figure

    painted: list[tuple[Any, str]] = []

    def draw(paint: Callable[[Any], None], *, title: str, **_: object) -> bytes:
        paint(each := Figure().subplots())
        painted.append((each, title))
        return b"PNG"

    monkeypatch.setattr(figures, "draw", draw)
    return painted


def test_the_certified_curve_is_nowhere_higher_than_the_certified_accuracy(
    tmp_path: Path, axes: list[tuple[Any, str]]
) -> None:
    from matplotlib.cbook import STEP_LOOKUP_MAP

    samples = certified((1, 0.12), (1, 0.4), (None, 0.0), (2, 0.5))
    text = TITLE + "".join(f"{each.line()}\n" for each in samples)
    (make_run(tmp_path / "run") / "certified.tsv").write_text(text)
    data = collect([tmp_path])
    figures.lines(certified_curves(data, names_of(data)), title="", x="", y="", step=True)
    line = axes[0][0].lines[0]
    xs, ys = STEP_LOOKUP_MAP[line.get_drawstyle()](*line.get_data())
    for radius in (0.05, 0.2, 0.3, 0.39):
        (height,) = {y for x, following, y in zip(xs, xs[1:], ys, strict=False) if x < radius < following}
        assert height == 100 * summarize(samples, [radius])["certified"][0]["accuracy"]
    assert (xs[-1], ys[-1]) == (0.4, 0.0)


@pytest.mark.parametrize(
    ("kinds", "title", "labels"),
    [
        (("test",), "Test accuracy while training", ["0"]),
        (("validation",), "Validation accuracy while training", ["0"]),
        (("test", "validation"), "Accuracy while training", ["0 (test)", "1 (validation)"]),
    ],
)
def test_learning_curves_say_on_what_data_the_accuracy_is(
    tmp_path: Path, axes: list[tuple[Any, str]], kinds: tuple[str, ...], title: str, labels: list[str]
) -> None:
    for number, kind in enumerate(kinds):
        folder = make_run(tmp_path / str(number), f"data.validation={0.1 if kind == 'validation' else 0}")
        lines = [json.loads(text) | {"data": kind} for text in (folder / "evaluations.jsonl").read_text().splitlines()]
        (folder / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = collect([tmp_path])
    figures.learning_curves(data, names_of(data))
    painted, words = axes[0]
    assert words.startswith(title)
    assert painted.get_legend_handles_labels()[1] == labels


def test_the_seeds_of_an_experiment_share_color_and_name(tmp_path: Path, axes: list[tuple[Any, str]]) -> None:
    for name in ("x/seed-0", "x/seed-1", "y/seed-0"):
        make_run(tmp_path / name, f"seed={name[-1]}", f"attack.epsilon={0.1 if name[0] == 'x' else 0.2}")
    data = collect([tmp_path])
    figures.learning_curves(data, names_of(data))
    painted = axes[0][0]
    colors = [line.get_color() for line in painted.lines]
    assert painted.get_legend_handles_labels()[1] == ["x", "y/seed-0"]
    assert len(colors) == 6
    assert len({*colors[:4]}) == len({*colors[4:]}) == 1
    assert colors[0] != colors[4]


def test_a_picture_is_as_high_as_its_bars_and_legend_need() -> None:
    def height(bars: int, names: int) -> int:
        def paint(axes: Any) -> None:
            for number in range(names):
                axes.plot([0, 1], label=f"a run with a long name, {number}")

        png = figures.draw(paint, title="", x="", y="", bars=bars)
        return int.from_bytes(png[20:24])  # of the IHDR chunk

    assert height(30, 0) > 1.5 * height(3, 0)
    assert height(0, 12) > height(0, 2) + 60


def test_a_certification_without_any_row_is_shown_as_not_begun(tmp_path: Path) -> None:
    header = '# datps certify {"samples": 360, "every": 6}\nindex\tlabel\t...\n'
    (make_run(tmp_path / "run") / "certification.tsv").write_text(header)
    ended = report(tmp_path, "--out", tmp_path / "out")
    assert ended.exit_code == 0, ended.output
    assert "<td>0 of 60<" in (tmp_path / "out/report.html").read_text()
    assert not (tmp_path / "out/certified.png").exists()


def test_a_certification_that_goes_on_says_how_far_it_is(tmp_path: Path) -> None:
    header = '# datps certify {"samples": 360, "every": 6}\nindex\tlabel\t...\n'
    text = header + "".join(f"{each.line()}\n" for each in certified((1, 0.12), (1, 0.4)))
    (make_run(tmp_path / "run") / "certification.tsv").write_text(text)
    data = collect([tmp_path])
    assert at_paper_radii(data, names_of(data))["run, certification.tsv"][0] == "2 of 60"


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("evaluation.json", b'{"samples": 360, "att', "expected a whole evaluation of `datps evaluate`, got path="),
        ("evaluation.json", b"", "expected a whole evaluation"),
        ("evaluation.json", b"[]", "expected a whole evaluation"),
        ("evaluation.json", b'{"samples": 3, "attacks": [{}], "sweeps": []}', "attacks.0.robust_accuracy"),
        ("evaluation.json", b"\xff\xfe", "expected a whole evaluation"),
        (
            "evaluation.json",
            b'{"samples": 3, "attacks": [], "sweeps": [{"key": "steps", "attacks": [], "rows": [{"robust_accuracy": 1}'
            b"]}]}",
            "expected rows with a value",
        ),
        ("certified.tsv", TITLE.encode() + b"0\t1\tone\t0.1\t9\t1\t0.1\n", "expected rows of certificates, got file="),
        ("certified.tsv", TITLE.encode() + b"\xff\n", "expected rows of certificates"),
        ("rounds.jsonl", b'{"epoch": 1}\n', "expected lines with numbers epoch, round_s"),
        ("evaluations.jsonl", b"[1]\n{}\n", "expected lines with numbers epoch, clean_accuracy"),
    ],
)  # fmt: skip
def test_a_damaged_file_is_refused_with_words(tmp_path: Path, file: str, content: bytes, said: str) -> None:
    (make_run(tmp_path / "run") / file).write_bytes(content)
    ended = report(tmp_path, "--out", tmp_path / "out")
    assert (ended.exit_code, type(ended.exception)) == (2, SystemExit)
    assert said in ended.output.replace("\n", " ")
