"""`datps bench`: flags of the laboratory; the work is done in `bench/`, imported by the command that needs it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from common.errors import SpecError, refusal
from deploy.options import RESERVED, errors

if TYPE_CHECKING:
    from bench.settings import Setting

bench_app = typer.Typer(
    help="Measure: the exchange with and without training, on this machine or on shaped links.", no_args_is_help=True
)
LOOPBACK = "loopback"

SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="A key of the job spec, e.g. exchange.bucket_bytes=524288."),
]
CodecOption = Annotated[
    list[str] | None,
    typer.Option(
        "--codec",
        metavar="CODEC",
        help="BITS (8), BITSx2 for two-sided (8x2), 32, NAME (sign, fp16) or NAME:BITS (paper:8x2, shared:4); "
        "may be repeated.",
        show_default="8x2",
    ),
]
_TOPOLOGIES = (
    "colocated (a shard on each worker's node), dedicated:S (S servers on nodes of their own), collective "
    "(no server; 32 is all-reduced, others are gathered, and 8x2 counts as 8); may be repeated."
)
TopologyOption = Annotated[
    list[str] | None,
    typer.Option("--topology", help=_TOPOLOGIES, show_default="dedicated:SERVERS"),
]
NetworkTopologyOption = Annotated[
    list[str] | None,
    typer.Option(
        "--topology",
        help=_TOPOLOGIES,
        show_default="colocated, dedicated:1, and collective unless a codec is shared",
    ),
]
ElementsOption = Annotated[
    int | None,
    typer.Option(min=1, max=1 << 30, help="Elements of the gradient; those of ResNet-50 (25,557,032) if absent."),
]
RoundsOption = Annotated[int, typer.Option(min=1, max=10000, help="Timed rounds of each setting.")]
WarmupOption = Annotated[int, typer.Option(min=0, max=1000, help="Rounds before them.")]
RepeatsOption = Annotated[int, typer.Option(min=1, max=100, help="How often all settings are run, in turn.")]
TraceOption = Annotated[
    Path | None,
    typer.Option(
        "--trace",
        help="File for a timeline of all processes (Perfetto); for one setting, run once, without gloo.",
        show_default=False,
    ),
]
JsonOption = Annotated[
    bool, typer.Option("--json", envvar="DATPS_JSON", help="Machine-readable output on standard output.")
]


@bench_app.command()
def exchange(
    workers: Annotated[int, typer.Option(min=1, max=256, help="Workers.")] = 4,
    servers: Annotated[int, typer.Option(min=1, max=64, help="Dedicated servers, where no --topology is given.")] = 1,
    topology: TopologyOption = None,
    codec: CodecOption = None,
    elements: ElementsOption = None,
    rounds: RoundsOption = 5,
    warmup: WarmupOption = 1,
    repeats: RepeatsOption = 1,
    gloo: Annotated[bool, typer.Option(help="Measure gloo's float32 all-reduce too.")] = False,
    settings: SetOption = None,
    trace: TraceOption = None,
    as_json: JsonOption = False,
) -> None:
    """Exchange synthetic gradients through real server and worker processes on this machine."""
    _run(
        as_json,
        workers=workers,
        topologies=topology or [f"dedicated:{servers}"],
        codecs=codec,
        rates=None,
        gloo=gloo,
        settings=settings,
        orders={"elements": elements, "rounds": rounds, "warmup_rounds": warmup},
        repeats=repeats,
        trace=trace,
    )


@bench_app.command()
def network(
    nodes: Annotated[
        int, typer.Option(min=2, max=64, help="Nodes with a worker each; dedicated servers get nodes beside them.")
    ] = 6,
    rate: Annotated[
        list[str] | None,
        typer.Option(help="Of every link, each way; may be repeated.", show_default="1gbit"),
    ] = None,
    topology: NetworkTopologyOption = None,
    codec: CodecOption = None,
    elements: ElementsOption = None,
    rounds: RoundsOption = 5,
    warmup: WarmupOption = 1,
    repeats: RepeatsOption = 1,
    gloo: Annotated[bool, typer.Option(help="Measure gloo's float32 all-reduce in the same run.")] = True,
    settings: SetOption = None,
    trace: TraceOption = None,
    as_json: JsonOption = False,
) -> None:
    """The same on shaped links between network namespaces, beside gloo and the physical limit; needs root."""
    _run(
        as_json,
        workers=nodes,
        topologies=topology,
        codecs=codec,
        rates=rate or ["1gbit"],
        gloo=gloo,
        settings=settings,
        orders={"elements": elements, "rounds": rounds, "warmup_rounds": warmup},
        repeats=repeats,
        trace=trace,
    )


def _run(
    as_json: bool,
    *,
    workers: int,
    topologies: list[str] | None,
    codecs: list[str] | None,
    rates: list[str] | None,
    gloo: bool,
    settings: list[str] | None,
    orders: dict[str, Any],
    repeats: int,
    trace: Path | None,
) -> None:
    with errors(as_json, "bench"):
        from bench.exchange import run_exchange
        from bench.measure import Orders
        from bench.network import run_network
        from bench.report import print_tables
        from bench.settings import default_topologies, parse_rate, parse_topology, plan_settings
        from bench.tensors import elements_of

        codecs = codecs or ["8x2"]
        planned = plan_settings(
            topologies=[parse_topology(each, workers) for each in topologies or default_topologies(codecs)],
            codecs=codecs,
            rates_bps=[None] if rates is None else [parse_rate(rate) for rate in rates],
            gloo=gloo,
            elements=elements_of(orders["elements"]),
            settings=settings or [],
            environment=os.environ,
            reserved=RESERVED,
        )
        run = run_exchange if rates is None else run_network
        result = run(planned, Orders(workers=workers, **orders), repeats, _say, trace)
        _show(result, print_tables, as_json)


@bench_app.command()
def overlap(
    workers: Annotated[int, typer.Option(min=1, max=64, help="Workers, each on a node of its own.")] = 1,
    topology: Annotated[str, typer.Option(help="As in `bench network`.")] = "dedicated:1",
    codec: Annotated[str, typer.Option(help="As in `bench network`.")] = "8x2",
    rate: Annotated[
        str, typer.Option(help="Of every link, each way (needs root); or loopback, where the exchange is all CPU time.")
    ] = "1gbit",
    model: Annotated[str, typer.Option(help="Model, on images of 32x32 pixels.")] = "preact_resnet18",
    batch: Annotated[int, typer.Option(min=2, max=4096, help="Images of a backward pass.")] = 32,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of each worker's backward.")] = 1,
    cycles: Annotated[int, typer.Option(min=1, max=1000, help="Timed cycles of the three phases.")] = 5,
    warmup: Annotated[int, typer.Option(min=1, max=100, help="Cycles before them.")] = 1,
    settings: SetOption = None,
    trace: TraceOption = None,
    as_json: JsonOption = False,
) -> None:
    """How much of the exchange is hidden behind backward: each alone and both at once, in turn, in one run."""
    with errors(as_json, "bench"):
        from bench.overlap import OverlapPlan, print_overlap, run_overlap

        setting = _one_setting(workers, topology, codec, rate, [f"model.name={model}", *(settings or [])])
        plan = OverlapPlan(cycles=cycles, warmup_cycles=warmup, batch=batch, threads=threads)
        _show(run_overlap(setting, plan, _say, trace), print_overlap, as_json)


@bench_app.command()
def throughput(
    model: Annotated[str, typer.Option(help="Model.")] = "resnet8",
    data: Annotated[str, typer.Option(help="synthetic (32x32 pixels, 3 channels) or digits (8x8, 1).")] = "synthetic",
    batch: Annotated[int, typer.Option(min=2, max=4096, help="Images of a round.")] = 64,
    steps: Annotated[int, typer.Option(min=1, max=100, help="Attack steps of PGD.")] = 7,
    optimizer: Annotated[str, typer.Option(help="lamb or sgd.")] = "lamb",
    blocks: Annotated[int, typer.Option(min=1, max=1000, help="Timed blocks of rounds of each loop.")] = 6,
    rounds: Annotated[int, typer.Option(min=1, max=1000, help="Rounds of a block.")] = 5,
    warmup: Annotated[int, typer.Option(min=0, max=100, help="Blocks before them.")] = 1,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads of both loops; all cores if absent.", show_default=False)
    ] = None,
    settings: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Training throughput of one worker (codec none, real server, loopback) over that of a plain PyTorch loop."""
    with errors(as_json, "bench"):
        from bench.throughput import ThroughputPlan, print_throughput, run_throughput
        from deploy.cluster import threads_per_worker

        if data not in ("synthetic", "digits"):
            raise SpecError(refusal("synthetic or digits", "data", data))
        job = [f"model.name={model}", f"data.batch_per_worker={batch}", f"attack.steps={steps}"]
        job += [f"optimizer.name={optimizer}", "evaluation.every_epochs=0", "checkpoint.every_epochs=0"]
        setting = _one_setting(1, "dedicated:1", "none", LOOPBACK, [*job, *(settings or [])])
        plan = ThroughputPlan(
            blocks=blocks,
            warmup_blocks=warmup,
            block_rounds=rounds,
            data=data,
            threads=threads or threads_per_worker(1),
        )
        _show(run_throughput(setting, plan, _say), print_throughput, as_json)


@bench_app.command("codec")
def codec_(
    elements: ElementsOption = None,
    repeats: Annotated[int, typer.Option(min=1, max=1000, help="Timings of each codec; the least counts.")] = 5,
    workers: Annotated[int, typer.Option(min=1, max=250, help="Workers of the means.")] = 6,
    data: Annotated[
        Path | None,
        typer.Option(help="Folder of CIFAR-10 for the gradient of a ResNet-20, too.", show_default=False),
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option(help="Row by name, e.g. 'rotated 2'; may be repeated.", show_default=False)
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """All codecs in one table: bytes, error on synthetic and real gradients, bias, and speed beside a copy."""
    with errors(as_json, "bench"):
        from bench.codecs import VARIANTS, CodecPlan, print_codecs, run_codecs
        from bench.tensors import elements_of

        for name in only or ():
            if name not in VARIANTS:
                raise SpecError(refusal(f"one of {', '.join(VARIANTS)}", "only", name))
        plan = CodecPlan(
            elements=elements_of(elements), repeats=repeats, workers=workers, data=data, only=tuple(only or ())
        )
        _show(run_codecs(plan, _say), print_codecs, as_json)


@bench_app.command("predict")
def predict_(
    measured: Annotated[
        Path | None,
        typer.Option(help="Result of `bench network --json` to compare with.", show_default=False),
    ] = None,
    rates: Annotated[
        Path | None,
        typer.Option(help="Result of `bench predict --json` whose rates to use; measured here if absent."),
    ] = None,
    topology: Annotated[
        list[str] | None,
        typer.Option(
            help="May be repeated; dedicated servers are nodes on top.",
            show_default="dedicated:1, colocated, collective",
        ),
    ] = None,
    codec: Annotated[list[str] | None, typer.Option(help="May be repeated.", show_default="32, 8x2, 4x2")] = None,
    rate: Annotated[
        list[str] | None,
        typer.Option(help="Of every link; may be repeated.", show_default="200mbit, 1gbit, 10gbit"),
    ] = None,
    elements: ElementsOption = None,
    cores_per_node: Annotated[int, typer.Option(min=1, max=1024, help="Of the cluster that is predicted.")] = 2,
    as_json: JsonOption = False,
) -> None:
    """Predict a round for 2 to 1,024 workers from measured rates, and check the model against measurements."""
    with errors(as_json, "bench"):
        from bench.predict import Question, print_predict, run_predict
        from bench.settings import parse_rate
        from bench.tensors import elements_of

        question = Question(
            topologies=tuple(topology or ("dedicated:1", "colocated", "collective")),
            codecs=tuple(codec or ("32", "8x2", "4x2")),
            rates_bps=tuple(parse_rate(each) for each in rate or ("200mbit", "1gbit", "10gbit")),
            elements=elements_of(elements),
            cores_per_node=cores_per_node,
        )
        _show(run_predict(measured, rates, question, _say), print_predict, as_json)


@bench_app.command()
def theory(
    seeds: Annotated[str, typer.Option(help="Seeds, separated by commas.")] = "0,1,2",
    lamb: Annotated[
        str, typer.Option(help="theorem (what Theorem 2 speaks of) or defaults (the job spec's, without a bound).")
    ] = "theorem",
    only: Annotated[
        list[str] | None, typer.Option(help="Sweep by name, e.g. workers; may be repeated.", show_default=False)
    ] = None,
    smoke: Annotated[bool, typer.Option("--smoke", help="Two points of each sweep, few rounds: seconds.")] = False,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Draw the sweeps into this file.", show_default=False)
    ] = None,
    processes: Annotated[
        int | None,
        typer.Option(min=1, max=256, help="That share the work; as many as cores if absent.", show_default=False),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Theorems 1 and 2 on a problem in closed form: measured exponents beside theirs, and the bound of each point."""
    with errors(as_json, "bench"):
        from bench.theory.laboratory import TheoryPlan, cores, parse_seeds, print_theory, run_theory
        from bench.theory.plot import draw, refuse_unless_drawable
        from bench.theory.sweeps import LambVariant

        if lamb not in tuple(LambVariant):
            raise SpecError(refusal(f"one of {', '.join(LambVariant)}", "lamb", lamb))
        plan = TheoryPlan(
            seeds=parse_seeds(seeds),
            lamb=LambVariant(lamb),
            only=tuple(only or ()),
            smoke=smoke,
            processes=processes or (1 if smoke else cores()),
        )
        if plot is not None:
            refuse_unless_drawable(plot)
        result = run_theory(plan, _say)
        if plot is not None:
            draw(plot, result)
        _show(result, print_theory, as_json)


def _one_setting(workers: int, topology: str, codec: str, rate: str, settings: list[str]) -> Setting:
    from bench.settings import parse_rate, parse_topology, plan_settings
    from bench.tensors import elements_of

    (setting,) = plan_settings(
        topologies=[parse_topology(topology, workers)],
        codecs=[codec],
        rates_bps=[None if rate == LOOPBACK else parse_rate(rate)],
        gloo=False,
        elements=elements_of(None),
        settings=settings,
        environment=os.environ,
        reserved=RESERVED,
    )
    return setting


def _show(result: dict[str, Any], show: Callable[[dict[str, Any], Console], None], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(result))
    else:
        show(result, Console())


def _say(text: str) -> None:
    typer.echo(text, err=True)
