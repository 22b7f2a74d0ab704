"""What a report knows of each run: its job, its rounds, its evaluations and certificates, read from its folder."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.config import AttackName, CodecName, JobSpec, OptimizerName, Topology
from common.errors import SpecError, refusal
from deploy import runs
from deploy.report.judged import Judged, read_judged
from deploy.smoke import FIRST
from worker.certificates import CertifiedSample

ROUNDS, EVALUATIONS, EVALUATION = "rounds.jsonl", "evaluations.jsonl", "evaluation.json"
TUNING = "tune-"
"""What the names of a study's folders begin with that hold the runs of its tuning."""
CERTIFICATES = "# datps certify "
"""What a file of certificates begins with."""
PHASES = ("attack_s", "compute_s", "communication_s", "evaluation_s")
"""Phases of a round, by their names in rounds.jsonl."""
_OF_ROUND, _OF_EVALUATION = ("epoch", "round_s", *PHASES), ("epoch", "clean_accuracy", "robust_accuracy")


@dataclass(frozen=True, kw_only=True)
class Certificates:
    """A file of certificates.

    Attributes:
        samples: those that are certified so far.
        planned: how many there are to certify without `--limit`; None where the file does not say it.
    """

    samples: Sequence[CertifiedSample]
    planned: int | None

    @property
    def counted(self) -> str:
        """`60`, or `12 of 60` where it is not the whole."""
        done = len(self.samples)
        return str(done) if self.planned in (None, done) else f"{done} of {self.planned}"


@dataclass(frozen=True, kw_only=True)
class RunData:
    """One run.

    Attributes:
        folder: where it is.
        title: the recipe's or job file's name.
        spec: its job.
        result: of result.json; None of a run that is not complete.
        rounds: lines of rounds.jsonl.
        evaluations: (epoch, TA, RA) in order, fractions.
        evaluated_on: the data of those, `test` or `validation`.
        judged: of each evaluation.json in the folder.
        certified: each file of certificates in the folder, by its path there.
    """

    folder: Path
    title: str
    spec: JobSpec
    result: Mapping[str, Any] | None
    rounds: Sequence[Mapping[str, Any]]
    evaluations: Sequence[tuple[float, float, float]]
    evaluated_on: str = "test"
    judged: Sequence[Judged] = ()
    certified: Mapping[str, Certificates] = field(default_factory=dict)

    @property
    def batch(self) -> int:
        """M * B, samples per round."""
        return self.spec.workers * self.spec.data.batch_per_worker

    @property
    def epochs(self) -> float:
        """Epochs that are done."""
        return float(self.rounds[-1]["epoch"]) if self.rounds else 0.0

    def seconds(self, phase: str) -> float:
        """Sum of a phase over the rounds."""
        return float(sum(line[phase] for line in self.rounds))


def collect(paths: Iterable[Path]) -> list[RunData]:
    """The runs in these folders, each a run folder or one that holds some, such as a study's.

    What only prepares another run is left out: a study's tuning, a baseline, the first training of a smoke run.

    Raises:
        SpecError: a folder without any run, or a run whose files are damaged.
    """
    found: dict[Path, RunData] = {}
    for path in paths:
        folders = list(_run_folders(path))
        if not folders:
            reason = f"no {runs.JOB} in it, but for folders {TUNING}*, {FIRST} and {runs.BASELINE}"
            raise SpecError(refusal("a run folder, or a folder of them", "run", path, reason))
        for folder in folders:
            found.setdefault(folder.resolve(), _read(folder))
    return list(found.values())


def method_of(spec: JobSpec) -> str:
    """What the paper calls such a training: `DAT-PGD`, `Fast AT`, `DAT-FGSM w/o LALR`, `Smooth-DAT`, ..."""
    if spec.attack.name is AttackName.NONE:
        return "no attack"
    one_step, alone = spec.attack.name is AttackName.FGSM, spec.workers == 1
    if spec.smoothing.noise_std:
        return "Smooth-AT" if alone else "Smooth-DAT"
    if alone:
        name = "Fast AT" if one_step else "AT"
    elif spec.optimizer.name is OptimizerName.SGD and spec.optimizer.base_batch is not None:
        name = "DAT-LSGD"
    else:
        name = "DAT-FGSM" if one_step else "DAT-PGD"
        name += " w/o LALR" if spec.optimizer.name in (OptimizerName.SGD, OptimizerName.ADAMW) else ""
    if spec.data.unlabeled_fraction:
        name = f"Semi-supervised {name}"
    return f"{name}, fine-tuned" if spec.transfer.init else name


def communication_of(spec: JobSpec) -> str:
    """As Table 4 has it: `8 bits 2-sided`, `32 bits, HPC`."""
    codec = spec.codec
    bits = {CodecName.NONE: 32, CodecName.FP16: 16, CodecName.BF16: 16, CodecName.SIGN: 1}.get(codec.name, codec.bits)
    words = f"{bits} bit{'s' if bits > 1 else ''}"
    if codec.name is CodecName.TOPK:
        words = f"{100 * codec.density:.3g} % of the elements"
    if codec.two_sided:
        words += " 2-sided"
    if spec.exchange.topology is Topology.COLLECTIVE:
        words += ", HPC" if codec.name is CodecName.NONE else ", ring"
    return words


def _run_folders(path: Path) -> Iterator[Path]:
    if (path / runs.JOB).is_file():
        yield path
        return
    for job in sorted(path.rglob(runs.JOB)):
        parts = job.parent.relative_to(path).parts
        tunes = any(part.startswith(TUNING) for part in parts)
        # a row of a study may be called `first`; its runs are in folders of their own in it
        if not tunes and parts[-1] != FIRST and runs.BASELINE not in parts:
            yield job.parent


def _read(folder: Path) -> RunData:
    spec, title = runs.read_job(folder)
    try:
        evaluations = _lines(folder / EVALUATIONS, _OF_EVALUATION)
        kinds = {line.get("data", "validation" if spec.data.validation else "test") for line in evaluations}
        return RunData(
            folder=folder,
            title=title,
            spec=spec,
            result=runs.read_result(folder),
            rounds=_lines(folder / ROUNDS, _OF_ROUND),
            evaluations=[(line["epoch"], line["clean_accuracy"], line["robust_accuracy"]) for line in evaluations],
            evaluated_on=" and ".join(sorted(kinds)) or "test",
            judged=[read_judged(path) for path in _own(folder, EVALUATION)],
            certified={
                str(path.relative_to(folder)): Certificates(samples=read_certificates(path), planned=_planned(path))
                for path in _own(folder, "*.tsv")
                if _text(path).startswith(CERTIFICATES)
            },
        )
    except OSError as error:
        raise SpecError(refusal("files that can be read", "run", folder, str(error))) from None


def _own(folder: Path, pattern: str) -> Iterator[Path]:
    """The files of a run, without those of runs that are in its folder, such as its baseline."""
    for path in sorted(folder.rglob(pattern)):
        between = path.relative_to(folder).parents
        if not any((folder / each / runs.JOB).is_file() for each in between if each.parts):
            yield path


def read_certificates(path: Path) -> list[CertifiedSample]:
    """The samples in a file of `datps certify`, but for a last one that is cut off.

    Raises:
        SpecError: a damaged line.
    """
    lines = [line for line in _text(path).split("\n")[:-1] if not line.startswith("#")][1:]
    try:
        return [CertifiedSample.of_line(line) for line in lines]
    except ValueError as error:
        raise SpecError(refusal("rows of certificates", "file", path, str(error))) from None


def _planned(path: Path) -> int | None:
    """How many samples the whole certification has, by the first line of its file; None where that is cut off."""
    try:
        parameters = json.loads(_text(path).partition("\n")[0].removeprefix(CERTIFICATES))
        return len(range(0, parameters["samples"], parameters["every"]))
    except (ValueError, KeyError, TypeError):
        return None


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


def _lines(path: Path, keys: Sequence[str]) -> list[Mapping[str, Any]]:
    """The lines of a file of JSON lines, each with these keys, but for a last one that is cut off."""
    if not path.is_file():
        return []
    lines: list[Mapping[str, Any]] = []
    texts = _text(path).splitlines()
    for number, text in enumerate(texts):
        try:
            line = json.loads(text)
        except ValueError:
            if number == len(texts) - 1:
                break
            raise SpecError(refusal("lines of JSON", "line", number + 1, str(path))) from None
        if not isinstance(line, dict) or any(not isinstance(line.get(key), int | float) for key in keys):
            raise SpecError(refusal(f"lines with numbers {', '.join(keys)}", "line", number + 1, str(path)))
        lines.append(line)
    return lines
