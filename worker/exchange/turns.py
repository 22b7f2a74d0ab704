"""In which order buckets are encoded: by number, each as soon as it and all before it hold their final values."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from common.layout import Bucket, BucketKind


class Turns:
    """The buckets of one round. Not thread-safe."""

    def __init__(self, buckets: Sequence[Bucket], *, whole: bool) -> None:
        """
        Args:
            buckets: all that take part, by number, the gradient's first.
            whole: no bucket before the whole gradient is ready, since the codec has to see it first.
        """
        self._buckets = tuple(buckets)
        self._gradient = sum(bucket.kind is BucketKind.GRADIENT for bucket in buckets)
        self._whole = whole
        self.begin()

    def begin(self) -> None:
        """A round begins: nothing is ready."""
        self._ready: set[int] = set()
        self._next = 0

    def ready(self, numbers: Iterable[int]) -> list[Bucket]:
        """These buckets are ready; returns those whose turn has come."""
        self._ready.update(numbers)
        if self._whole and not all(bucket.number in self._ready for bucket in self._buckets[: self._gradient]):
            return []
        first = self._next
        while self._next < len(self._buckets) and self._buckets[self._next].number in self._ready:
            self._next += 1
        return list(self._buckets[first : self._next])
