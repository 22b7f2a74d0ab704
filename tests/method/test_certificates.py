"""The certificates of a test set: their file, and what they sum up to."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from common.errors import SpecError, StorageError
from tests.method.support import batch_norm_model
from worker.certificates import CertificateFile, CertifiedSample, certified_curve, model_digest, summarize
from worker.certification import Certificate

PARAMETERS = {"model_digest": "abc", "noise_std": 0.25, "n": 1000}
INDICES = range(0, 100, 10)


def sample(index: int, label: int, predicted: int | None, radius: float, seconds: float = 0.5) -> CertifiedSample:
    found = Certificate(predicted=predicted, radius=radius, votes=700)
    return CertifiedSample(index=index, label=label, certificate=found, seconds=seconds)


SAMPLES = (
    sample(0, 3, 3, 0.1 + 0.2),
    sample(10, 2, None, 0.0),
    sample(20, 1, 7, 0.9, 1.25),
    sample(30, 5, 5, 0.1),
)
TEXT = (
    '# datps certify {"model_digest": "abc", "noise_std": 0.25, "n": 1000}\n'
    "index\tlabel\tpredicted\tradius\tvotes\tcorrect\tseconds\n"
    "0\t3\t3\t0.30000000000000004\t700\t1\t0.500\n"
    "10\t2\tabstain\t0.0\t700\t0\t0.500\n"
    "20\t1\t7\t0.9\t700\t0\t1.250\n"
    "30\t5\t5\t0.1\t700\t1\t0.500\n"
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "certificates.tsv"


def reopened(path: Path, parameters: dict[str, object] | None = None) -> CertificateFile:
    return CertificateFile(path, parameters or PARAMETERS, INDICES, resume=True)


def test_every_row_is_in_the_file_at_once(path: Path) -> None:
    file = CertificateFile(path, PARAMETERS, INDICES, resume=False)
    lines = TEXT.splitlines(keepends=True)
    for count, each in enumerate(SAMPLES):
        assert path.read_text() == "".join(lines[: 2 + count])
        file.append(each)
    assert path.read_text() == TEXT
    assert file.samples == list(SAMPLES)


def test_a_file_gives_back_its_rows_exactly(path: Path) -> None:
    path.write_text(TEXT)
    file = reopened(path)
    assert file.samples == list(SAMPLES)
    assert path.read_text() == TEXT


@pytest.mark.parametrize("cut", [1, 5, 30, 31])
def test_a_last_line_that_was_cut_off_is_dropped(path: Path, cut: int) -> None:
    path.write_text(TEXT[:-cut])
    file = reopened(path)
    assert len(file.samples) == (3 if cut < 25 else 2)
    for each in SAMPLES[len(file.samples) :]:
        file.append(each)
    assert path.read_text() == TEXT


def test_an_empty_file_and_none_are_begun(path: Path) -> None:
    assert reopened(path).samples == []
    begun = path.read_text()
    path.write_text("")
    reopened(path)
    assert begun == path.read_text() == "".join(TEXT.splitlines(keepends=True)[:2])


def test_a_file_is_gone_on_with_only_if_that_is_asked_for(path: Path) -> None:
    path.write_text(TEXT)
    with pytest.raises(SpecError, match=re.escape(f"expected a new file (or --resume), got out={path}")):
        CertificateFile(path, PARAMETERS, INDICES, resume=False)
    assert path.read_text() == TEXT


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"noise_std": 0.5}, "expected noise_std=0.25 as in {path}, got noise_std=0.5"),
        ({"model_digest": "xyz"}, "expected model_digest=abc as in {path}, got model_digest=xyz"),
        ({"seed": 1}, "expected seed=None as in {path}, got seed=1"),
    ],
)
def test_other_parameters_are_refused_with_both_values(path: Path, changes: dict[str, object], message: str) -> None:
    path.write_text(TEXT + "40\t1")
    with pytest.raises(SpecError, match=re.escape(message.format(path=path))):
        reopened(path, {**PARAMETERS, **changes})
    assert path.read_text() == TEXT + "40\t1"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("# datps certify ", "# ", "expected a file that datps certify has written"),
        ("votes\t", "", "expected a file that datps certify has written"),
        ('{"model_digest"', '{{"model_digest"', "expected a file that datps certify has written"),
        (
            '{"model_digest": "abc", "noise_std": 0.25, "n": 1000}',
            "7",
            "expected a file that datps certify has written",
        ),
        ("10\t2\tabstain", "20\t2\tabstain", "expected index 10, got line 4=20"),
        ("7\t0.9\t700\t0", "7\t0.9\t700\t1", "expected a row of 7 columns, got line 5=20"),
        ("abstain", "nothing", "expected a row of 7 columns, got line 4=10"),
        ("abstain\t", "", "expected a row of 7 columns, got line 4=10"),
    ],
)
def test_something_else_is_refused_and_left_alone(path: Path, old: str, new: str, message: str) -> None:
    text = TEXT.replace(old, new, 1)
    assert text != TEXT
    path.write_text(text)
    with pytest.raises(SpecError, match=re.escape(message)):
        reopened(path)
    assert path.read_text() == text


def test_bytes_that_are_no_text_are_refused(path: Path) -> None:
    path.write_bytes(b"\x89PNG\r\n\x1a\n\xff\xfe\n")
    with pytest.raises(SpecError, match="expected a file that datps certify has written"):
        reopened(path)


def test_more_rows_than_samples_are_refused(path: Path) -> None:
    path.write_text(TEXT)
    with pytest.raises(SpecError, match="expected 3 rows at most, got line 6=30"):
        CertificateFile(path, PARAMETERS, range(0, 30, 10), resume=True)


def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"expected a file that can be written, got out=.*No such file"):
        CertificateFile(tmp_path / "absent" / "file.tsv", PARAMETERS, INDICES, resume=False)
    with pytest.raises(SpecError, match=r"expected a file that can be written, got out=.*Is a directory"):
        CertificateFile(tmp_path, PARAMETERS, INDICES, resume=True)


def test_a_disk_that_refuses_a_row_is_worth_a_retry(path: Path) -> None:
    file = CertificateFile(path, PARAMETERS, INDICES, resume=False)
    path.unlink()
    path.mkdir()
    with pytest.raises(StorageError) as refused:
        file.append(SAMPLES[0])
    assert refused.value.exit_code == 75
    assert file.samples == []


def test_summary_counts_wrong_answers_and_abstentions_as_nothing() -> None:
    assert summarize(SAMPLES, [0.0, 0.1, 0.2, 0.1 + 0.2, 0.5]) == {
        "samples": 4,
        "seconds": 2.75,
        "smoothed_accuracy": 0.5,
        "abstained": 0.25,
        "average_certified_radius": pytest.approx(0.1),
        "certified": [
            {"radius": 0.0, "accuracy": 0.5},
            {"radius": 0.1, "accuracy": 0.5},
            {"radius": 0.2, "accuracy": 0.25},
            {"radius": 0.1 + 0.2, "accuracy": 0.25},
            {"radius": 0.5, "accuracy": 0.0},
        ],
    }


def test_an_abstention_is_right_for_no_label() -> None:
    assert not sample(0, 0, None, 0.0).correct
    assert not sample(0, 0, None, 0.0).certified_at(0.0)


def test_curve_has_the_certified_accuracy_at_each_of_its_radii() -> None:
    radii, accuracies = certified_curve(SAMPLES)
    assert radii == [0.0, 0.1, 0.1 + 0.2]
    assert accuracies == [row["accuracy"] for row in summarize(SAMPLES, radii)["certified"]] == [0.5, 0.5, 0.25]


def test_digest_of_a_model_covers_parameters_statistics_and_constants() -> None:
    reference = model_digest(batch_norm_model())
    changed = []
    for name in ("0.weight", "1.running_mean", "1.num_batches_tracked", "constant"):
        model = batch_norm_model()
        if name == "constant":
            model.register_buffer("constant", torch.zeros((), dtype=torch.bfloat16), persistent=False)
        else:
            dict([*model.named_parameters(), *model.named_buffers()])[name].data.add_(1)
        changed.append(model_digest(model))

    assert model_digest(batch_norm_model().eval()) == reference
    assert model_digest(nn.ReLU()) != reference
    assert len({reference, *changed}) == 5
