"""Batches on their way to the device: the same bits whether read when asked for or ahead, and one ahead at most."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest
import torch
from torch import Tensor

from common.errors import DataError
from worker import feeding
from worker.data import Samples, TensorSamples
from worker.feeding import Feed
from worker.subsets import Joined, Subset

CPU = torch.device("cpu")
DEADLINE_S = 30
PIXELS = torch.randint(256, (40, 3, 5, 5), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
LABELS = torch.arange(40)


class Files(TensorSamples):
    """Stands for images in files: tells which batch is read, by its first sample, and may be held up or be broken."""

    def __init__(self, broken: int | None = None, held_up: int | None = None) -> None:
        super().__init__(PIXELS, LABELS)
        self.begun: list[int] = []
        self.changed = threading.Condition()
        self.may_go_on = threading.Event()
        self.broken, self.held_up = broken, held_up

    @property
    def nbytes(self) -> None:
        return None

    def images(self, indices: Tensor) -> Tensor:
        first = int(indices[0])
        with self.changed:
            self.begun.append(first)
            self.changed.notify_all()
        if self.held_up == first:
            assert self.may_go_on.wait(DEADLINE_S)
        if self.broken == first:
            raise DataError(f"expected a readable image, got sample {first}")
        return super().images(indices)

    def wait_until_begun(self, *firsts: int) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: self.begun == list(firsts), DEADLINE_S), self.begun


def indices(number: int) -> Tensor:
    return torch.arange(4) + 4 * number


def feed(samples: Samples, **changes: Any) -> Feed:
    options: dict[str, Any] = {"part": slice(None), "device": CPU, "batches": 5}
    return Feed(samples, indices, **options | changes)


def readers() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("feed")]


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    assert readers() == []


@pytest.mark.parametrize("part", [slice(None), slice(1, 3), slice(3, 4)])
@pytest.mark.parametrize("samples", [TensorSamples(PIXELS, LABELS), Files()], ids=["memory", "files"])
def test_a_batch_is_the_part_of_its_samples_in_its_place(samples: Samples, part: slice) -> None:
    with closing(feed(samples, part=part)) as fed:
        for number in range(5):
            batch = fed.batch(number)
            expected = torch.zeros(4, 3, 5, 5)
            expected[part] = PIXELS[indices(number)[part]] / 255
            assert torch.equal(batch.images, expected)
            assert batch.labels.tolist() == indices(number)[part].tolist()
            assert batch.indices.tolist() == indices(number).tolist()


def test_one_batch_is_read_ahead_and_no_more_until_it_is_asked_for() -> None:
    files = Files(held_up=8)
    with closing(feed(files)) as fed:
        fed.batch(0)
        fed.batch(1)
        files.wait_until_begun(0, 4, 8)
        assert set(fed._ahead) == {1, 2}  # with nothing waiting behind batch 2 for the thread
        files.may_go_on.set()


def test_reading_goes_on_while_the_batch_before_is_used() -> None:
    """Batch 1 is held up; batch 0 is there nevertheless, and batch 1 comes as soon as it may."""
    files = Files(held_up=4)
    with closing(feed(files)) as fed:
        assert torch.equal(fed.batch(0).images, PIXELS[indices(0)] / 255)
        files.may_go_on.set()
        assert torch.equal(fed.batch(1).images, PIXELS[indices(1)] / 255)


def test_the_same_batch_again_is_not_read_again_and_nothing_beyond_the_last() -> None:
    files = Files()
    with closing(feed(files, batches=2)) as fed:
        first, again = fed.batch(0), fed.batch(0)
        assert torch.equal(first.images, again.images)
        fed.batch(1)
        fed.batch(1)
    assert files.begun == [0, 4]


def test_a_resumed_training_begins_anywhere() -> None:
    files = Files()
    with closing(feed(files)) as fed:
        assert torch.equal(fed.batch(3).images, PIXELS[indices(3)] / 255)
        files.wait_until_begun(12, 16)


def test_a_broken_image_is_told_of_with_its_own_batch() -> None:
    files = Files(broken=4)
    with closing(feed(files)) as fed:
        fed.batch(0)
        files.wait_until_begun(0, 4)
        with pytest.raises(DataError, match="sample 4"):
            fed.batch(1)


def test_what_is_in_memory_is_read_without_a_thread() -> None:
    with closing(feed(TensorSamples(PIXELS, LABELS))) as fed:
        fed.batch(0)
        assert readers() == []


HALVES = (TensorSamples(PIXELS[:20], LABELS[:20]), TensorSamples(PIXELS[20:] // 16, LABELS[20:], maximum=16))
KINDS: dict[str, Samples] = {
    "whole": TensorSamples(PIXELS, LABELS),
    "subset": Subset(TensorSamples(PIXELS, LABELS), torch.arange(39, -1, -1), LABELS),
    "joined": Joined(*HALVES),
    "joined of a subset": Joined(Subset(HALVES[0], torch.arange(0, 20, 2)), HALVES[1]),
}
WANTED = torch.tensor([25, 3, 29, 0, 3])


@pytest.mark.parametrize("kind", KINDS)
def test_samples_that_live_on_a_device_give_their_images_there(kind: str) -> None:
    """`meta` stands for a GPU: torch refuses to bring tensors of two devices together."""
    there = KINDS[kind].on(torch.device("meta"))
    assert there.labels.device == CPU
    assert there.images(WANTED).device.type == "meta"
    assert there.images(WANTED).shape == KINDS[kind].images(WANTED).shape


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("kind", KINDS)
def test_a_gpu_gives_the_same_bits_from_its_memory_and_from_reading_ahead(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples, cuda = KINDS[kind], torch.device("cuda")
    options: dict[str, Any] = {"part": slice(None), "device": cuda, "batches": 2}
    for limit in (feeding.RESIDENT_BYTES, 0):
        monkeypatch.setattr(feeding, "RESIDENT_BYTES", limit)
        with closing(Feed(samples, lambda number: WANTED + number, **options)) as fed:
            for number in range(2):
                assert torch.equal(fed.batch(number).images.cpu(), samples.images(WANTED + number))


@pytest.mark.parametrize("maximum", [16, 255])
def test_every_pixel_value_is_divided_as_ieee_says(maximum: int) -> None:
    pixels = torch.arange(maximum + 1, dtype=torch.uint8).view(-1, 1, 1, 1)
    images = TensorSamples(pixels, torch.zeros(maximum + 1), maximum=maximum).images(torch.arange(maximum + 1))
    expected = torch.tensor([value / maximum for value in range(maximum + 1)], dtype=torch.float64).to(torch.float32)
    assert torch.equal(images.flatten(), expected)


def test_joined_samples_come_in_the_order_asked_for() -> None:
    joined = KINDS["joined"]
    for each, image in zip(WANTED.tolist(), joined.images(WANTED), strict=True):
        half, number = divmod(each, 20)
        assert torch.equal(image, HALVES[half].images(torch.tensor([number]))[0])
