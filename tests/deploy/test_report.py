"""`datps report`: what it reads from run folders, how it names methods, and what the page says."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from common.errors import SpecError
from deploy.report import paper
from deploy.report.collect import Certificates, collect, communication_of, method_of
from deploy.report.page import table_1, table_2, table_4
from deploy.report.write import at_paper_radii, certified_curves, names_of, pictures_of, swept, write
from tests.deploy.report_runs import TITLE, certified, job, make_run

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.mark.parametrize(
    ("settings", "method"),
    [
        (("workers=1",), "AT"),
        (("workers=1", "attack.name=fgsm"), "Fast AT"),
        (("workers=6",), "DAT-PGD"),
        (("workers=6", "attack.name=fgsm", "optimizer.name=sgd"), "DAT-FGSM w/o LALR"),
        (("workers=6", "optimizer.name=sgd", "optimizer.base_batch=128"), "DAT-LSGD"),
        (("workers=6", "data.unlabeled_fraction=0.5"), "Semi-supervised DAT-PGD"),
        (("workers=6", "transfer.init=true"), "DAT-PGD, fine-tuned"),
        (("workers=6", "smoothing.noise_std=0.25", "smoothing.samples=20"), "Smooth-DAT"),
        (("workers=1", "smoothing.noise_std=0.25"), "Smooth-AT"),
        (("workers=6", "attack.name=none"), "no attack"),
    ],
)
def test_a_training_is_called_what_the_paper_calls_it(settings: tuple[str, ...], method: str) -> None:
    assert method_of(job(*settings)) == method


def test_every_method_and_setting_of_the_papers_tables_can_be_met_by_a_job() -> None:
    methods = {
        method_of(job(f"workers={m}", f"attack.name={a}", f"optimizer.name={o}"))
        for m in (1, 6)
        for a in ("pgd", "fgsm")
        for o in ("lamb", "sgd")
    }
    communications = {
        communication_of(job(*settings))
        for settings in (
            ("codec.name=none", "codec.two_sided=false"),
            ("codec.bits=16", "codec.two_sided=false"),
            ("codec.bits=8", "codec.two_sided=false"),
            ("codec.bits=8", "codec.two_sided=true"),
            ("codec.name=none", "codec.two_sided=false", "exchange.topology=collective"),
        )
    }
    semi = {method_of(job(f"attack.name={a}", "data.unlabeled_fraction=0.5")) for a in ("pgd", "fgsm")}
    assert {row.method for row in paper.TABLE_3} == semi
    assert {row.method for row in paper.TABLE_1} <= methods
    assert {row.method for row in paper.TABLE_4} <= methods
    assert {row.setting for row in paper.TABLE_4} == communications


def test_our_runs_stand_below_the_papers_row_of_their_kind_as_means_over_seeds(tmp_path: Path) -> None:
    for seed, robust in ((0, 0.70), (1, 0.74)):
        make_run(tmp_path / f"seed-{seed}", "workers=6", f"seed={seed}", robust=robust)
    table = table_1(collect([tmp_path]))
    assert table is not None
    rows = [cells for cells, _ in table.rows]
    ours = [number for number, (_, is_ours) in enumerate(table.rows) if is_ours]
    assert len(ours) == 1
    assert rows[ours[0] - 1][:4] == ["DAT-PGD", "paper: 6 x 512", "63.75", "38.45"]
    # seconds per epoch: two rounds of 1/8 s and of 1 s
    assert rows[ours[0]] == [
        *("DAT-PGD", "ours: digits, small_cnn, 6 x 64, randomized, 8 bits", "90.00", "72.00"),
        *("", "", "0.25", "2", "18", "2"),
    ]


def test_a_setting_that_the_paper_does_not_have_gets_a_row_of_its_own(tmp_path: Path) -> None:
    make_run(tmp_path / "run", "codec.bits=4", "codec.two_sided=true")
    table = table_4(collect([tmp_path]))
    assert table is not None
    cells, is_ours = table.rows[-1]
    assert is_ours
    assert cells[1] == "ours: 4 bits 2-sided; digits, small_cnn, 4 x 64, randomized"


def test_certified_accuracies_stand_below_the_papers() -> None:
    table = table_2({"run": ("12 of 60", (0.5, None, 0.25, 0.2, 0.1, 0.05, 0.0))})
    assert table is not None
    assert table.rows[0][0][:3] == ["paper: noise 0.12, N = 2", "", "83.2"]
    assert table.rows[-1] == (["run", "12 of 60", "50.0", "", "25.0", "20.0", "10.0", "5.0", "0.0"], True)


class Page(HTMLParser):
    """The words of a page, and what it loads."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.loads: list[str] = []
        self.feed(text)

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def handle_starttag(self, _tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loads += [value or "" for name, value in attrs if name in ("src", "href")]


def test_the_page_needs_nothing_beside_itself_and_says_what_was_measured(tmp_path: Path) -> None:
    make_run(tmp_path / "runs/a", "data.batch_per_worker=64", robust=0.625)
    make_run(tmp_path / "runs/b", "data.batch_per_worker=128")
    make_run(tmp_path / "runs/c", complete=False)
    written = write([tmp_path / "runs"], tmp_path / "out", "Codecs & <runs>")
    text = (tmp_path / "out/report.html").read_text()
    page = Page(text)
    assert written["runs"] == 3
    assert "Codecs & <runs>" in page.words
    assert "62.5" in page.words
    assert len(page.loads) == len(written["pictures"]) == 4
    assert all(load.startswith("data:image/png;base64,") for load in page.loads)
    assert not re.search(r"https?://", text)
    assert all((tmp_path / "out" / name).read_bytes().startswith(PNG) for name in written["pictures"])


def test_a_folder_without_runs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"expected a run folder, or a folder of them, got run=.*no job\.yaml"):
        collect([tmp_path])


def test_a_run_that_is_given_twice_counts_once_and_a_cut_off_line_is_passed_over(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    with (folder / "rounds.jsonl").open("a") as stream:
        stream.write('{"round": 5, "ep')
    data = collect([tmp_path, folder])
    assert (len(data), len(data[0].rounds), data[0].epochs) == (1, 4, 2.0)


def test_names_are_as_short_as_they_can_be(tmp_path: Path) -> None:
    for name in ("x/seed-0", "y/seed-0"):
        make_run(tmp_path / name)
    assert sorted(names_of(collect([tmp_path])).values()) == ["x/seed-0", "y/seed-0"]


def test_evaluations_and_certificates_in_a_run_folder_are_shown(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    rows = [{"epsilon": 0.0, "robust_accuracy": 0.9}, {"epsilon": 0.1, "robust_accuracy": 0.5}]
    judged = {"samples": 360, "attacks": [], "sweeps": [{"key": "epsilon", "attacks": ["pgd:20"], "rows": rows}]}
    (folder / "evaluation").mkdir()
    (folder / "evaluation" / "evaluation.json").write_text(json.dumps(judged))
    samples = certified((1, 0.12), (1, 0.4), (None, 0.0), (2, 0.5))
    (folder / "certified.tsv").write_text(TITLE + "".join(f"{each.line()}\n" for each in samples) + "4\t1\t1")

    data = collect([tmp_path])
    names = names_of(data)
    assert data[0].certified == {"certified.tsv": Certificates(samples=samples, planned=None)}
    assert at_paper_radii(data, names) == {"run, certified.tsv": ("4", [0.5, 0.5, 0.25, 0.25, 0.25, 0.25, 0.0])}
    points = [(0.0, 50.0), (0.12, 50.0), (0.4, 25.0), (0.4, 0.0)]
    assert certified_curves(data, names) == {"run, certified.tsv": points}
    assert swept(data, names, "epsilon") == {"run, pgd:20": [(0.0, 90.0), (0.1, 50.0)]}
    pictures = [picture.name for picture in pictures_of(data, names)]
    assert pictures == ["learning-curves", "epsilon", "certified", "time", "traffic"]
