"""The commands that make files of pseudo-labeled images."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

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

OutOption = Annotated[Path, typer.Option("--out", metavar="FILE", help="The safetensors file; it must not exist.")]


def pseudo_label(
    model: ModelArgument,
    images: Annotated[
        str,
        typer.Argument(
            metavar="DATA",
            help="A folder of images, whose names and folders mean nothing (of a data folder its train/); or "
            "held-back: the training images without a label of the model's job (data.labeled).",
        ),
    ],
    out: OutOption,
    weights: WeightsOption = None,
    settings: SetOption = None,
    data: DataOption = None,
    device: DeviceOption = "cpu",
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Label images with a trained model, for training with --unlabeled FILE --set data.unlabeled_fraction=0.5."""
    with errors(as_json, "pseudo-label"):
        from worker.labeling import pseudo_label as label

        with _progress_bar() as progress:
            result = label(
                model,
                images,
                out,
                root=data,
                progress=progress,
                weights=weights,
                settings=settings or [],
                device=device,
                threads=threads,
                environment=os.environ,
                reserved=RESERVED,
            )
        _show(result, as_json)


def convert_unlabeled(
    file: Annotated[Path, typer.Argument(metavar="PICKLE", help="A pickle of data and extrapolated_targets.")],
    out: OutOption,
    as_json: JsonOption = False,
) -> None:
    """Convert the published pickle of pseudo-labeled images (Carmon et al. 2019); nothing in it is executed."""
    with errors(as_json, "convert-unlabeled"):
        from worker.labeling import convert_unlabeled as convert

        _show(convert(file, out), as_json)


def _show(result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(result))
    else:
        print_pairs(result)


@contextmanager
def _progress_bar() -> Iterator[Callable[[int, int], None]]:
    """A bar on standard error, if people look at it."""
    console = Console(stderr=True)
    columns = (TextColumn("labeling"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("labeling", total=None)
        yield lambda done, of: bar.update(task, completed=done, total=of)
