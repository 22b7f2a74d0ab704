"""`datps bench predict`: the model of cost beside what was measured, and what it says of clusters that are not here."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.console import Console

from bench.cost_model import FLOAT32_BYTES, Cluster, KernelRates, Kind, Load, Prediction, WireRates, predict
from bench.processes import Say
from bench.rates import kernel_rates, wire_rates
from bench.report import environment, table
from bench.settings import TopologyKind as Where
from bench.settings import encoded_by, parse_codec, parse_topology, rate_text
from bench.tensors import tensors_of
from common.codecs import SharedCodec
from common.config import MAXIMAL_SUM, CodecName, ExchangeSpec, JobSpec
from common.config import Topology as JobTopology
from common.errors import SpecError, refusal
from common.layout import bucket_bytes_of, plan_layout, pull_codec, push_codec
from common.spec_sources import load_job_spec

MOST_WORKERS = 1024
GLOO = "gloo"


_WIDTH = 110


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is predicted.

    Attributes:
        topologies: as `parse_topology` reads them.
        codecs: short forms.
        rates_bps: of every link.
        elements: d.
        cores_per_node: of a real cluster.
    """

    topologies: tuple[str, ...]
    codecs: tuple[str, ...]
    rates_bps: tuple[int, ...]
    elements: int
    cores_per_node: int


class Rates:
    """Kernel rates by codec and wire rates, read or measured when they are first asked for."""

    def __init__(self, known: dict[str, Any], say: Say) -> None:
        """`known`: what `as_dict` gave, or nothing."""
        self._say = say
        try:
            self._kernels = {codec: KernelRates(**each) for codec, each in known.get("kernels", {}).items()}
            self._wire = WireRates(**known["wire"]) if "wire" in known else None
        except (TypeError, AttributeError) as error:
            raise SpecError(refusal("rates that `datps bench predict --json` wrote", "rates", error)) from None

    def kernel(self, codec: str) -> KernelRates:
        """Of one codec."""
        if codec not in self._kernels:
            self._say(f"measuring the kernels of codec {codec}")
            self._kernels[codec] = kernel_rates(codec)
        return self._kernels[codec]

    def wire(self, goodput: float | None = None) -> WireRates:
        """Of messages; `goodput`: what links were seen to carry."""
        if self._wire is None:
            self._wire = wire_rates(self._say)
        return self._wire if goodput is None else replace(self._wire, goodput=goodput)

    def as_dict(self) -> dict[str, Any]:
        """All that was read or measured."""
        kernels = {codec: asdict(each) for codec, each in self._kernels.items()}
        return {"kernels": kernels, "wire": asdict(self.wire())}


def run_predict(measured: Path | None, rates: Path | None, question: Question, say: Say) -> dict[str, Any]:
    """Predicts, and compares where there is something to compare with.

    Args:
        measured: output of `datps bench network --json` or `exchange --json`.
        rates: output of this command, whose rates are taken over; what is missing is measured.
        question: what to predict.
        say: told what is being measured.

    Raises:
        SpecError: a file cannot be read or is something else, or a codec or topology is none.
        DatpsError: rates could not be measured.
    """
    for codec in question.codecs:  # refused before anything is measured
        if not max(_most_workers(topology, codec) for topology in question.topologies):
            rule = f"dedicated or colocated among the topologies (codec {codec}: servers add integers)"
            raise SpecError(refusal(rule, "topology", ", ".join(question.topologies)))
    result = None if measured is None else _read(measured)
    known = Rates(_read(rates).get("rates", {}) if rates else {}, say)
    compared = [] if result is None else compare(result, known)
    predictions = [row for rate_bps in question.rates_bps for row in _rows(question, rate_bps, known)]
    return {
        "environment": environment(),
        "rates": known.as_dict(),
        "compared": compared,
        "median_error": statistics.median(abs(row["error"]) for row in compared) if compared else None,
        "elements": question.elements,
        "cores_per_node": question.cores_per_node,
        "predictions": predictions,
        "fastest": [each for rate_bps in question.rates_bps for each in _fastest(question, rate_bps, known)],
    }


def compare(result: dict[str, Any], rates: Rates) -> list[dict[str, Any]]:
    """By row of a laboratory's result: measured and predicted seconds, and the error over the measured ones.

    All its nodes are processes of one machine, so they share its cores.

    Raises:
        SpecError: it is no such result.
    """
    try:
        cores = int(result["environment"]["cores"])
        links = result["environment"].get("link_goodput", [])
        goodput = {link["rate_bits_per_s"]: link["goodput_bits_per_s"] / link["rate_bits_per_s"] for link in links}
        compared = []
        for row in result["rows"]:
            codec = "none" if row["exchange"] == GLOO else str(row["codec"])
            topology = GLOO if row["exchange"] == GLOO else str(row["topology"])
            spec = _spec(codec, int(row.get("bucket_bytes", _default_bucket_bytes(topology))))
            cluster, load = _situation(topology, spec, int(row["workers"]), row["rate_bits_per_s"], row["elements"])
            cluster = replace(cluster, cores_per_node=cores, cores_shared=cores)
            said = predict(cluster, load, rates.kernel(codec), rates.wire(goodput.get(row["rate_bits_per_s"])))
            measured_s = float(row["median_s"])
            error = (said.round_s - measured_s) / measured_s
            compared.append({"name": row["name"], "measured_s": measured_s, "error": error, **_said(said)})
    except (KeyError, TypeError, ValueError) as error:
        rule = "a result of `datps bench network --json` or `exchange --json`"
        raise SpecError(refusal(rule, "measured", repr(error))) from None
    return compared


def fastest_ranges(at: Callable[[int, str], float], names: Sequence[str], most: int) -> list[tuple[int, int, str]]:
    """Which of some topologies is the fastest from how many workers to how many: (first, last, name)."""
    best = [(workers, min(names, key=lambda name: at(workers, name))) for workers in range(2, most + 1)]
    starts = [best[0], *(here for before, here in pairwise(best) if here[1] != before[1])]
    ends = [*(start - 1 for start, _ in starts[1:]), most]
    return [(start, end, name) for (start, name), end in zip(starts, ends, strict=True)]


def workers_shown() -> tuple[int, ...]:
    """Powers of two up to the most."""
    return tuple(1 << power for power in range(1, MOST_WORKERS.bit_length()))


def _rows(question: Question, rate_bps: int, rates: Rates) -> Iterable[dict[str, Any]]:
    for topology in question.topologies:
        codecs = dict.fromkeys(_codec_of(topology, codec) for codec in question.codecs)
        for codec in codecs:
            possible = [workers for workers in workers_shown() if workers <= _most_workers(topology, codec)]
            if not possible:
                continue
            said = [_ask(question, topology, codec, rate_bps, workers, rates) for workers in possible]
            yield {
                "topology": topology,
                "codec": codec,
                "rate_bits_per_s": rate_bps,
                "workers": possible,
                "round_s": [each.round_s for each in said],
                "bound": [each.bound for each in said],
            }


def _fastest(question: Question, rate_bps: int, rates: Rates) -> Iterable[dict[str, Any]]:
    """The crossover points, by codec."""
    for codec in question.codecs:
        most = {topology: _most_workers(topology, codec) for topology in question.topologies}

        def at(workers: int, topology: str, codec: str = codec) -> float:
            return _ask(question, topology, _codec_of(topology, codec), rate_bps, workers, rates).round_s

        for first, last, topology in fastest_ranges(at, [name for name in most if most[name]], max(most.values())):
            yield {
                "codec": codec,
                "rate_bits_per_s": rate_bps,
                "first_workers": first,
                "last_workers": last,
                "topology": topology,
            }


def _ask(question: Question, topology: str, codec: str, rate_bps: int, workers: int, rates: Rates) -> Prediction:
    spec = _spec(codec, _default_bucket_bytes(topology))
    cluster, load = _situation(topology, spec, workers, rate_bps, question.elements)
    cluster = replace(cluster, cores_per_node=question.cores_per_node)
    return predict(cluster, load, rates.kernel(codec), rates.wire())


def _situation(topology: str, spec: JobSpec, workers: int, rate_bps: int | None, elements: int) -> tuple[Cluster, Load]:
    """Cluster and load of one setting; cores are left to the caller."""
    pushed, pulled, scales = _bytes(spec, elements, workers)
    bucket_bytes, shards = bucket_bytes_of(spec.exchange), workers
    if topology == GLOO:
        kind, bucket_bytes = Kind.ALL_REDUCE, FLOAT32_BYTES * elements
    else:
        where = parse_topology(topology, workers)
        shards = where.shards
        kind = {Where.DEDICATED: Kind.DEDICATED, Where.COLOCATED: Kind.COLOCATED}.get(where.kind, Kind.ALL_GATHER)
        if kind is Kind.ALL_GATHER and pushed == FLOAT32_BYTES * elements:
            kind = Kind.ALL_REDUCE
    load = Load(
        elements=elements,
        pushed_bytes=pushed,
        pulled_bytes=pulled,
        bucket_bytes=bucket_bytes,
        scale_bytes=scales,
    )
    return Cluster(kind=kind, workers=workers, shards=shards, rate_bps=rate_bps, cores_per_node=1), load


def _codec_of(topology: str, codec: str) -> str:
    return encoded_by(parse_topology(topology, 2), codec)


def _most_workers(topology: str, codec: str) -> int:
    """Up to how many workers a job can have both; 0: none can."""
    spec = _spec(_codec_of(topology, codec), _default_bucket_bytes(topology)).codec
    if spec.name is not CodecName.SHARED:
        return MOST_WORKERS
    if parse_topology(topology, 2).kind is Where.COLLECTIVE:
        return 0
    return min(MOST_WORKERS, MAXIMAL_SUM // ((1 << (spec.bits - 1)) - 1))


_SPECS: dict[tuple[str, int], JobSpec] = {}
_BYTES: dict[tuple[str, int, int], tuple[int, int, int]] = {}


def _default_bucket_bytes(topology: str) -> int:
    """What `exchange.bucket_bytes` is where it is absent."""
    where = JobTopology.COLOCATED if topology == JobTopology.COLOCATED else JobTopology.DEDICATED
    return bucket_bytes_of(ExchangeSpec(topology=where))


def _spec(codec: str, bucket_bytes: int) -> JobSpec:
    key = codec, bucket_bytes
    if key not in _SPECS:
        _SPECS[key] = load_job_spec(settings=[*parse_codec(codec), f"exchange.bucket_bytes={bucket_bytes}"])
    return _SPECS[key]


def _bytes(spec: JobSpec, elements: int, workers: int) -> tuple[int, int, int]:
    """P, Q and C: what one worker pushes and pulls of one server that has everything, and scales that travel ahead."""
    shared = spec.codec.name is CodecName.SHARED  # the sums of more workers are wider
    key = spec.codec.model_dump_json(), elements, workers if shared else 0
    if key not in _BYTES:
        layout = plan_layout(tensors_of(elements), spec)
        push, scales = push_codec(layout, spec), 0
        pull = pull_codec(layout, spec.model_copy(update={"workers": workers}), 0)
        if isinstance(push, SharedCodec):
            scales = FLOAT32_BYTES * len(push.blocks(0, layout.d))
        _BYTES[key] = push.wire_bytes(0, layout.d), pull.wire_bytes(0, layout.d), scales
    return _BYTES[key]


def _said(said: Prediction) -> dict[str, Any]:
    return {"predicted_s": said.round_s, "fill_s": said.fill_s, "bound": said.bound, "loads_s": said.loads_s}


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SpecError(refusal("a JSON file that can be read", "file", path, str(error))) from None
    if not isinstance(content, dict):
        raise SpecError(refusal("a JSON object", "file", path))
    return content


def print_predict(result: dict[str, Any], console: Console) -> None:
    """The check, the predictions, the crossover points."""
    if console.width < _WIDTH:  # lines of a narrow terminal break, but nothing is cut
        console = Console(file=console.file, width=_WIDTH)
    if result["compared"]:
        check = table("a round: seconds", "measured", "predicted", "error", "bound by")
        for row in result["compared"]:
            numbers = f"{row['measured_s']:.3f}", f"{row['predicted_s']:.3f}", f"{100 * row['error']:+.0f} %"
            check.add_row(row["name"], *numbers, row["bound"])
        console.print(check)
        console.print(f"Median of the errors' sizes: {100 * result['median_error']:.0f} %.", highlight=False)
    for rate_bps in dict.fromkeys(row["rate_bits_per_s"] for row in result["predictions"]):
        shown = table(f"{rate_text(rate_bps)}: seconds by workers", *map(str, workers_shown()))
        for row in result["predictions"]:
            if row["rate_bits_per_s"] == rate_bps:
                seconds = dict(zip(row["workers"], row["round_s"], strict=True))
                cells = [f"{seconds[workers]:.3g}" if workers in seconds else "-" for workers in workers_shown()]
                shown.add_row(f"{row['topology']} {row['codec']}", *cells)
        console.print(shown)
        for codec in dict.fromkeys(each["codec"] for each in result["fastest"]):
            ranges = [
                f"{each['topology']} for {each['first_workers']} to {each['last_workers']}"
                for each in result["fastest"]
                if each["rate_bits_per_s"] == rate_bps and each["codec"] == codec
            ]
            console.print(f"  fastest with codec {codec}: {', '.join(ranges)} workers", highlight=False)
    console.print(f"{result['elements']:,} elements, {result['cores_per_node']} cores per node.", highlight=False)
