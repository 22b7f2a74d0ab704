"""What `datps evaluate` and `datps certify` have left of a run, if it is what a study asks for now."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from common.config import JobSpec
from deploy.report.collect import read_certificates
from deploy.report.paper import RADII
from deploy.studies import figures
from deploy.studies.figures import Figures
from deploy.studies.plan import CertifySpec
from worker.certificates import read_parameters, summarize
from worker.certification import CertificationSettings


def evaluation_figures(
    file: Path, attacks: Sequence[str], images: int | None, parameter_digest: str | None
) -> Figures | None:
    """The figures in an evaluation.json.

    Args:
        file: may be missing.
        attacks: that are asked for; it may have more.
        images: how many test images; None for all.
        parameter_digest: of the model; None if nobody knows.

    Returns:
        None if it is cut off, or the answer to another question: `datps evaluate` writes it anew, and does only what it
        has not done before.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        known = parameter_digest is not None and "parameter_digest" in content
        if known and content["parameter_digest"] != parameter_digest:
            return None
        if content["samples"] != (content["test_samples"] if images is None else images):
            return None
        return figures.of_evaluation(content, attacks)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


class Certification:
    """The certificates of one run; each choice of parameters has a file, `certification.tsv`, `certification-2.tsv`."""

    def __init__(self, folder: Path, wanted: CertifySpec, job: JobSpec) -> None:
        """Finds the file with these parameters, or a name for it.

        Args:
            folder: of the run.
            wanted: what the study says.
            job: of the run.

        Raises:
            SpecError: numbers that certify nothing, or a file of somebody else.
        """
        self._wanted = wanted
        settings = certification_settings(wanted, job)
        self._parameters = {name: getattr(settings, name) for name in ("noise_std", "n0", "n", "alpha", "seed")}
        self._parameters["every"] = wanted.every
        self.file = next(file for file in _names(folder) if self._is_ours(file))

    @property
    def flags(self) -> list[str]:
        """All flags of `datps certify` but those of this machine; what is in the file is not done again."""
        values: dict[str, Any] = {name: value for name, value in self._parameters.items() if name != "seed"}
        values |= {"limit": self._wanted.limit, "batch": self._wanted.batch}
        given = [(name, value) for name, value in values.items() if value is not None]
        flags = [part for name, value in given for part in (f"--{name.replace('_', '-')}", str(value))]
        return [*flags, "--out", str(self.file), "--resume"]

    def figures(self) -> Figures | None:
        """None as long as samples are missing.

        Raises:
            SpecError: the file is damaged.
        """
        if not _has_content(self.file):
            return None
        every = range(0, read_parameters(self.file)["samples"], self._wanted.every)
        samples = read_certificates(self.file)[: self._wanted.limit]
        if len(samples) < len(every[: self._wanted.limit]):
            return None
        return figures.of_certificates(summarize(samples, RADII))

    def _is_ours(self, file: Path) -> bool:
        if not _has_content(file):
            return True
        theirs = read_parameters(file)
        return all(theirs.get(name) == value for name, value in self._parameters.items())


def certification_settings(wanted: CertifySpec, job: JobSpec) -> CertificationSettings:
    """What the certificates of a run's model depend on.

    Raises:
        SpecError: numbers that certify nothing.
    """
    noise_std = job.smoothing.noise_std if wanted.noise_std is None else wanted.noise_std
    return CertificationSettings(noise_std=noise_std, n0=wanted.n0, n=wanted.n, alpha=wanted.alpha, seed=job.seed)


def _names(folder: Path) -> Iterator[Path]:
    return (folder / f"certification{'' if number == 1 else f'-{number}'}.tsv" for number in itertools.count(1))


def _has_content(file: Path) -> bool:
    return file.is_file() and file.stat().st_size > 0
