"""`datps train`: one run of a local cluster, then the same without attacks as a baseline, in one run folder."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from common.config import AttackLoss, AttackName, AttackNorm, AttackSpec, CodecName, JobSpec, ObjectiveName, Split
from common.errors import EXIT_RETRY, PeerLostError, SpecError, refusal
from common.spec_sources import differences, load_job_spec
from common.timeline import merge
from deploy import runs
from deploy.cluster import Commands, DatpsCommands, LocalCluster, threads_per_worker
from deploy.display import Display
from deploy.progress import RunView
from deploy.smoke import FIRST, LABELS, files_for
from deploy.supervision import Outcome, Patience
from worker.local.devices import parse_devices
from worker.local_files import refuse_unfit_init, refuse_unfit_unlabeled, sha256_of

CommandsFactory = Callable[[JobSpec, Path, bool], Commands]
"""(job spec, run folder, resume) -> how the daemons are run."""


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """One call of `datps train`.

    Attributes:
        spec: the job.
        title: the recipe's or job file's name.
        folder: the run folder; it exists.
        resume: go on with the run in `folder`.
        data: data folder of all workers.
        download: fetch the data set into `data` first.
        unlabeled: file of pseudo-labeled images, of all workers.
        init: what all workers start from; of a resumed run only the baseline may still need it.
        device: of the workers.
        devices: several of each worker instead, `cuda:0,cuda:1` or `cpu:2`; all workers get the same ones.
        baseline: train without attacks, too.
        trace: write the timeline of all processes to trace.json.
        first: of a smoke run, the job that makes what it starts from.
    """

    spec: JobSpec
    title: str
    folder: Path
    resume: bool = False
    data: Path | None = None
    download: bool = False
    device: str = "cpu"
    devices: str | None = None
    unlabeled: Path | None = None
    init: Path | None = None
    baseline: bool = True
    trace: bool = False
    first: JobSpec | None = None


def train(
    options: TrainOptions,
    display: Display,
    *,
    commands: CommandsFactory | None = None,
    patience: Patience | None = None,
) -> Outcome:
    """Trains, then trains the baseline; what an earlier run in the folder has completed is not done again.

    Args:
        options: what and where.
        display: told of everything.
        commands: how daemons are run; those of this installation if None.
        patience: deadlines; the usual ones if None.

    Raises:
        DatpsError: the data set cannot be fetched, or result.json is damaged.
    """
    if options.first is not None:
        options = _with_first(options, display, commands)
    run = _Run(options, display, commands or _datps_commands(options), patience)
    if options.download:
        _download(options)
    result = runs.read_result(options.folder)
    if result is None:
        outcome = run.cluster(options.spec, options.folder, options.title, resume=options.resume)
        if options.trace:
            merge((options.folder / runs.TRACES).glob("*.json"), options.folder / runs.TRACE)
        if outcome.exit_code != 0:
            return outcome
        result = runs.read_result(options.folder)
        if result is None:
            return Outcome(exit_code=EXIT_RETRY, text=f"worker-0 is complete, but there is no {runs.RESULT}")
    else:
        display.say("complete", f"{options.folder} is complete: {result.get('rounds')} rounds")
    failure = None
    if options.baseline and runs.BASELINE not in result and options.spec.attack.name is not AttackName.NONE:
        failure = run.baseline()
        result = runs.read_result(options.folder) or result
    display.result(options.title, str(options.folder), result, robust_name(options.spec))
    return failure or Outcome(exit_code=0, text="complete")


def _with_first(options: TrainOptions, display: Display, commands: CommandsFactory | None) -> TrainOptions:
    """Trains what a smoke run starts from; the options with its files.

    Raises:
        DatpsError: that training has failed.
    """

    def train_first(folder: Path) -> None:
        assert options.first is not None
        folder.mkdir()
        first = replace(options, spec=options.first, folder=folder, first=None, baseline=False, trace=False)
        outcome = train(replace(first, title=f"{options.title}, what comes first"), display, commands=commands)
        if outcome.exit_code != 0:
            raise PeerLostError(f"{folder}: {outcome.text}")

    unlabeled, init = files_for(options.spec, options.folder, train_first)
    spec = with_local_files(options.spec, unlabeled=unlabeled, init=init)
    return replace(options, spec=spec, unlabeled=unlabeled, init=init, first=None)


def job_to_resume(
    folder: Path, *, settings: Sequence[str], environment: Mapping[str, str], reserved: frozenset[str]
) -> tuple[JobSpec, str]:
    """The job of the run in `folder`, which is complete or can go on, and its title.

    Raises:
        SpecError: no run folder, nothing to go on from, or settings that would make it another job.
    """
    spec, title = runs.read_job(folder)
    wanted = load_job_spec(
        yaml_text=spec.to_yaml(), yaml_name=runs.JOB, environment=environment, settings=settings, reserved=reserved
    )
    for key, ours, theirs in differences(spec, wanted):
        rule = f"{key}={ours} as in {folder / runs.JOB}"
        raise SpecError(refusal(rule, key, theirs, "a resumed run keeps its job"))
    if runs.read_result(folder) is None and not runs.has_checkpoint(folder):
        raise SpecError(refusal("a run folder with checkpoints", "resume", folder, "none found"))
    return spec, title


def command_to_resume(options: TrainOptions) -> str:
    """What goes on with the run, as a shell takes it: the job is in the folder, what belongs to this machine is not."""
    spec, first = options.spec, options.first is not None
    unlabeled = options.folder / LABELS if first and spec.data.unlabeled_fraction else options.unlabeled
    init = options.folder / FIRST if first and spec.transfer.init else options.init
    flags: dict[str, object] = {
        "--data": options.data,
        "--unlabeled": unlabeled,
        "--init": init if options.baseline else None,  # the run itself goes on from its checkpoint
        "--devices": options.devices,
        "--device": None if options.devices or options.device == "cpu" else options.device,
    }
    given = [part for flag, value in flags.items() if value is not None for part in (flag, str(value))]
    baseline = [] if options.baseline else ["--no-baseline"]
    return shlex.join(["datps", "train", "--resume", str(options.folder), *given, *baseline])


def with_local_files(spec: JobSpec, *, unlabeled: Path | None, init: Path | None) -> JobSpec:
    """The job of a new run, which says what the content of its files is.

    Raises:
        SpecError: a file that the job has no use for, one that it lacks, or another one than it names.
        DataError: no file of pseudo-labeled images.
    """
    refuse_unfit_unlabeled(spec.data, unlabeled)
    refuse_unfit_init(spec.transfer, init)
    return _with_init(_with_unlabeled(spec, unlabeled), init)


def _with_unlabeled(spec: JobSpec, unlabeled: Path | None) -> JobSpec:
    """Names the file that all workers share; with data of their own, each is free to have another one."""
    if unlabeled is None or spec.data.split is not Split.SHARED:
        return spec
    from worker.pseudo_labels import digest_as_named, load_pseudo_labels

    digest = digest_as_named(load_pseudo_labels(unlabeled), spec.data, unlabeled)
    return spec.model_copy(update={"data": spec.data.model_copy(update={"unlabeled_digest": digest})})


def _with_init(spec: JobSpec, init: Path | None) -> JobSpec:
    if init is None:
        return spec
    from worker.pretrained import weights_file

    file = weights_file(init)
    sha256 = sha256_of(file)
    if spec.transfer.sha256 not in (None, sha256):
        raise SpecError(
            refusal(f"a file with sha256 {spec.transfer.sha256} (transfer.sha256)", "sha256", sha256, str(file))
        )
    return spec.model_copy(update={"transfer": spec.transfer.model_copy(update={"sha256": sha256})})


def baseline_spec(spec: JobSpec) -> JobSpec:
    """The same training without attacks, judged once, at its end, by the same attack."""
    sections = spec.model_dump(mode="json")
    sections["attack"] |= {"name": AttackName.NONE.value, "replays": 1}
    sections["objective"]["name"] = ObjectiveName.ADVERSARIAL.value
    sections["overfitting"]["check_every_epochs"] = 0
    sections["evaluation"]["attack"]["epsilon"] = spec.evaluation_attack.epsilon
    sections["evaluation"] |= {"every_epochs": 0, "patience": None}
    return JobSpec.model_validate(sections)


def in_words(spec: JobSpec) -> str:
    """The job in one line."""
    codec = spec.codec
    bits = f"{codec.bits}-bit " if codec.name in (CodecName.RANDOMIZED, CodecName.PAPER) else ""
    ways = "both ways" if codec.two_sided else "one way"
    return f"{spec.model.name} on {spec.data.name}, {_method(spec)}, {_optimizer(spec)}, {bits}{codec.name} {ways}"


def _method(spec: JobSpec) -> str:
    """Attack, smoothing and objective."""
    attack, smoothing = spec.attack, spec.smoothing
    parts = ["no attack"]
    if attack.name is not AttackName.NONE:
        parts = [f"{attack.name} epsilon {_epsilon(attack)}"]
        parts += [f"{attack.steps} steps"] * (attack.name is AttackName.PGD)
        parts += [f"{attack.replays} replays"] * (attack.replays > 1)
        parts += ["KL"] * (attack.loss is AttackLoss.KL)
        parts += [f"epsilon warm-up {attack.warmup:.3g}"] * (attack.warmup > 0)
    parts += [f"noise {smoothing.noise_std:g}"] * (smoothing.noise_std > 0)
    parts += [f"{smoothing.samples} copies"] * (smoothing.samples > 1)
    parts += [f"TRADES beta {spec.objective.beta:g}"] * (spec.objective.name is ObjectiveName.TRADES)
    return ", ".join(parts)


def _optimizer(spec: JobSpec) -> str:
    """Its name, and the learning rate if that is scaled: `sgd at 0.8 (0.1 for 256 samples)`."""
    optimizer = spec.optimizer
    if optimizer.base_batch is None:
        return optimizer.name.value
    scaled = f"{spec.peak_learning_rate:g} ({optimizer.learning_rate:g} for {optimizer.base_batch} samples)"
    return f"{optimizer.name} at {scaled}"


def robust_name(spec: JobSpec) -> str:
    """The evaluation attack in short: `PGD-20, epsilon 8/255`."""
    return f"PGD-{spec.evaluation_attack.steps}, epsilon {_epsilon(spec.evaluation_attack)}"


@dataclass(frozen=True)
class _Run:
    """What the clusters of one call have in common."""

    options: TrainOptions
    display: Display
    commands: CommandsFactory
    patience: Patience | None

    def cluster(self, spec: JobSpec, folder: Path, title: str, *, resume: bool) -> Outcome:
        """Runs one job in one folder."""
        if not resume:
            runs.write_job(folder, spec, title)
        self.display.open(RunView(title=title, job=in_words(spec), folder=str(folder)))
        commands = self.commands(spec, folder, resume)
        return LocalCluster(
            spec=spec, folder=folder, commands=commands, observe=self.display.observe, patience=self.patience
        ).run()

    def baseline(self) -> Outcome | None:
        """Trains without attacks and adds the accuracies to the result; returns how it failed, if it did."""
        folder = self.options.folder / runs.BASELINE
        resume = runs.has_checkpoint(folder)
        if folder.exists() and not resume:
            shutil.rmtree(folder)  # an earlier start of the baseline that saved nothing
        folder.mkdir(exist_ok=True)
        result = runs.read_result(folder)
        if result is None:
            spec = baseline_spec(self.options.spec)
            title = f"{self.options.title}, baseline without attacks"
            outcome = self.cluster(spec, folder, title, resume=resume)
            if outcome.exit_code != 0:
                return replace(outcome, text=f"baseline: {outcome.text}")
            result = runs.read_result(folder)
        if result is None:
            return Outcome(exit_code=EXIT_RETRY, text=f"baseline: worker-0 is complete, but there is no {runs.RESULT}")
        runs.add_baseline(self.options.folder, result)
        return None


def _datps_commands(options: TrainOptions) -> CommandsFactory:
    processes = len(parse_devices(options.devices)) if options.devices else 1

    def commands(spec: JobSpec, folder: Path, resume: bool) -> Commands:
        return DatpsCommands(
            spec=spec,
            folder=folder,
            data=options.data,
            device=options.device,
            devices=options.devices,
            unlabeled=options.unlabeled,
            init=options.init,
            threads=threads_per_worker(spec.workers * processes),
            resume=resume,
            trace=options.trace and folder == options.folder,
        )

    return commands


def _download(options: TrainOptions) -> None:
    """Once, here: several workers that fetch into one folder would meet half a file."""
    from worker.datasets import load_dataset

    load_dataset(options.spec.data, root=options.data, download=True)


def _epsilon(attack: AttackSpec) -> str:
    """As papers write it: `8/255` for small ones; the norm where it is not the usual one."""
    pixels = round(attack.epsilon * 255, 9)
    epsilon = f"{pixels:.0f}/255" if 0 < pixels < 26 and pixels == int(pixels) else f"{attack.epsilon:g}"
    return epsilon if attack.norm is AttackNorm.LINF else f"{epsilon} ({attack.norm})"
