"""What the commands of `datps` share: flags and their variables, the job spec they name, errors in words."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from common.config import JobSpec
from common.errors import EXIT_INTERRUPTED, EXIT_TERMINATED, DatpsError, SpecError, refusal
from common.events import Emitter
from common.spec_sources import ENVIRONMENT_PREFIX, load_job_spec
from deploy import recipes
from deploy.flags import given

_FLAGS = (
    *(
        "baseline",
        "connect_s",
        "data",
        "device",
        "devices",
        "download",
        "host",
        "init",
        "job",
        "json",
        "out",
        "port",
        "recipe",
    ),
    *("resume", "server", "shard", "shard_addresses", "state", "threads", "trace", "unlabeled", "worker_id"),
)
RESERVED = frozenset(f"{ENVIRONMENT_PREFIX}{flag.upper()}" for flag in _FLAGS)
"""Variables that are a process's own; all other `DATPS_*` belong to the job spec (`DATPS_JOB_ID` to both, meaning
the same).
"""


def variable(flag: str) -> str:
    assert flag in _FLAGS
    return f"{ENVIRONMENT_PREFIX}{flag.upper()}"


JobOption = Annotated[
    Path | None, typer.Option("--job", envvar=variable("job"), help="Job spec, a YAML file.", show_default=False)
]
JobIdOption = Annotated[
    str | None,
    typer.Option(
        envvar=f"{ENVIRONMENT_PREFIX}JOB_ID", help="Refuse to join another job; any job if absent.", show_default=False
    ),
]
RecipeOption = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        envvar=variable("recipe"),
        help=f"Recipe by name; {recipes.DEFAULT} if neither --job nor --recipe is given.",
        show_default=False,
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="A key of the job spec, e.g. codec.bits=4; may be repeated."),
]
DataOption = Annotated[
    Path | None, typer.Option("--data", envvar=variable("data"), help="Data folder.", show_default=False)
]
UnlabeledOption = Annotated[
    Path | None,
    typer.Option(
        "--unlabeled",
        envvar=variable("unlabeled"),
        help="File of pseudo-labeled images (datps pseudo-label), for data.unlabeled_fraction of each batch.",
        show_default=False,
    ),
]
InitOption = Annotated[
    Path | None,
    typer.Option(
        "--init",
        envvar=variable("init"),
        help="What a new run starts from: a run folder, a checkpoint, or a file .safetensors, .pt or .pth.",
        show_default=False,
    ),
]
DownloadOption = Annotated[
    bool, typer.Option("--download", envvar=variable("download"), help="Fetch the data set if it is missing.")
]
DeviceOption = Annotated[str, typer.Option("--device", envvar=variable("device"), help="cpu, cuda, cuda:1, ...")]
DevicesOption = Annotated[
    str | None,
    typer.Option(
        "--devices",
        envvar=variable("devices"),
        metavar="cuda:0,cuda:1|cpu:N",
        help="Several devices of one worker, one process each, instead of --device.",
        show_default=False,
    ),
]
ThreadsOption = Annotated[
    int | None,
    typer.Option("--threads", envvar=variable("threads"), min=1, help="CPU threads; torch's choice if absent."),
]
HostOption = Annotated[
    str | None,
    typer.Option(
        envvar=variable("host"),
        help="Address of this node, where others reach its shard (colocated) or store (collective); "
        "found out if absent.",
        show_default=False,
    ),
]
TraceFileOption = Annotated[
    Path | None,
    typer.Option("--trace", envvar=variable("trace"), help="File for a timeline (Chrome trace)", show_default=False),
]
WorkerOutOption = Annotated[
    Path | None,
    typer.Option("--out", envvar=variable("out"), help="Run folder to write to; nothing is written if absent."),
]
StateOption = Annotated[
    Path | None,
    typer.Option("--state", envvar=variable("state"), help="Folder for the residuals of biased codecs."),
]
ConnectOption = Annotated[
    float, typer.Option(envvar=variable("connect_s"), min=0, help="Seconds to wait for a server to answer.")
]
BaselineOption = Annotated[
    bool, typer.Option(envvar=variable("baseline"), help="Afterwards train without attacks, to compare.")
]
TensorBoardOption = Annotated[
    bool, typer.Option("--tensorboard", help="Write TensorBoard events into the run folder, too.")
]
SmokeOption = Annotated[
    bool,
    typer.Option("--smoke", help="The same method in under a minute: digits, a small network, two workers at most."),
]
RunFolderOption = Annotated[
    Path | None,
    typer.Option("--out", envvar=variable("out"), help="Run folder, new or empty; runs/<recipe>-<time> if absent."),
]
TraceOption = Annotated[
    bool, typer.Option("--trace", help="Write a timeline of every phase of every bucket to trace.json (Perfetto).")
]
JsonOption = Annotated[
    bool, typer.Option("--json", envvar=variable("json"), help="Machine-readable output on standard output.")
]


def job_spec_of(
    context: typer.Context, job: Path | None, recipe_name: str | None, settings: list[str] | None
) -> tuple[JobSpec, str]:
    """The job spec with its title; `--job` and `--recipe` exclude each other."""
    if job is not None and given(context, "job", over=("recipe",)):
        try:
            text = job.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise SpecError(refusal("a YAML file that can be read", "job", job, str(error))) from None
        name, title = str(job), job.stem
    else:
        recipe = recipes.recipe(recipe_name or recipes.DEFAULT)
        text, name, title = recipe.text, recipe.name, recipe.name
    spec = load_job_spec(
        yaml_text=text, yaml_name=name, environment=os.environ, settings=settings or [], reserved=RESERVED
    )
    return spec, title


@contextmanager
def errors(as_json: bool, process: str) -> Iterator[None]:
    """A user's mistake ends with words and its exit code, Ctrl-C with 130, `Terminated` with 143; no tracebacks."""
    try:
        yield
    except DatpsError as error:
        if as_json:
            Emitter(process, as_json=True)("error", text=str(error), exit_code=error.exit_code)
        else:
            typer.echo(f"error: {error}", err=True)
        raise typer.Exit(error.exit_code) from None
    except Terminated:
        raise typer.Exit(EXIT_TERMINATED) from None
    except KeyboardInterrupt:
        raise typer.Exit(EXIT_INTERRUPTED) from None


class Terminated(KeyboardInterrupt):
    """SIGTERM has come; whoever ends well on Ctrl-C does so on this."""


@contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """SIGTERM raises `Terminated` meanwhile; for commands that wait for other processes, in the main thread."""

    def on_sigterm(_number: int, _frame: FrameType | None) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, on_sigterm)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def print_pairs(result: dict[str, Any]) -> None:
    grid = Table.grid(padding=(0, 2, 0, 0))
    for name, value in result.items():
        if isinstance(value, dict):
            value = ", ".join(f"{key} {each}" for key, each in value.items() if each is not None)
        shown = f"{100 * value:.1f} %" if name.endswith("_accuracy") else str(value)
        grid.add_row(Text(name.replace("_", " "), style="bright_black"), Text(shown))
    Console().print(grid)
