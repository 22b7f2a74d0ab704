"""The `datps` command: reads flags and variables, starts what they ask for, and turns errors into words and exit codes.

Everything heavy is imported by the command that needs it, so that `datps --help` is quick and needs no torch.
"""

from __future__ import annotations

import json
import os
import re
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from common.config import JobSpec
from common.errors import EXIT_INTERRUPTED, EXIT_RETRY, EXIT_TERMINATED, DatpsError, SpecError, refusal
from common.events import Emitter
from common.spec_sources import ENVIRONMENT_PREFIX, load_job_spec
from deploy import recipes, runs
from deploy.bench_cli import bench_app
from deploy.flags import devices_of, given
from deploy.grpc_tuning import tune_grpc

_FLAGS = (
    *("baseline", "connect_s", "data", "device", "devices", "download", "host", "job", "json", "out", "port", "recipe"),
    *("resume", "server", "shard", "shard_addresses", "state", "threads", "trace", "worker_id"),
)
RESERVED = frozenset(f"{ENVIRONMENT_PREFIX}{flag.upper()}" for flag in _FLAGS)
"""Variables that are a process's own; all other `DATPS_*` belong to the job spec (`DATPS_JOB_ID` to both, meaning
the same).
"""

app = typer.Typer(
    name="datps",
    help="Distributed adversarial training with an explicit parameter server.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
recipes_app = typer.Typer(help="The recipes that come with the package.", invoke_without_command=True)
app.add_typer(recipes_app, name="recipes")
app.add_typer(bench_app, name="bench")


def _variable(flag: str) -> str:
    assert flag in _FLAGS
    return f"{ENVIRONMENT_PREFIX}{flag.upper()}"


JobOption = Annotated[
    Path | None, typer.Option("--job", envvar=_variable("job"), help="Job spec, a YAML file.", show_default=False)
]
RecipeOption = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        envvar=_variable("recipe"),
        help=f"Recipe by name; {recipes.DEFAULT} if neither --job nor --recipe is given.",
        show_default=False,
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="A key of the job spec, e.g. codec.bits=4; may be repeated."),
]
DataOption = Annotated[
    Path | None, typer.Option("--data", envvar=_variable("data"), help="Data folder.", show_default=False)
]
DownloadOption = Annotated[
    bool, typer.Option("--download", envvar=_variable("download"), help="Fetch the data set if it is missing.")
]
DeviceOption = Annotated[str, typer.Option("--device", envvar=_variable("device"), help="cpu, cuda, cuda:1, ...")]
DevicesOption = Annotated[
    str | None,
    typer.Option(
        "--devices",
        envvar=_variable("devices"),
        metavar="cuda:0,cuda:1|cpu:N",
        help="Several devices of one worker, one process each, instead of --device.",
        show_default=False,
    ),
]
ThreadsOption = Annotated[
    int | None,
    typer.Option("--threads", envvar=_variable("threads"), min=1, help="CPU threads; torch's choice if absent."),
]
HostOption = Annotated[
    str | None,
    typer.Option(
        envvar=_variable("host"),
        help="Address of this node, where others reach its shard (colocated) or store (collective); "
        "found out if absent.",
        show_default=False,
    ),
]
TraceFileOption = Annotated[
    Path | None,
    typer.Option("--trace", envvar=_variable("trace"), help="File for a timeline (Chrome trace)", show_default=False),
]
WorkerOutOption = Annotated[
    Path | None,
    typer.Option("--out", envvar=_variable("out"), help="Run folder to write to; nothing is written if absent."),
]
StateOption = Annotated[
    Path | None,
    typer.Option("--state", envvar=_variable("state"), help="Folder for the residuals of biased codecs."),
]
JsonOption = Annotated[
    bool, typer.Option("--json", envvar=_variable("json"), help="Machine-readable output on standard output.")
]


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"datps {metadata.version('datps')}")
        raise typer.Exit


@app.callback()
def _root(
    _version: Annotated[
        bool, typer.Option("--version", callback=_show_version, help="Show the version and exit.", is_eager=True)
    ] = False,
) -> None:
    pass


@app.command()
def server(
    context: typer.Context,
    job: JobOption = None,
    recipe: RecipeOption = None,
    settings: SetOption = None,
    shard: Annotated[
        int, typer.Option(envvar=_variable("shard"), min=0, help="Which shard it aggregates; 0 admits the workers.")
    ] = 0,
    host: Annotated[str, typer.Option(envvar=_variable("host"), help="Address to listen on.")] = "0.0.0.0",
    port: Annotated[
        int, typer.Option(envvar=_variable("port"), min=0, max=65535, help="Port to listen on; 0 is any free one.")
    ] = 50051,
    shard_addresses: Annotated[
        str,
        typer.Option(
            envvar=_variable("shard_addresses"),
            metavar="HOST:PORT,...",
            help="Where workers reach the shards, in order; shard 0 needs it if there are several servers.",
        ),
    ] = "",
    trace: TraceFileOption = None,
    as_json: JsonOption = False,
) -> None:
    """Run one server: it averages the workers' gradients for its shard."""
    with _errors(as_json, f"server-{shard}"):
        from ps.daemon import ServerOptions, run

        spec, _ = _job_spec(context, job, recipe, settings)
        options = ServerOptions(
            spec=spec,
            shard=shard,
            host=host,
            port=port,
            shard_addresses=tuple(address.strip() for address in shard_addresses.split(",") if address.strip()),
            trace=trace,
        )
        code = run(options, Emitter(f"server-{shard}", as_json=as_json or None))
    raise typer.Exit(code)


@app.command(hidden=True)
def shard() -> None:
    """Serve one shard for the worker that starts this process, which speaks to it on its standard input."""
    with _errors(True, "shard"):
        from ps.daemon import run_shard

        code = run_shard(sys.stdin, Emitter("shard", as_json=True))
    raise typer.Exit(code)


@app.command()
def worker(
    context: typer.Context,
    server: Annotated[
        str, typer.Option(envvar=_variable("server"), metavar="HOST:PORT", help="Address of the server of shard 0.")
    ],
    worker_id: Annotated[
        str,
        typer.Option(envvar=_variable("worker_id"), help="Stable name.", default_factory=lambda: default_worker_id()),
    ],
    job_id: Annotated[
        str | None,
        typer.Option(
            envvar=f"{ENVIRONMENT_PREFIX}JOB_ID",
            help="Refuse to join another job; any job if absent.",
            show_default=False,
        ),
    ] = None,
    connect_s: Annotated[
        float, typer.Option(envvar=_variable("connect_s"), min=0, help="Seconds to wait for a server to answer.")
    ] = 60.0,
    host: HostOption = None,
    data: DataOption = None,
    download: DownloadOption = False,
    device: DeviceOption = "cpu",
    devices: DevicesOption = None,
    threads: ThreadsOption = None,
    out: WorkerOutOption = None,
    resume: Annotated[
        Path | None, typer.Option(envvar=_variable("resume"), help="Run folder or checkpoint to go on from.")
    ] = None,
    state: StateOption = None,
    trace: TraceFileOption = None,
    as_json: JsonOption = False,
) -> None:
    """Run one worker: it attacks its images and learns from them. The server knows the job."""
    with _errors(as_json, worker_id):
        from worker.daemon import WorkerOptions, run

        devices = devices_of(context, devices)
        options = WorkerOptions(
            server=server,
            worker_id=worker_id,
            job_id=job_id,
            connect_s=connect_s,
            host=host,
            shard_command=(sys.executable, "-m", "deploy.cli", "shard"),
            trace=trace,
            data=data,
            download=download,
            device=device,
            devices=devices,
            threads=threads,
            out=out,
            resume=resume,
            state=state,
        )
        code = run(options, Emitter(worker_id, as_json=as_json or None))
    raise typer.Exit(code)


@app.command()
def train(
    context: typer.Context,
    job: JobOption = None,
    recipe: RecipeOption = None,
    settings: SetOption = None,
    out: Annotated[
        Path | None,
        typer.Option(envvar=_variable("out"), help="Run folder, new or empty; runs/<recipe>-<time> if absent."),
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(envvar=_variable("resume"), help="Run folder to go on with, as its job.yaml says.")
    ] = None,
    data: DataOption = None,
    download: DownloadOption = False,
    device: DeviceOption = "cpu",
    devices: DevicesOption = None,
    baseline: Annotated[
        bool, typer.Option(envvar=_variable("baseline"), help="Afterwards train without attacks, to compare.")
    ] = True,
    trace: Annotated[
        bool, typer.Option("--trace", help="Write a timeline of every phase of every bucket to trace.json (Perfetto).")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Train on this machine: servers and workers as separate processes on 127.0.0.1.

    With data.split=own worker-0 reads DATA/worker-0, and so on.
    """
    with _errors(as_json, "train"):
        from deploy.train import TrainOptions, job_to_resume

        devices = devices_of(context, devices)
        if resume is not None and given(context, "resume", over=("job", "recipe", "out")):
            folder = runs.without_links(resume)
            spec, title = job_to_resume(folder, settings=settings or [], environment=os.environ, reserved=RESERVED)
        else:
            resume = None
            spec, title = _job_spec(context, job, recipe, settings)
            folder = runs.new_run_folder(title, out, datetime.now())
            runs.point_latest_to(folder)
        options = TrainOptions(
            spec=spec,
            title=title,
            folder=folder,
            resume=resume is not None,
            data=data,
            download=download,
            device=device,
            devices=devices,
            baseline=baseline,
            trace=trace,
        )
        code = _train(options, as_json)
    raise typer.Exit(code)


@app.command()
def evaluate(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="A checkpoint, or a run folder.")],
    settings: SetOption = None,
    data: DataOption = None,
    device: DeviceOption = "cpu",
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Clean and robust accuracy of a checkpoint on its job's test data, e.g. --set evaluation.attack.steps=50."""
    with _errors(as_json, "evaluate"):
        from worker.daemon import evaluate_checkpoint

        result = evaluate_checkpoint(
            checkpoint,
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
            _print_pairs(result)


@recipes_app.callback()
def _list_recipes(context: typer.Context, as_json: JsonOption = False) -> None:
    if context.invoked_subcommand is not None:
        return
    everything = recipes.all_recipes()
    if as_json:
        typer.echo(json.dumps([{"name": each.name, "description": each.description} for each in everything]))
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("recipe", no_wrap=True)
    table.add_column("what it trains")
    for each in everything:
        default = " (default)" if each.name == recipes.DEFAULT else ""
        table.add_row(each.name, Text(each.description + default))
    Console().print(table)


@recipes_app.command("show")
def _show_recipe(name: str, as_json: JsonOption = False) -> None:
    """One recipe: its YAML, or with --json the job spec with all defaults filled in."""
    with _errors(as_json, "recipes"):
        found = recipes.recipe(name)
        spec = load_job_spec(yaml_text=found.text, yaml_name=found.name)
        if as_json:
            described = {"name": found.name, "description": found.description}
            typer.echo(json.dumps({**described, "job_spec": spec.model_dump(mode="json")}))
        else:
            typer.echo(found.text, nl=False)


def default_worker_id() -> str:
    """Host name and process id, without what a worker_id may not contain."""
    host = re.sub(r"[^A-Za-z0-9._-]", "-", socket.gethostname()).strip("-._")[:40]
    return f"{host or 'worker'}-{os.getpid()}"


def main() -> None:
    """Entry point of the console script, and of the daemons that it starts."""
    tune_grpc()
    app()


def _job_spec(
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


def _train(options: Any, as_json: bool) -> int:
    from deploy.display import Display, JsonLinesDisplay, TerminalDisplay
    from deploy.train import train as run_training

    people = sys.stdout.isatty() and not as_json
    display: Display = TerminalDisplay(Console()) if people else JsonLinesDisplay(sys.stdout)
    with display:
        outcome = run_training(options, display)
        if outcome.exit_code == 0:
            return 0
        stopped = outcome.exit_code in (EXIT_TERMINATED, EXIT_INTERRUPTED)
        text = outcome.text if outcome.reason is None else f"{outcome.text}: {outcome.reason}"
        if (stopped or outcome.exit_code == EXIT_RETRY) and runs.has_checkpoint(options.folder):
            text += f"; `datps train --resume {options.folder}` goes on"
        if outcome.process is not None:
            text += f" (logs in {options.folder / runs.LOGS})"
        display.say("stopping" if stopped else "error", text, exit_code=outcome.exit_code)
    if not as_json:
        typer.echo(text if stopped else f"error: {text}", err=True)
    return outcome.exit_code


@contextmanager
def _errors(as_json: bool, process: str) -> Iterator[None]:
    """A user's mistake ends with words and its exit code, Ctrl-C with 130; neither with a traceback."""
    try:
        yield
    except DatpsError as error:
        if as_json:
            Emitter(process, as_json=True)("error", text=str(error), exit_code=error.exit_code)
        else:
            typer.echo(f"error: {error}", err=True)
        raise typer.Exit(error.exit_code) from None
    except KeyboardInterrupt:
        raise typer.Exit(EXIT_INTERRUPTED) from None


def _print_pairs(result: dict[str, Any]) -> None:
    grid = Table.grid(padding=(0, 2, 0, 0))
    for name, value in result.items():
        if isinstance(value, dict):
            value = ", ".join(f"{key} {each}" for key, each in value.items() if each is not None)
        shown = f"{100 * value:.1f} %" if name.endswith("_accuracy") else str(value)
        grid.add_row(Text(name.replace("_", " "), style="bright_black"), Text(shown))
    Console().print(grid)


if __name__ == "__main__":
    main()
