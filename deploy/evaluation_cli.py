"""The commands that judge a trained model."""

from __future__ import annotations

import json
import os
from typing import Annotated

import typer

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

ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="A run folder, a checkpoint, or module:attribute, a torch module or what makes one."
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
    model: ModelArgument,
    weights: WeightsOption = None,
    settings: SetOption = None,
    data: DataOption = None,
    device: DeviceOption = "cpu",
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Clean and robust accuracy of a model on its job's test data, e.g. --set evaluation.attack.steps=50."""
    with errors(as_json, "evaluate"):
        from worker.trained import evaluate_model

        result = evaluate_model(
            model,
            weights=weights,
            settings=settings or [],
            data=data,
            device=device,
            threads=threads,
            environment=os.environ,
            reserved=RESERVED,
        )
        if as_json:
            typer.echo(json.dumps(result))
        else:
            print_pairs(result)
