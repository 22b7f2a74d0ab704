"""Carries a study out: one `datps` command after the other, each run in a folder; what is done is not done again."""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from common.errors import DatpsError, SpecError, refusal
from common.spec_sources import ENVIRONMENT_PREFIX, differences
from deploy import runs
from deploy.leash import leashed
from deploy.report.collect import read_certificates
from deploy.report.paper import RADII
from deploy.studies.plan import Run, StudySpec, Value, job_of, read_study, runs_of
from deploy.studies.table import (
    Figures,
    Line,
    Verdict,
    certified_figures,
    evaluation_figures,
    in_words,
    line_of,
    markdown,
    verdicts_of,
)
from worker.certificates import summarize

STUDY, TABLE, RESULT = "study.yaml", "table.md", "study.json"
_OF_RESULT = (
    *("clean_accuracy", "robust_accuracy", "seconds", "communication_seconds"),
    *("pushed_bytes_per_round", "pulled_bytes_per_round", "rounds", "parameters"),
)
"""Figures of a run's result.json that become columns."""
_SET_BY_INIT = ("transfer.init", "transfer.sha256")
"""Keys of the job that `datps train --init` fills in."""
CHOSEN_BY = "validation_robust_accuracy"
"""The figure that tuning looks at; never one of the test set."""


class Execute(Protocol):
    """Runs a command to its end, its output going to a file."""

    def __call__(self, command: Sequence[str], log: Path) -> int:
        """Returns its exit status."""
        ...


@dataclass(frozen=True, kw_only=True)
class Places:
    """What belongs to this machine, not to the study.

    Attributes:
        folder: of the study; its runs are in it.
        data: data folder, if the data set needs one.
        device: of the workers.
    """

    folder: Path
    data: Path | None = None
    device: str = "cpu"


def execute(command: Sequence[str], log: Path) -> int:
    """See `Execute`; without the `DATPS_*` variables, which would make it another study.

    Ctrl-C reaches the command as SIGTERM, and its end is waited for; a second one kills it.
    """
    environment = {key: value for key, value in os.environ.items() if not key.startswith(ENVIRONMENT_PREFIX)}
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        output.write(f"$ {shlex.join(command)}\n".encode())
        output.flush()
        process = subprocess.Popen(
            leashed(command),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
        try:
            return process.wait()
        except KeyboardInterrupt:
            process.terminate()
            process.wait()
            raise
        finally:
            process.kill()


class Study:
    """One study in one folder."""

    def __init__(
        self,
        text: str,
        name: str,
        places: Places,
        *,
        run_command: Execute = execute,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        """
        Args:
            text, name: the YAML document, and what error messages call it.
            places: where it is carried out.
            run_command: how commands are run.
            say: told of each step, in a line.

        Raises:
            SpecError: not a study, or the folder holds another one.
        """
        self.spec = read_study(text, name)
        self._text = text
        self._places = places
        self._execute = run_command
        self._say = say
        self._refuse_foreign_folder()

    def run(self) -> tuple[list[Line], list[Verdict]]:
        """Does what is not done yet; the table is written after every row.

        Raises:
            DatpsError: a command has failed; the message names it and its log.
            SpecError: another process is at work in the folder.
        """
        with self._claimed():
            return self._run()

    def _run(self) -> tuple[list[Line], list[Verdict]]:
        lines: list[Line] = []
        for _, group in itertools.groupby(runs_of(self.spec), key=lambda run: run.row):
            lines.append(self._line(list(group)))
            self._write(lines)
        return lines, verdicts_of(self.spec, lines)

    def _line(self, group: Sequence[Run]) -> Line:
        tuning: dict[tuple[tuple[str, Value], ...], list[Figures]] = {}
        for run in group:
            if run.candidate is not None:
                tuning.setdefault(run.candidate, []).append(self._figures(run, None))
        chosen = dict(_best(tuning)) if tuning else None
        by_seed = {run.seed: self._figures(run, chosen) for run in group if run.candidate is None}
        first = group[0]
        return line_of(first.row, first.base, first.point, by_seed, tuned=len(tuning), chosen=chosen)

    def _figures(self, run: Run, chosen: Mapping[str, Value] | None) -> Figures:
        """Trains the run and judges it, as far as that is not done."""
        folder = self._places.folder / run.folder
        self._train(run, chosen, folder)
        result = runs.read_result(folder) or {}
        figures = {name: float(result[name]) for name in _OF_RESULT if name in result}
        figures |= _validation(result)
        if run.candidate is None:
            for step in (self._evaluate, self._certify):
                figures |= step(folder)
        accuracies = {name: value for name, value in figures.items() if "accuracy" in name}
        shown = ", ".join(f"{name.replace('_', ' ')} {100 * value:.1f} %" for name, value in accuracies.items())
        self._say(f"{run.folder}: {shown}")
        return figures

    def _train(self, run: Run, chosen: Mapping[str, Value] | None, folder: Path) -> None:
        job = job_of(run, chosen)
        if (folder / runs.JOB).is_file():
            there, _ = runs.read_job(folder)
            for key, ours, theirs in differences(job, there):
                if key in _SET_BY_INIT:
                    continue
                rule = f"{key}={ours} as the study says (or remove the folder)"
                raise SpecError(refusal(rule, key, theirs, str(folder)))
            if runs.read_result(folder) is not None:
                return
        settings = [*run.settings, *(f"{key}={value}" for key, value in (chosen or {}).items())]
        command = ["train", "--recipe", run.recipe, *(part for each in settings for part in ("--set", each))]
        command += ["--out", str(folder), *self._models(run)]
        if runs.has_checkpoint(folder):
            command = ["train", "--resume", str(folder)]
        elif folder.exists():
            _empty(folder)
        self._command([*command, "--no-baseline", *self._device()], folder)

    def _models(self, run: Run) -> list[str]:
        """Flags for what other runs have trained."""
        flags = ["--init", str(self._places.folder / run.init)] if run.init else []
        if run.unlabeled:
            teacher = self._places.folder / run.unlabeled
            labels = teacher.with_name(f"{teacher.name}-pseudo-labels.safetensors")
            if not labels.is_file():
                self._command(
                    ["pseudo-label", str(teacher), "held-back", "--out", str(labels), *self._device()], teacher
                )
            flags += ["--unlabeled", str(labels)]
        return flags

    def _evaluate(self, folder: Path) -> Figures:
        if not self.spec.evaluate:
            return {}
        out = folder / "evaluation"
        attacks = [part for attack in self.spec.evaluate for part in ("--attack", attack)]
        limit = [] if self.spec.evaluate_images is None else ["--limit", str(self.spec.evaluate_images)]
        if not (out / "evaluation.json").is_file():
            self._command(["evaluate", str(folder), *attacks, *limit, "--out", str(out), *self._device()], folder)
        return evaluation_figures(json.loads((out / "evaluation.json").read_text()))

    def _certify(self, folder: Path) -> Figures:
        if not self.spec.certify:
            return {}
        out, done = folder / "certification.tsv", folder / "certification.done"
        flags = [part for key, value in self.spec.certify.items() for part in (f"--{key}", str(value))]
        if not done.is_file():
            self._command(["certify", str(folder), *flags, "--out", str(out), "--resume", *self._device()], folder)
            done.touch()
        return certified_figures(summarize(read_certificates(out), RADII))

    def _device(self) -> list[str]:
        data = [] if self._places.data is None else ["--data", str(self._places.data)]
        return [*data, "--device", self._places.device]

    def _command(self, arguments: Sequence[str], folder: Path) -> None:
        log = folder.with_name(f"{folder.name}.log")
        status = self._execute([sys.executable, "-m", "deploy.cli", *arguments], log)
        if status != 0:
            raise DatpsError(f"datps {arguments[0]} ended with {status}; {_last_line(log)} ({log})")

    def _refuse_foreign_folder(self) -> None:
        folder = self._places.folder
        foreign = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
        if foreign and not (folder / STUDY).is_file():
            rule = f"a new or empty folder, or one with {STUDY}"
            raise SpecError(refusal(rule, "out", folder, f"it holds {foreign[0]}"))

    @contextmanager
    def _claimed(self) -> Iterator[None]:
        """The folder is this study's, and meanwhile no other process's.

        A changed study may go on in it: runs are compared with jobs.
        """
        self._places.folder.mkdir(parents=True, exist_ok=True)
        with (self._places.folder / STUDY).open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                rule = "a folder that no other `datps study` is at work in"
                raise SpecError(refusal(rule, "out", self._places.folder)) from None
            file.truncate(0)
            file.write(self._text)
            file.flush()
            yield

    def _write(self, lines: Sequence[Line]) -> None:
        verdicts = verdicts_of(self.spec, lines)
        (self._places.folder / TABLE).write_text(document_of(self.spec, lines, verdicts))
        (self._places.folder / RESULT).write_text(as_json_text(self.spec, lines, verdicts))


def document_of(study: StudySpec, lines: Sequence[Line], verdicts: Iterable[Verdict]) -> str:
    """The table with its title and what was expected of it, in Markdown."""
    seeds = f"{len(study.seeds)} seeds" if len(study.seeds) > 1 else f"seed {study.seeds[0]}"
    said = "".join(f"- {in_words(verdict)}\n" for verdict in verdicts)
    about = f"{study.about.strip()}\n\n" if study.about else ""
    shown = [line if study.columns is None else _only(line, study.columns) for line in lines]
    return f"## {study.title}\n\n{about}{seeds}: mean (least to greatest).\n\n{markdown(shown)}\n{said}"


def as_json_text(study: StudySpec, lines: Sequence[Line], verdicts: Iterable[Verdict]) -> str:
    """Everything, for programs: fractions, seconds, bytes."""
    content = {
        "kind": "study",
        "study": study.model_dump(mode="json"),
        "lines": [asdict(line) for line in lines],
        "verdicts": [asdict(verdict) for verdict in verdicts],
    }
    return json.dumps(content, indent=1) + "\n"


def _only(line: Line, columns: Sequence[str]) -> Line:
    figures = {
        n: values for n, values in line.figures.items() if n in columns or n.endswith(" accuracy") or " at " in n
    }
    return Line(**{**asdict(line), "figures": figures})


def _validation(result: Mapping[str, Any]) -> Figures:
    best = result.get("best") or {}
    return {CHOSEN_BY: float(best[CHOSEN_BY])} if CHOSEN_BY in best else {}


def _best(tuning: Mapping[tuple[tuple[str, Value], ...], Sequence[Figures]]) -> tuple[tuple[str, Value], ...]:
    """The values whose runs did best on the validation split, on average; the first of equals."""
    for figures in itertools.chain(*tuning.values()):
        if CHOSEN_BY not in figures:
            raise SpecError(refusal("a validation split (data.validation) to tune on", CHOSEN_BY, "none"))
    return max(tuning, key=lambda candidate: statistics.mean(figures[CHOSEN_BY] for figures in tuning[candidate]))


def _empty(folder: Path) -> None:
    """Removes what an attempt without a checkpoint has left: `datps train` takes no such folder."""
    shutil.rmtree(folder)


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines() if log.is_file() else []
    return lines[-1][:300] if lines else "no output"
