"""`datps report`: one page about many runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from deploy.options import JsonOption, errors


def report(
    paths: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Run folders, or folders that hold some, such as a study's.")
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder for report.html and its pictures.")] = Path("report"),
    title: Annotated[str, typer.Option(help="Title of the page.")] = "Distributed adversarial training",
    as_json: JsonOption = False,
) -> None:
    """Write a page with tables, the paper's beside ours, and figures; it needs nothing beside itself."""
    with errors(as_json, "report"):
        from deploy.report.write import write

        written = write(paths, out, title)
        typer.echo(json.dumps(written) if as_json else f"{written['page']}: {written['runs']} runs")
