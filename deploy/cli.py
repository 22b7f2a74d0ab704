"""The `datps` command: reads flags and variables, starts what they ask for, and turns errors into words and exit codes.

Everything heavy is imported by the command that needs it, so that `datps --help` is quick and needs no torch.
"""

from __future__ import annotations

import json
import os
import re
import socket
import sys
import textwrap
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
from common.errors import EXIT_INTERRUPTED, EXIT_RETRY, EXIT_TERMINATED, SpecError, refusal
from common.events import Emitter
from common.spec_sources import load_job_spec, spec_keys
from deploy import recipes, runs
from deploy.bench_cli import bench_app
from deploy.certify_cli import certify
from deploy.evaluation_cli import evaluate
from deploy.flags import devices_of, given
from deploy.grpc_tuning import tune_grpc
from deploy.options import (
    RESERVED,
    BaselineOption,
    ConnectOption,
    DataOption,
    DeviceOption,
    DevicesOption,
    DownloadOption,
    HostOption,
    InitOption,
    JobIdOption,
    JobOption,
    JsonOption,
    RecipeOption,
    RunFolderOption,
    SetOption,
    SmokeOption,
    StateOption,
    TensorBoardOption,
    ThreadsOption,
    TraceFileOption,
    TraceOption,
    UnlabeledOption,
    WorkerOutOption,
    errors,
    job_spec_of,
    variable,
)
from deploy.report_cli import report
from deploy.study_cli import study
from deploy.unlabeled_cli import convert_unlabeled, pseudo_label

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
app.command()(evaluate)
app.command()(certify)
app.command()(study)
app.command()(report)
app.command("pseudo-label")(pseudo_label)
app.command("convert-unlabeled")(convert_unlabeled)


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
        int, typer.Option(envvar=variable("shard"), min=0, help="Which shard it aggregates; 0 admits the workers.")
    ] = 0,
    host: Annotated[str, typer.Option(envvar=variable("host"), help="Address to listen on.")] = "0.0.0.0",
    port: Annotated[
        int, typer.Option(envvar=variable("port"), min=0, max=65535, help="Port to listen on; 0 is any free one.")
    ] = 50051,
    shard_addresses: Annotated[
        str,
        typer.Option(
            envvar=variable("shard_addresses"),
            metavar="HOST:PORT,...",
            help="Where workers reach the shards, in order; shard 0 needs it if there are several servers.",
        ),
    ] = "",
    trace: TraceFileOption = None,
    as_json: JsonOption = False,
) -> None:
    """Run one server: it averages the workers' gradients for its shard."""
    with errors(as_json, f"server-{shard}"):
        from ps.daemon import ServerOptions, run

        spec, _ = job_spec_of(context, job, recipe, settings)
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
    with errors(True, "shard"):
        from ps.daemon import run_shard

        code = run_shard(sys.stdin, Emitter("shard", as_json=True))
    raise typer.Exit(code)


@app.command()
def worker(
    context: typer.Context,
    server: Annotated[
        str, typer.Option(envvar=variable("server"), metavar="HOST:PORT", help="Address of the server of shard 0.")
    ],
    worker_id: Annotated[
        str,
        typer.Option(envvar=variable("worker_id"), help="Stable name.", default_factory=lambda: default_worker_id()),
    ],
    job_id: JobIdOption = None,
    connect_s: ConnectOption = 60.0,
    host: HostOption = None,
    data: DataOption = None,
    download: DownloadOption = False,
    device: DeviceOption = "cpu",
    devices: DevicesOption = None,
    threads: ThreadsOption = None,
    out: WorkerOutOption = None,
    resume: Annotated[
        Path | None, typer.Option(envvar=variable("resume"), help="Run folder or checkpoint to go on from.")
    ] = None,
    state: StateOption = None,
    unlabeled: UnlabeledOption = None,
    init: InitOption = None,
    trace: TraceFileOption = None,
    as_json: JsonOption = False,
) -> None:
    """Run one worker: it attacks its images and learns from them. The server knows the job."""
    with errors(as_json, worker_id):
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
            unlabeled=unlabeled,
            init=init,
        )
        code = run(options, Emitter(worker_id, as_json=as_json or None))
    raise typer.Exit(code)


@app.command()
def train(
    context: typer.Context,
    job: JobOption = None,
    recipe: RecipeOption = None,
    settings: SetOption = None,
    out: RunFolderOption = None,
    resume: Annotated[
        Path | None, typer.Option(envvar=variable("resume"), help="Run folder to go on with, as its job.yaml says.")
    ] = None,
    data: DataOption = None,
    download: DownloadOption = False,
    device: DeviceOption = "cpu",
    devices: DevicesOption = None,
    unlabeled: UnlabeledOption = None,
    init: InitOption = None,
    baseline: BaselineOption = True,
    trace: TraceOption = False,
    tensorboard: TensorBoardOption = False,
    smoke: SmokeOption = False,
    as_json: JsonOption = False,
) -> None:
    """Train on this machine: servers and workers as separate processes on 127.0.0.1.

    With data.split=own worker-0 reads DATA/worker-0, and so on.
    """
    with errors(as_json, "train"):
        from deploy.train import TrainOptions, job_to_resume, with_local_files

        devices, first = devices_of(context, devices), None
        if resume is not None and given(context, "resume", over=("job", "recipe", "out")):
            folder = runs.without_links(resume)
            spec, title = job_to_resume(folder, settings=settings or [], environment=os.environ, reserved=RESERVED)
        else:
            resume = None
            transfer = ["transfer.init=true"] if init is not None else []
            spec, title = job_spec_of(context, job, recipe, [*transfer, *(settings or [])])
            if smoke and given(context, "smoke", over=("init", "unlabeled", "data")):
                spec, first = _smoke(spec)
            else:
                spec = with_local_files(spec, unlabeled=unlabeled, init=init)
            folder = _new_run_folder(title, out)
        options = TrainOptions(
            spec=spec,
            title=title,
            folder=folder,
            resume=resume is not None,
            data=data,
            download=download,
            device=device,
            devices=devices,
            unlabeled=unlabeled,
            init=init,
            baseline=baseline,
            trace=trace,
            first=first,
        )
        code = _train(options, as_json, tensorboard)
    raise typer.Exit(code)


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
    with errors(as_json, "recipes"):
        found = recipes.recipe(name)
        spec = load_job_spec(yaml_text=found.text, yaml_name=found.name)
        if as_json:
            described = {"name": found.name, "description": found.description}
            typer.echo(json.dumps({**described, "job_spec": spec.model_dump(mode="json")}))
        else:
            typer.echo(found.text, nl=False)


@recipes_app.command("keys")
def _list_keys(
    prefix: Annotated[str, typer.Argument(metavar="[PREFIX]", help="Only keys that begin so: attack, codec.b.")] = "",
    as_json: JsonOption = False,
) -> None:
    """Every key of a job with its default and what it means; each can be given with --set."""
    with errors(as_json, "recipes"):
        keys = [each for each in spec_keys() if each[0].startswith(prefix)]
        if not keys:
            rule = "the beginning of a key"
            raise SpecError(refusal(rule, "prefix", prefix, "datps recipes keys lists all"))
        if as_json:
            typer.echo(json.dumps([{"key": key, "default": default, "help": text} for key, text, default in keys]))
            return
        for key, text, default in keys:
            shown = default if isinstance(default, str) else json.dumps(default)
            typer.echo(f"{key} = {shown}")
            typer.echo(textwrap.fill(" ".join(text.split()), 110, initial_indent="    ", subsequent_indent="    "))


def _new_run_folder(title: str, out: Path | None) -> Path:
    folder = runs.new_run_folder(title, out, datetime.now())
    runs.point_latest_to(folder)
    return folder


def default_worker_id() -> str:
    """Host name and process id, without what a worker_id may not contain."""
    host = re.sub(r"[^A-Za-z0-9._-]", "-", socket.gethostname()).strip("-._")[:40]
    return f"{host or 'worker'}-{os.getpid()}"


def main() -> None:
    """Entry point of the console script, and of the daemons that it starts."""
    tune_grpc()
    app()


def _smoke(spec: JobSpec) -> tuple[JobSpec, JobSpec | None]:
    from deploy.smoke import shrunk

    small = shrunk(spec)
    return small.spec, small.first


def _train(options: Any, as_json: bool, tensorboard: bool) -> int:
    from deploy.display import Display, JsonLinesDisplay, TerminalDisplay
    from deploy.train import command_to_resume
    from deploy.train import train as run_training

    people = sys.stdout.isatty() and not as_json
    display: Display = TerminalDisplay(Console()) if people else JsonLinesDisplay(sys.stdout)
    if tensorboard:
        from deploy.tensorboard import TensorBoardDisplay

        display = TensorBoardDisplay(display)
    with display:
        outcome = run_training(options, display)
        if outcome.exit_code == 0:
            return 0
        stopped = outcome.exit_code in (EXIT_TERMINATED, EXIT_INTERRUPTED)
        text = outcome.text if outcome.reason is None else f"{outcome.text}: {outcome.reason}"
        if (stopped or outcome.exit_code == EXIT_RETRY) and runs.has_checkpoint(options.folder):
            text += f"; `{command_to_resume(options)}` goes on"
        if outcome.process is not None:
            text += f" (logs in {options.folder / runs.LOGS})"
        display.say("stopping" if stopped else "error", text, exit_code=outcome.exit_code)
    if not as_json:
        typer.echo(text if stopped else f"error: {text}", err=True)
    return outcome.exit_code


if __name__ == "__main__":
    main()
