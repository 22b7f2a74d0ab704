"""In which order buckets are encoded: by number, each as soon as it and all before it hold their final values."""

from __future__ import annotations

from collections.abc import Iterable

from common.layout import Bucket, BucketKind, Layout


class Turns:
    """The buckets of one round. Not thread-safe."""

    def __init__(self, layout: Layout, *, whole: bool) -> None:
        """`whole`: no bucket before the whole gradient is ready, since the codec has to see it first."""
        self._buckets = layout.buckets
        self._gradient = len(layout.of_kind(BucketKind.GRADIENT))
        self._whole = whole
        self.begin()

    def begin(self) -> None:
        """A round begins: nothing is ready."""
        self._ready = [False] * len(self._buckets)
        self._next = 0

    def ready(self, numbers: Iterable[int]) -> list[Bucket]:
        """These buckets are ready; returns those whose turn has come."""
        for number in numbers:
            self._ready[number] = True
        if self._whole and not all(self._ready[: self._gradient]):
            return []
        first = self._next
        while self._next < len(self._ready) and self._ready[self._next]:
            self._next += 1
        return list(self._buckets[first : self._next])
