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
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

from common.codecs.checks import FINITE_VALUE
from common.config import JobSpec
from common.errors import EXIT_MISMATCH, DatpsError, SpecError, StorageError, refusal
from common.spec_sources import ENVIRONMENT_PREFIX, differences
from deploy import runs
from deploy.leash import leashed
from deploy.studies import figures
from deploy.studies.demands import RESULT, STUDY, TABLE
from deploy.studies.figures import CHOSEN_BY, DIVERGED, Figures
from deploy.studies.judging import Certification, certification_settings, evaluation_figures
from deploy.studies.plan import Run, StudySpec, Value, job_of, read_study, runs_of, settings_of
from deploy.studies.sources import are_labels_of, refuse_other_init, refuse_other_labels
from deploy.studies.table import Line, Verdict, in_words, line_of, markdown, verdicts_of

_SET_BY_FILES = ("transfer.init", "transfer.sha256", "data.unlabeled_digest")
"""Keys of the job that `datps train` fills in, of the files that it is given (--init, --unlabeled)."""
_DIVERGENCE = "diverged.txt"
"""In the folder of a run that tunes: its gradient was not finite any more, and what was said of it."""


class CommandError(DatpsError):
    """A command of the study has failed; its exit code is ours."""

    def __init__(self, text: str, status: int) -> None:
        """`status`: as `subprocess` tells it, below 0 that of a signal."""
        super().__init__(text)
        self.exit_code = status if status >= 0 else 128 - status


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

    Ctrl-C (in `datps study` SIGTERM, too) reaches the command as SIGTERM, and its end is waited for; a second one
    kills it.
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
        if self.spec.certify:
            for run in runs_of(self.spec):
                certification_settings(self.spec.certify, job_of(run))
        self._refuse_foreign_folder()

    def run(self) -> tuple[list[Line], list[Verdict]]:
        """Does what is not done yet; the table is written after every row.

        Raises:
            CommandError: a command has failed; the message names it and its log.
            SpecError: another process is at work in the folder, or there is what the study has not made.
            StorageError: the disk is full.
        """
        with self._claimed():
            try:
                return self._run()
            except OSError as error:
                rule = "files that can be read and written"
                raise StorageError(refusal(rule, "out", self._places.folder, str(error))) from None

    def _run(self) -> tuple[list[Line], list[Verdict]]:
        lines: list[Line] = []
        for _, group in itertools.groupby(runs_of(self.spec), key=lambda run: run.row):
            lines.append(self._line(list(group)))
            self._write(lines)
        return lines, verdicts_of(self.spec, lines)

    def _line(self, group: Sequence[Run]) -> Line:
        tuning: dict[tuple[tuple[str, Value], ...], dict[str, Figures]] = {}
        for run in group:
            if run.candidate is not None:
                tuning.setdefault(run.candidate, {})[run.folder] = self._figures(run, None)
        chosen = dict(_best(tuning)) if tuning else None
        by_seed = {run.seed: self._figures(run, chosen) for run in group if run.candidate is None}
        first, diverged = group[0], sum(DIVERGED in of.values() for of in tuning.values())
        return line_of(first.row, first.base, first.point, by_seed, tuned=len(tuning), diverged=diverged, chosen=chosen)

    def _figures(self, run: Run, chosen: Mapping[str, Value] | None) -> Figures:
        """Trains the run and judges it, as far as that is not done."""
        folder, job = self._places.folder / run.folder, job_of(run, chosen)
        if not self._train(run, settings_of(run, chosen), job, folder):
            self._say(f"{run.folder}: diverged")
            return DIVERGED
        result = runs.read_result(folder) or {}
        found = dict(figures.of_result(result))
        if run.candidate is None:
            found |= self._evaluate(folder, result.get("parameter_digest"))
            found |= self._certify(folder, job)
        accuracies = {name: value for name, value in found.items() if "accuracy" in name}
        shown = ", ".join(f"{name.replace('_', ' ')} {100 * value:.1f} %" for name, value in accuracies.items())
        self._say(f"{run.folder}: {shown}")
        return found

    def _train(self, run: Run, settings: Sequence[str], job: JobSpec, folder: Path) -> bool:
        """Whether it came to its end: a run that tunes may diverge, and is no good then."""
        complete = self._is_complete(run, job, folder)
        divergence = folder / _DIVERGENCE
        labels = self._labels(run)
        if labels:
            refuse_other_labels(folder, labels)
        if complete:
            return not divergence.exists()
        if runs.has_checkpoint(folder):
            command = ["train", "--resume", str(folder)]  # parameters to start from are none of its business any more
        else:
            if folder.exists():
                _empty(folder)
            command = ["train", "--recipe", run.recipe, *(part for each in settings for part in ("--set", each))]
            command += ["--out", str(folder), *(["--init", str(self._places.folder / run.init)] if run.init else [])]
        command += ["--unlabeled", str(labels)] if labels else []
        try:
            self._command([*command, "--no-baseline", *self._device()], folder)
        except CommandError as error:
            if (
                run.candidate is None
                or error.exit_code != EXIT_MISMATCH
                or f"expected {FINITE_VALUE}" not in str(error)
            ):
                raise
            divergence.write_text(f"{error}\n", encoding="utf-8")
            return False
        return True

    def _is_complete(self, run: Run, job: JobSpec, folder: Path) -> bool:
        """Whether there is nothing left to train.

        Raises:
            SpecError: the folder has another job's run, or one from other parameters.
        """
        if not (folder / runs.JOB).is_file():
            return False
        there, _ = runs.read_job(folder)
        for key, ours, theirs in differences(job, there):
            if key in _SET_BY_FILES:
                continue
            rule = f"{key}={ours} as the study says (or remove the folder)"
            raise SpecError(refusal(rule, key, theirs, str(folder)))
        if run.init and (runs.has_checkpoint(folder) or (folder / runs.RESULT).exists()):
            refuse_other_init(folder, there, self._places.folder / run.init)
        return runs.read_result(folder) is not None or (folder / _DIVERGENCE).exists()

    def _labels(self, run: Run) -> Path | None:
        """The file of pseudo-labels that a run needs; made anew if its teacher has been trained anew."""
        if run.unlabeled is None:
            return None
        teacher = self._places.folder / run.unlabeled
        labels = teacher.with_name(f"{teacher.name}-pseudo-labels.safetensors")
        if labels.is_file() and not are_labels_of(labels, teacher):
            labels.unlink()
        if not labels.is_file():
            self._command(["pseudo-label", str(teacher), "held-back", "--out", str(labels), *self._device()], teacher)
        return labels

    def _evaluate(self, folder: Path, parameter_digest: str | None) -> Figures:
        if not self.spec.evaluate:
            return {}
        out, images = folder / "evaluation", self.spec.evaluate_images
        asked = out / "evaluation.json", self.spec.evaluate, images, parameter_digest
        found = evaluation_figures(*asked)
        if found is None:
            attacks = [part for attack in self.spec.evaluate for part in ("--attack", attack)]
            limit = [] if images is None else ["--limit", str(images)]
            self._command(["evaluate", str(folder), *attacks, *limit, "--out", str(out), *self._device()], folder)
            found = evaluation_figures(*asked)
        if found is None:
            rule = "an evaluation of the run's model by all attacks (or remove the folder)"
            raise SpecError(refusal(rule, "evaluation", out))
        return found

    def _certify(self, folder: Path, job: JobSpec) -> Figures:
        if not self.spec.certify:
            return {}
        certification = Certification(folder, self.spec.certify, job)
        found = certification.figures()
        if found is None:
            self._command(["certify", str(folder), *certification.flags, *self._device()], folder)
            found = certification.figures()
        if found is None:
            raise SpecError(refusal("certificates of all samples", "file", certification.file))
        return found

    def _device(self) -> list[str]:
        data = [] if self._places.data is None else ["--data", str(self._places.data)]
        return [*data, "--device", self._places.device]

    def _command(self, arguments: Sequence[str], folder: Path) -> None:
        log = folder.with_name(f"{folder.name}.log")
        status = self._execute([sys.executable, "-m", "deploy.cli", *arguments], log)
        if status != 0:
            ended = f"ended with {status}" if status > 0 else f"was ended by signal {-status}"
            raise CommandError(f"datps {arguments[0]} {ended}; {_last_line(log)} ({log})", status)

    def _refuse_foreign_folder(self) -> None:
        folder = self._places.folder
        try:
            foreign = sorted(entry.name for entry in folder.iterdir()) if folder.exists() else []
        except OSError as error:
            raise _unusable(folder, error) from None
        if foreign and not (folder / STUDY).is_file():
            rule = f"a new or empty folder, or one with {STUDY}"
            raise SpecError(refusal(rule, "out", folder, f"it holds {foreign[0]}"))

    @contextmanager
    def _claimed(self) -> Iterator[None]:
        """The folder is this study's, and meanwhile no other process's.

        A changed study may go on in it: runs are compared with jobs.
        """
        folder = self._places.folder
        with ExitStack() as claim:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                file = claim.enter_context((folder / STUDY).open("a", encoding="utf-8"))
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                file.truncate(0)
                file.write(self._text)
                file.flush()
            except BlockingIOError:
                raise SpecError(refusal("a folder that no other `datps study` is at work in", "out", folder)) from None
            except OSError as error:
                raise _unusable(folder, error) from None
            yield

    def _write(self, lines: Sequence[Line]) -> None:
        verdicts = verdicts_of(self.spec, lines)
        (self._places.folder / TABLE).write_text(document_of(self.spec, lines, verdicts), encoding="utf-8")
        (self._places.folder / RESULT).write_text(as_json_text(self.spec, lines, verdicts), encoding="utf-8")


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


def _best(tuning: Mapping[tuple[tuple[str, Value], ...], Mapping[str, Figures]]) -> tuple[tuple[str, Value], ...]:
    """The values whose runs did best on the validation split, on average; the first of equals.

    `tuning`: figures by candidate and by the run's folder.

    Raises:
        SpecError: a run does not say how its last model did there, or a run of each candidate has diverged.
    """
    untold = [folder for of in tuning.values() for folder, found in of.items() if CHOSEN_BY not in found]
    if untold:
        rule = f"{CHOSEN_BY} of the last model (remove these folders: their runs are trained again)"
        raise SpecError(refusal(rule, "result", ", ".join(untold), "an earlier version told the best model's only"))
    means = {values: statistics.mean(found[CHOSEN_BY] for found in of.values()) for values, of in tuning.items()}
    best = max(means, key=means.__getitem__)
    if DIVERGED in tuning[best].values():
        rule = "values to choose from with which no training diverges"
        raise SpecError(refusal(rule, "tune", ", ".join(folder for of in tuning.values() for folder in of)))
    return best


def _unusable(folder: Path, error: OSError) -> SpecError:
    return SpecError(refusal("a folder that can be made and written", "out", folder, error.strerror or str(error)))


def _empty(folder: Path) -> None:
    """Removes what an attempt without a checkpoint has left: `datps train` takes no such folder."""
    shutil.rmtree(folder)


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines() if log.is_file() else []
    return lines[-1][:300] if lines else "no output"
