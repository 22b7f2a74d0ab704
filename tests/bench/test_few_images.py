"""The smaller image folder: which images it has, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.few_images import link_few
from common.errors import DataError


@pytest.fixture
def source(tmp_path: Path) -> Path:
    for part, count in (("train", 4), ("test", 3)):
        for name in ("cat", "dog"):
            folder = tmp_path / "all" / part / name
            folder.mkdir(parents=True)
            (folder / "notes.txt").write_text("no image")
            for number in range(count):
                (folder / f"{number}.png").write_text(f"{part} {name} {number}")
    return tmp_path / "all"


def test_it_has_the_first_images_of_each_class(source: Path, tmp_path: Path) -> None:
    assert link_few(source, tmp_path / "few", {"train": 2, "test": 1}) == 6
    files = sorted(path for path in (tmp_path / "few").rglob("*") if path.is_file())
    assert [path.read_text() for path in files] == [
        *("test cat 0", "test dog 0"),
        *("train cat 0", "train cat 1", "train dog 0", "train dog 1"),
    ]


@pytest.mark.parametrize(
    ("counts", "text"),
    [
        ({"train": 5}, "expected at least 5 images in each class, got images=4"),
        ({"train": 1, "val": 1}, "expected val/<class>/* under it, got FROM="),
    ],
)
def test_what_is_not_there_is_said_before_anything_is_made(
    source: Path, tmp_path: Path, counts: dict[str, int], text: str
) -> None:
    with pytest.raises(DataError) as refused:
        link_few(source, tmp_path / "few", counts)
    assert text in str(refused.value)
    assert not (tmp_path / "few").exists()


def test_a_folder_that_is_there_is_left_alone(source: Path) -> None:
    with pytest.raises(DataError, match="expected a folder that is not there yet, got TO="):
        link_few(source, source, {"train": 1})
