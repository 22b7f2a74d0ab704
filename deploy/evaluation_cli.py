"""The commands that judge a trained model."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from deploy.flags import devices_of
from deploy.options import (
    RESERVED,
    DataOption,
    DeviceOption,
    DevicesOption,
    JsonOption,
    SetOption,
    ThreadsOption,
    errors,
)

ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="A run folder, a checkpoint, or module:attribute, a torch module or what makes one."
    ),
]
AttackOption = Annotated[
    list[str] | None,
    typer.Option(
        "--attack",
        metavar="NAME[:STEPS[xRESTARTS]][,KEY=VALUE...]",
        help="pgd:20, pgd:50x10,epsilon=8/255, pgd,norm=l2,epsilon=0.5, fgsm, autoattack; may be repeated. "
        "The job's evaluation attack if absent.",
        show_default=False,
    ),
]
SweepOption = Annotated[
    list[str] | None,
    typer.Option(
        "--sweep",
        metavar="KEY=VALUE,...",
        help="RA for each value: epsilon=0,2/255,4/255 or steps=1,5,20; may be repeated.",
        show_default=False,
    ),
]

WeightsOption = Annotated[
    str | None,
    typer.Option(
        "--weights",
        metavar="raw|ema",
        help="Of a checkpoint with averaged weights (optimizer.ema_decay); those if absent.",
        show_default=False,
    ),
]


def evaluate(
    context: typer.Context,
    model: ModelArgument,
    weights: WeightsOption = None,
    attacks: AttackOption = None,
    sweeps: SweepOption = None,
    limit: Annotated[
        int | None,
        typer.Option("--limit", min=1, help="Judge so many test samples, drawn by the job's seed.", show_default=False),
    ] = None,
    batch: Annotated[
        int | None, typer.Option("--batch", min=1, help="Images per forward pass.", show_default=False)
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Folder for samples.tsv and evaluation.json; what it has is not done again."),
    ] = None,
    settings: SetOption = None,
    data: DataOption = None,
    device: DeviceOption = "cpu",
    devices: DevicesOption = None,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Clean accuracy (TA) of a model, and robust accuracy (RA) under each attack, on its job's test data."""
    with errors(as_json, "evaluate"):
        from deploy.evaluation_display import EvaluationProgress, print_evaluation
        from worker.judging.evaluation import Unwatched, evaluate_model

        options: dict[str, Any] = {
            "attacks": attacks or [],
            "sweeps": sweeps or [],
            "limit": limit,
            "batch": batch,
            "out": out,
            "weights": weights,
            "settings": settings or [],
            "data": data,
            "device": device,
            "devices": devices_of(context, devices),
            "threads": threads,
            "environment": os.environ,
            "reserved": RESERVED,
        }
        if as_json:
            typer.echo(json.dumps(evaluate_model(model, watcher=Unwatched(), **options)))
            return
        try:
            with EvaluationProgress(Console(stderr=True)) as watcher:
                result = evaluate_model(model, watcher=watcher, **options)
        except KeyboardInterrupt:
            again = f"the same command goes on with what is in {out}" if out else "nothing is kept (no --out)"
            typer.echo(f"stopped; {again}", err=True)
            raise
        print_evaluation(result, plain=not attacks and not sweeps)
