"""`datps report`: what it reads from run folders, how it names methods, and what the page says."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from common.config import JobSpec
from common.errors import SpecError
from common.spec_sources import load_job_spec
from deploy import runs
from deploy.report import paper
from deploy.report.collect import collect, communication_of, method_of
from deploy.report.page import table_1, table_2, table_4
from deploy.report.write import at_paper_radii, certified_curves, names_of, pictures_of, swept, write
from worker.certificates import CertifiedSample
from worker.certification import Certificate

PNG = b"\x89PNG\r\n\x1a\n"


def job(*settings: str) -> JobSpec:
    return load_job_spec(settings=settings)


def make_run(
    folder: Path, *settings: str, clean: float = 0.9, robust: float = 0.7, complete: bool = True, rounds: int = 4
) -> Path:
    """A run folder as training leaves it; two rounds an epoch."""
    folder.mkdir(parents=True)
    runs.write_job(folder, job(*settings), "digits")
    phases = {"attack_s": 0.5, "compute_s": 0.25, "communication_s": 0.125, "evaluation_s": 0.0, "round_s": 1.0}
    lines = [{"round": n + 1, "epoch": (n + 1) / 2, **phases} for n in range(rounds)]
    (folder / "rounds.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    evaluations = [{"epoch": n, "clean_accuracy": clean - 0.1 / n, "robust_accuracy": robust} for n in (1, 2)]
    (folder / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in evaluations))
    if complete:
        result = {"clean_accuracy": clean, "robust_accuracy": robust, "rounds": rounds}
        result |= {"pushed_bytes_per_round": 2e6, "pulled_bytes_per_round": 1e6, "workers": 4}
        (folder / "result.json").write_text(json.dumps(result))
    return folder


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
        *("DAT-PGD", "ours: digits, small_cnn, 6 x 64, randomized", "90.00", "72.00", "", "0.25", "2", "18", "2"),
    ]


def test_a_setting_that_the_paper_does_not_have_gets_a_row_of_its_own(tmp_path: Path) -> None:
    make_run(tmp_path / "run", "codec.bits=4", "codec.two_sided=true")
    table = table_4(collect([tmp_path]))
    assert table is not None
    cells, is_ours = table.rows[-1]
    assert is_ours
    assert cells[1] == "ours: 4 bits 2-sided; digits, small_cnn, 4 x 64, randomized"


def test_certified_accuracies_stand_below_the_papers() -> None:
    table = table_2({"run": (0.5, None, 0.25, 0.2, 0.1, 0.05, 0.0)})
    assert table is not None
    assert table.rows[0][0][:3] == ["paper: noise 0.12, N = 2", "83.2", "80.4"]
    assert table.rows[-1] == (["run", "50.0", "", "25.0", "20.0", "10.0", "5.0", "0.0"], True)


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
    judged = {"attacks": [], "sweeps": [{"key": "epsilon", "attacks": ["pgd:20"], "rows": rows}]}
    (folder / "evaluation").mkdir()
    (folder / "evaluation" / "evaluation.json").write_text(json.dumps(judged))
    samples = [
        CertifiedSample(index=n, label=1, certificate=Certificate(predicted=p, radius=r, votes=90), seconds=0.1)
        for n, (p, r) in enumerate([(1, 0.12), (1, 0.4), (None, 0.0), (2, 0.5)])
    ]
    lines = ["# datps certify {}", "index\tlabel\t...", *(sample.line() for sample in samples)]
    (folder / "certified.tsv").write_text("".join(f"{line}\n" for line in lines) + "4\t1\t1")

    data = collect([tmp_path])
    names = names_of(data)
    assert data[0].certified == {"certified.tsv": samples}
    assert at_paper_radii(data, names) == {"run, certified.tsv": [0.5, 0.5, 0.25, 0.25, 0.25, 0.25, 0.0]}
    assert certified_curves(data, names) == {"run, certified.tsv": [(0.0, 50.0), (0.12, 50.0), (0.4, 25.0)]}
    assert swept(data, names, "epsilon") == {"run, pgd:20": [(0.0, 90.0), (0.1, 50.0)]}
    pictures = [picture.name for picture in pictures_of(data, names)]
    assert pictures == ["learning-curves", "epsilon", "certified", "time", "traffic"]
