"""The certificates of a test set: made one by one, kept in a file that can be gone on with, and summed up."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
import xxhash
from torch import Tensor, nn

from common.errors import SpecError, StorageError, refusal
from worker.certification import Certificate, CertificationSettings, certify
from worker.record import describe_data
from worker.trained import TrainedModel

COLUMNS = ("index", "label", "predicted", "radius", "votes", "correct", "seconds")
ABSTAINED = "abstain"
_TITLE = "# datps certify "
_HEADER = "\t".join(COLUMNS)


@dataclass(frozen=True, kw_only=True)
class CertifiedSample:
    """A sample of the test set with its certificate."""

    index: int
    label: int
    certificate: Certificate
    seconds: float

    @property
    def correct(self) -> bool:
        """Whether the smoothed classifier answers the label; an abstention is no answer."""
        return self.certificate.predicted == self.label

    def certified_at(self, radius: float) -> bool:
        """Whether it is certainly answered with its label within `radius`."""
        return self.correct and self.certificate.radius >= radius

    def line(self) -> str:
        """Its row of the file, `COLUMNS` without the end of line."""
        found = self.certificate
        predicted = ABSTAINED if found.predicted is None else found.predicted
        return (
            f"{self.index}\t{self.label}\t{predicted}\t{found.radius!r}\t{found.votes}\t{int(self.correct)}\t"
            f"{self.seconds:.3f}"
        )

    @classmethod
    def of_line(cls, line: str) -> Self:
        """What `line` gave.

        Raises:
            ValueError: something else.
        """
        index, label, predicted, radius, votes, _, seconds = line.split("\t")
        sample = cls(
            index=int(index),
            label=int(label),
            certificate=Certificate(
                predicted=None if predicted == ABSTAINED else int(predicted), radius=float(radius), votes=int(votes)
            ),
            seconds=float(seconds),
        )
        if sample.line() != line:
            raise ValueError("columns contradict each other")
        return sample


class CertificateFile:
    """A TSV file with a row for each sample, after a line with what the rows depend on.

    A row is written in one call and is there as soon as its sample is certified. So a process that ends, in whatever
    way, leaves a file to go on with; the next one drops a last line that was cut off.
    """

    def __init__(self, path: Path, parameters: Mapping[str, Any], indices: Sequence[int], *, resume: bool) -> None:
        """Makes the file, or reads what an earlier process has left in it.

        Args:
            path: the file.
            parameters: JSON-able; the rows are a function of them.
            indices: of the samples, in the order of the rows.
            resume: go on with the file if there is one.

        Raises:
            SpecError: there is a file but `resume` is not set, it has other parameters, or it is something else.
        """
        self._path = path
        self.samples: list[CertifiedSample] = []
        try:
            if path.exists() and path.stat().st_size > 0:
                if not resume:
                    raise SpecError(refusal("a new file (or --resume)", "out", path, "it is not empty"))
                content = path.read_bytes()
                whole = content[: content.rfind(b"\n") + 1]
                self._read(whole.decode(errors="replace").splitlines(), parameters, indices)
                os.truncate(path, len(whole))
            else:
                path.write_text(f"{_TITLE}{json.dumps(dict(parameters))}\n{_HEADER}\n")
        except OSError as error:
            rule = "a file that can be written"
            raise SpecError(refusal(rule, "out", path, error.strerror or str(error))) from None

    def append(self, sample: CertifiedSample) -> None:
        """Adds a row.

        Raises:
            StorageError: the disk is full.
        """
        try:
            with self._path.open("ab", buffering=0) as stream:
                stream.write(f"{sample.line()}\n".encode())
        except OSError as error:
            raise StorageError(refusal("a disk with room to write", "out", self._path, str(error))) from None
        self.samples.append(sample)

    def _read(self, lines: Sequence[str], parameters: Mapping[str, Any], indices: Sequence[int]) -> None:
        """Takes over the rows of a file."""
        self._refuse_other(_described(self._path, lines), parameters)
        for number, line in enumerate(lines[2:]):
            try:
                sample = CertifiedSample.of_line(line)
            except ValueError as error:
                rule = f"a row of {len(COLUMNS)} columns"
                raise SpecError(refusal(rule, f"line {number + 3}", line, f"{self._path}: {error}")) from None
            if number >= len(indices) or sample.index != indices[number]:
                rule = f"index {indices[number]}" if number < len(indices) else f"{len(indices)} rows at most"
                raise SpecError(refusal(rule, f"line {number + 3}", line, str(self._path)))
            self.samples.append(sample)

    def _refuse_other(self, theirs: Mapping[str, Any], parameters: Mapping[str, Any]) -> None:
        for name in sorted({*theirs, *parameters}):
            if theirs.get(name) != parameters.get(name):
                rule = f"{name}={theirs.get(name)} as in {self._path}"
                reason = "a certification that goes on keeps its parameters"
                raise SpecError(refusal(rule, name, parameters.get(name), reason))


def parameters_of(model: TrainedModel, settings: CertificationSettings, every: int) -> dict[str, Any]:
    """What a row depends on: `batch` is not among them, and `limit` only says how many rows there are."""
    test = model.dataset.test
    return {
        "model_digest": model_digest(model.module),
        "data": f"{model.spec.data.name.value}: {describe_data(model.dataset)}",
        "labels_digest": _digest(test.labels),
        "samples": len(test.labels),
        **{name: getattr(settings, name) for name in ("noise_std", "n0", "n", "alpha", "seed")},
        "every": every,
        "device": "cpu" if model.device.type == "cpu" else torch.cuda.get_device_name(model.device),
    }


def read_parameters(path: Path) -> dict[str, Any]:
    """The parameters of a file's rows (see `parameters_of`).

    Raises:
        SpecError: another file, or none that can be read.
    """
    try:
        with path.open(encoding="utf-8", errors="replace") as stream:
            return _described(path, [stream.readline().rstrip("\n"), stream.readline().rstrip("\n")])
    except OSError as error:
        raise SpecError(refusal("a file that can be read", "out", path, error.strerror or str(error))) from None


def model_digest(module: nn.Module) -> str:
    """XXH3-128 of all parameters and buffers with their names, normalization constants included."""
    named = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    lines = [f"{name} {each.dtype} {list(each.shape)} {_digest(each)}\n" for name, each in sorted(named.items())]
    return xxhash.xxh3_128_hexdigest("".join(lines).encode())


def certify_samples(
    model: TrainedModel,
    settings: CertificationSettings,
    indices: Sequence[int],
    *,
    batch: int,
    file: CertificateFile | None,
    drawn: Callable[[int], None] = lambda _: None,
) -> list[CertifiedSample]:
    """Certifies samples of the test set, in order; those that are in the file are taken from there.

    Args:
        batch, drawn: see `certify`.

    Returns:
        One for each of `indices`.

    Raises:
        SpecError: the model does not fit the images, or the batch not into the device's memory.
        StorageError: the disk is full.
    """
    samples = list(file.samples[: len(indices)]) if file else []
    test = model.dataset.test
    for index in indices[len(samples) :]:
        begun_s = time.monotonic()
        image = test.images(torch.tensor([index]))[0].to(model.device)
        try:
            found = certify(model.module, image, settings, index=index, batch=batch, drawn=drawn)
        except torch.OutOfMemoryError:
            rule = "a batch that the device has memory for"
            raise SpecError(refusal(rule, "batch", batch, f"{model.device}, images {list(image.shape)}")) from None
        seconds = round(time.monotonic() - begun_s, 3)
        sample = CertifiedSample(index=index, label=int(test.labels[index]), certificate=found, seconds=seconds)
        if file:
            file.append(sample)
        samples.append(sample)
    return samples


def summarize(samples: Sequence[CertifiedSample], radii: Sequence[float]) -> dict[str, Any]:
    """What papers report; all are means over all samples, an abstention counts as wrong.

    Returns:
        `seconds`: of the samples, also in earlier processes; `smoothed_accuracy`: answered with their label;
        `abstained`: not answered; `average_certified_radius`: wrong answers and abstentions count as 0; `certified`:
        for each of `radii`, answered with their label and certified at least that far. Accuracies are fractions.
    """
    total = len(samples)
    return {
        "samples": total,
        "seconds": round(sum(sample.seconds for sample in samples), 3),
        "smoothed_accuracy": sum(sample.correct for sample in samples) / total,
        "abstained": sum(sample.certificate.predicted is None for sample in samples) / total,
        "average_certified_radius": sum(s.certificate.radius for s in samples if s.correct) / total,
        "certified": [
            {"radius": radius, "accuracy": sum(sample.certified_at(radius) for sample in samples) / total}
            for radius in radii
        ],
    }


def certified_curve(samples: Sequence[CertifiedSample]) -> tuple[list[float], list[float]]:
    """Certified accuracy against radius: radii from 0 up, and the accuracy at each; a step function.

    Between two radii the accuracy is that at the greater one; behind the last it is 0.
    """
    reached = sorted(sample.certificate.radius for sample in samples if sample.correct)
    radii = [0.0, *reached]
    return radii, [sum(radius >= each for radius in reached) / len(samples) for each in radii]


def _described(path: Path, lines: Sequence[str]) -> dict[str, Any]:
    """The parameters in a file's first line."""
    rule = "a file that datps certify has written"
    if len(lines) < 2 or not lines[0].startswith(_TITLE) or lines[1] != _HEADER:
        raise SpecError(refusal(rule, "out", path, "its first two lines"))
    try:
        return dict(json.loads(lines[0].removeprefix(_TITLE)))
    except (ValueError, TypeError) as error:
        raise SpecError(refusal(rule, "out", path, f"its first line: {error}")) from None


def _digest(tensor: Tensor) -> str:
    content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return xxhash.xxh3_128_hexdigest(content.numpy().data)
