"""`datps study`: a grid of runs and the table that compares them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from common.errors import SpecError, refusal
from deploy.options import DataOption, DeviceOption, JsonOption, errors, sigterm_interrupts


def study(
    document: Annotated[Path, typer.Argument(metavar="STUDY.yaml", help="What to run; see bench/studies.")],
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Folder of its runs, which it goes on with; studies/<name> if absent."),
    ] = None,
    data: DataOption = None,
    device: DeviceOption = "cpu",
    plan: Annotated[bool, typer.Option("--plan", help="List the runs and start none.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Train every row of a study with every seed, judge the models and print the table.

    What is done is not done again: after an interruption the same command goes on. Ctrl-C and SIGTERM let the
    training at hand save what it has.
    """
    with errors(as_json, "study"), sigterm_interrupts():
        from deploy.studies.plan import read_study, runs_of
        from deploy.studies.run import Places, Study, as_json_text, document_of

        try:
            text = document.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise SpecError(refusal("a YAML file that can be read", "study", document, str(error))) from None
        if plan:
            planned = list(runs_of(read_study(text, str(document))))
            for run in planned:
                typer.echo(f"{run.folder}: {run.recipe} {' '.join(run.settings)}")
            typer.echo(f"{len(planned)} runs")
            return
        places = Places(folder=out or Path("studies") / document.stem, data=data, device=device)
        carried_out = Study(text, str(document), places, say=lambda line: typer.echo(line, err=True))
        lines, verdicts = carried_out.run()
        texts = as_json_text if as_json else document_of
        typer.echo(texts(carried_out.spec, lines, verdicts), nl=False)
