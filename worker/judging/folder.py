"""What an evaluation keeps: verdicts batch by batch while it runs, samples.tsv and evaluation.json in the end.

`parts/` has one file for each attack: a line that says of what (model, samples, attack, seed), then one line for each
batch. A later evaluation in the same folder takes from there what it would do again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common.errors import SpecError, StorageError, refusal
from worker.judging.verdicts import Verdict

RESULT, SAMPLES, PARTS = "evaluation.json", "samples.tsv", "parts"
FORMAT = 1


class Part:
    """The verdicts of one attack, by batch."""

    def __init__(self, file: Path, identity: Mapping[str, Any]) -> None:
        """Reads what is there; writes nothing but what it has read (a line that was cut off is dropped)."""
        self._file = file
        header = json.dumps({"format": FORMAT, **identity}, sort_keys=True)
        self.verdicts = dict(_read(file, header)) if file.exists() else {}
        lines = [header, *(_line(batch, verdict) for batch, verdict in self.verdicts.items())]
        with _storing(file):
            _replace(file, "\n".join(lines) + "\n")

    def add(self, batch: int, verdict: Verdict) -> None:
        """Keeps one more.

        Raises:
            StorageError: the disk is full.
        """
        with _storing(self._file), self._file.open("a", encoding="utf-8") as stream:
            stream.write(_line(batch, verdict) + "\n")


class Folder:
    """The folder of one model's evaluations."""

    def __init__(self, path: Path, model_digest: str) -> None:
        """Makes it if it is not there.

        Raises:
            SpecError: it holds something else, or the evaluation of another model.
            StorageError: it cannot be made.
        """
        self.path = path
        if path.exists() and not path.is_dir():
            raise SpecError(refusal("a folder", "out", path, "a file"))
        if path.is_dir() and not (path / PARTS).is_dir() and any(path.iterdir()):
            raise SpecError(refusal("a new or empty folder, or one of an earlier evaluation", "out", path))
        with _storing(path):
            (path / PARTS).mkdir(parents=True, exist_ok=True)
        for file in sorted((path / PARTS).glob("*.jsonl")):
            theirs = _header(file).get("model_digest")
            if theirs is not None and theirs != model_digest:
                rule = f"an evaluation of this model (digest {model_digest})"
                raise SpecError(refusal(rule, "digest", theirs, str(path)))

    def part(self, name: str, identity: Mapping[str, Any]) -> Part:
        """What there is of an attack.

        Args:
            name: what the file's name begins with.
            identity: all that its verdicts depend on, JSON-able; verdicts of another identity have another file.

        Raises:
            StorageError: it cannot be written.
        """
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
        return Part(self.path / PARTS / f"{name}-{digest}.jsonl", identity)

    def write(self, result: Mapping[str, Any], samples: Iterable[str]) -> None:
        """Writes samples.tsv, then evaluation.json.

        Raises:
            StorageError: the disk is full.
        """
        with _storing(self.path):
            _replace(self.path / SAMPLES, "".join(f"{line}\n" for line in samples))
            _replace(self.path / RESULT, json.dumps(result, indent=1) + "\n")


def _line(batch: int, verdict: Verdict) -> str:
    return json.dumps({"batch": batch, **dataclasses.asdict(verdict)})


def _header(file: Path) -> dict[str, Any]:
    try:
        with file.open(encoding="utf-8") as stream:
            header = json.loads(stream.readline())
    except (OSError, ValueError):
        return {}
    return header if isinstance(header, dict) else {}


def _read(file: Path, header: str) -> Iterator[tuple[int, Verdict]]:
    """The whole lines under this very header."""
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(refusal("a file that can be read", "path", file, str(error))) from None
    if lines[0] != header:
        return
    for line in lines[1:]:
        try:
            content = json.loads(line)
            batch = int(content.pop("batch"))
            values: dict[str, Any] = {
                name: tuple(value) if isinstance(value, list) else value for name, value in content.items()
            }
            yield batch, Verdict(**values)
        except (ValueError, TypeError, KeyError, AttributeError):
            return


def _replace(file: Path, text: str) -> None:
    """Writes under a temporary name, then renames: the file is whole, the old one or the new one."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(file)


@contextmanager
def _storing(path: Path) -> Iterator[None]:
    """What the operating system refuses is told as an error of the storage."""
    try:
        yield
    except OSError as error:
        raise StorageError(refusal("a folder with room to write", "path", path, str(error))) from None
