"""`datps certify`: certified accuracy of a smoothed model, sample by sample."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from common.config import JobSpec
from common.errors import SpecError, refusal
from deploy.evaluation_cli import ModelArgument, WeightsOption
from deploy.options import (
    RESERVED,
    DataOption,
    DeviceOption,
    JsonOption,
    SetOption,
    ThreadsOption,
    errors,
    print_pairs,
)

if TYPE_CHECKING:
    from worker.certificates import CertificateFile, CertifiedSample
    from worker.certification import CertificationSettings
    from worker.trained import TrainedModel

RADII = "0.05,0.1,0.15,0.2,0.3,0.4,0.5"
"""Those of the paper's Table 2."""

NoiseOption = Annotated[
    float | None,
    typer.Option(
        "--noise-std",
        help="Standard deviation of the noise, of pixels in [0, 1]; where absent that of the training.",
        show_default=False,
    ),
]
SelectionOption = Annotated[int, typer.Option("--n0", help="Noisy copies that select a sample's class.")]
EstimationOption = Annotated[int, typer.Option("--n", help="Noisy copies that estimate its probability.")]
AlphaOption = Annotated[float, typer.Option(help="Probability that a sample's certificate is wrong.")]
EveryOption = Annotated[
    int, typer.Option(min=1, help="Certify one in so many samples of the test set, evenly spread; 1 certifies all.")
]
LimitOption = Annotated[int | None, typer.Option(min=1, help="Certify the first so many of these.", show_default=False)]
RadiiOption = Annotated[str, typer.Option(metavar="R,R,...", help="l2 radii to tell the certified accuracy at.")]
BatchOption = Annotated[int, typer.Option(min=1, help="Noisy copies per forward pass.")]
OutOption = Annotated[
    Path | None,
    typer.Option(help="File (TSV) for a row of each sample; nothing is kept if absent.", show_default=False),
]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Go on with that file if it is there.")]
PlotOption = Annotated[
    Path | None,
    typer.Option(help="Picture (PNG, SVG, PDF) of certified accuracy against radius.", show_default=False),
]


def certify(
    model: ModelArgument,
    weights: WeightsOption = None,
    noise_std: NoiseOption = None,
    n0: SelectionOption = 100,
    n: EstimationOption = 100_000,
    alpha: AlphaOption = 0.001,
    every: EveryOption = 20,
    limit: LimitOption = None,
    radii: RadiiOption = RADII,
    batch: BatchOption = 1000,
    out: OutOption = None,
    resume: ResumeOption = False,
    plot: PlotOption = None,
    settings: SetOption = None,
    data: DataOption = None,
    device: DeviceOption = "cpu",
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Certified accuracy of a model under Gaussian noise, on its job's test data (randomized smoothing).

    Ctrl-C leaves a file that --resume goes on with.
    """
    with errors(as_json, "certify"):
        wanted = _radii(radii)
        _refuse_in_time(out, resume, plot)
        from worker.certificates import CertificateFile, parameters_of, summarize
        from worker.certification import CertificationSettings
        from worker.trained import open_model

        opened = open_model(
            model,
            weights=weights,
            settings=settings or [],
            data=data,
            device=device,
            threads=threads,
            environment=os.environ,
            reserved=RESERVED,
        )
        monte_carlo = CertificationSettings(
            noise_std=_noise_std(noise_std, opened.spec), n0=n0, n=n, alpha=alpha, seed=opened.spec.seed
        )
        indices = range(0, len(opened.dataset.test.labels), every)
        parameters = parameters_of(opened, monte_carlo, every)
        file = CertificateFile(out, parameters, indices, resume=resume) if out else None
        samples = _certify(opened, monte_carlo, indices[:limit], batch, file)
        result = {**_described(opened, monte_carlo, every), **summarize(samples, wanted)}
        if plot:
            from deploy.certified_plot import draw

            draw(plot, samples, monte_carlo, title=opened.name)
        _print(result, as_json)


def _certify(
    model: TrainedModel,
    settings: CertificationSettings,
    indices: Sequence[int],
    batch: int,
    file: CertificateFile | None,
) -> list[CertifiedSample]:
    """Certifies, with a progress bar on a terminal; says what an interruption has left."""
    from worker.certificates import certify_samples

    done = min(len(file.samples), len(indices)) if file else 0
    try:
        with _progress(len(indices), done, settings.n0 + settings.n) as drawn:
            return certify_samples(model, settings, indices, batch=batch, file=file, drawn=drawn)
    except KeyboardInterrupt:
        if file:
            text = f"stopped: {len(file.samples)} of {len(indices)} samples are certified, --resume goes on"
            typer.echo(text, err=True)
        raise


@contextmanager
def _progress(samples: int, done: int, draws: int) -> Iterator[Callable[[int], None]]:
    """A bar on standard error, if that is a terminal; what it gives is told of draws as they are made."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task(f"{done} of {samples} samples", total=samples * draws, completed=done * draws)
        seen = done * draws

        def drawn(count: int) -> None:
            nonlocal seen
            seen += count
            progress.update(task, advance=count, description=f"{seen // draws} of {samples} samples")

        yield drawn


def _noise_std(flag: float | None, spec: JobSpec) -> float:
    """The flag's, or that of the training.

    Raises:
        SpecError: there is neither.
    """
    noise_std = spec.smoothing.noise_std if flag is None else flag
    if flag is None and noise_std == 0:
        raise SpecError(refusal("--noise-std", "noise_std", flag, "the model was trained without noise"))
    return noise_std


def _radii(text: str) -> list[float]:
    rule = "radii of at least 0, separated by commas"
    try:
        radii = [float(each) for each in text.split(",")]
    except ValueError as error:
        raise SpecError(refusal(rule, "radii", text, str(error))) from None
    if not all(math.isfinite(radius) and radius >= 0 for radius in radii):
        raise SpecError(refusal(rule, "radii", text))
    return radii


def _refuse_in_time(out: Path | None, resume: bool, plot: Path | None) -> None:
    """What would go wrong only after all samples are certified."""
    if resume and out is None:
        raise SpecError(refusal("--out with --resume", "out", out, "the file to go on with"))
    if plot is not None:
        from deploy.certified_plot import refuse_unless_drawable

        refuse_unless_drawable(plot)


def _described(model: TrainedModel, settings: CertificationSettings, every: int) -> dict[str, Any]:
    checkpoint = model.checkpoint
    return {
        "model": model.name,
        **({"round": checkpoint.round, "rounds": checkpoint.rounds, "weights": model.weights} if checkpoint else {}),
        "data": model.spec.data.name.value,
        **asdict(settings),
        "every": every,
        "maximal_radius": settings.maximal_radius,
    }


def _print(result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(result))
        return
    shown = {name: value for name, value in result.items() if name != "certified"}
    shown["abstained"] = f"{100 * result['abstained']:.1f} %"
    for name in ("maximal_radius", "average_certified_radius"):
        shown[name] = f"{result[name]:.3f}"
    print_pairs(shown)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("radius")
    table.add_column("certified accuracy", justify="right")
    for row in result["certified"]:
        table.add_row(f"{row['radius']:g}", f"{100 * row['accuracy']:.1f} %")
    Console().print(table)
