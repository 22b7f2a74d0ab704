"""What is measured: topologies, codecs and link rates, as people write them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from common.config import CodecName, JobSpec
from common.config import Topology as TopologyKind
from common.errors import SpecError, refusal
from common.spec_sources import load_job_spec

JOB_ID = "bench"
OWN_KEYS = ("workers", "servers", "exchange.topology", "codec.name", "codec.bits", "codec.two_sided", "job_id")
"""Keys of the job spec that the laboratory's own flags set."""
_JOIN_S = 300.0
_GRACE_S = 30.0
"""What workers get beyond the servers' deadline, which knows whom it waits for."""
_UNITS = {"bit": 1, "kbit": 10**3, "mbit": 10**6, "gbit": 10**9}
_RATE = re.compile(r"(\d+(?:\.\d+)?) ?([kmg]?bit)(?:/s)?")
_CODEC = re.compile(r"(?:(?:(?P<family>[a-z_]+):)?(?P<bits>\d+)|(?P<name>[a-z_]+?\d*?))(?P<two_sided>x2)?")


@dataclass(frozen=True, kw_only=True)
class Topology:
    """Who averages, and where.

    Attributes:
        kind: dedicated: each server has a node of its own; colocated: worker i's node runs shard i; collective: nobody.
        workers: M; worker i runs on node i.
        shards: S, each with a process of its own; colocated: S = M; collective: 0.
    """

    kind: TopologyKind
    workers: int
    shards: int

    @property
    def nodes(self) -> int:
        """Nodes in all."""
        return self.workers + (self.shards if self.kind is TopologyKind.DEDICATED else 0)

    def node_of_shard(self, shard: int) -> int:
        """The node that a shard's server runs on."""
        return shard if self.kind is TopologyKind.COLOCATED else self.workers + shard

    @property
    def settings(self) -> tuple[str, ...]:
        """Of the job spec."""
        servers = self.shards if self.kind is TopologyKind.DEDICATED else 1
        return f"workers={self.workers}", f"servers={servers}", f"exchange.topology={self.kind.value}"

    def __str__(self) -> str:
        return f"{self.kind.value}:{self.shards}" if self.kind is TopologyKind.DEDICATED else self.kind.value


def parse_topology(text: str, workers: int) -> Topology:
    """`colocated`, `collective`, `dedicated` (one server) or `dedicated:3`.

    Raises:
        SpecError: it is none of these.
    """
    kind, colon, count = text.partition(":")
    if kind == TopologyKind.DEDICATED and (not colon or (count.isdecimal() and 1 <= int(count) <= 64)):
        return Topology(kind=TopologyKind.DEDICATED, workers=workers, shards=int(count) if colon else 1)
    if kind == TopologyKind.COLOCATED and not colon:
        return Topology(kind=TopologyKind.COLOCATED, workers=workers, shards=workers)
    if kind == TopologyKind.COLLECTIVE and not colon:
        return Topology(kind=TopologyKind.COLLECTIVE, workers=workers, shards=0)
    raise SpecError(refusal("colocated, collective, dedicated or dedicated:1 to dedicated:64", "topology", text))


def parse_codec(text: str) -> tuple[str, ...]:
    """The settings that a codec's short form means.

    `8` is 8 bits, `8x2` two-sided, `32` float32; `paper:8x2` names the family; `fp16`, `bf16` and `none` are names.

    Raises:
        SpecError: it is none of these.
    """
    match, names = _CODEC.fullmatch(text), [name.value for name in CodecName]
    if match is None or (match["family"] or match["name"] or CodecName.NONE) not in names:
        rule = f"BITS, BITSx2, NAME or NAME:BITS with a name among {', '.join(names)}"
        raise SpecError(refusal(rule, "codec", text, "e.g. 8x2, 4x2, 32, paper:8x2, fp16"))
    two_sided = f"codec.two_sided={'true' if match['two_sided'] else 'false'}"
    if match["name"] or match["bits"] == "32":
        return f"codec.name={match['name'] or 'none'}", two_sided
    return f"codec.name={match['family'] or 'randomized'}", f"codec.bits={match['bits']}", two_sided


def encoded_by(topology: Topology, codec: str) -> str:
    """The codec's short form as a topology can have it: collectives encode no average, so there `8x2` is `8`."""
    return codec.removesuffix("x2") if topology.kind is TopologyKind.COLLECTIVE else codec


def default_topologies(codecs: Sequence[str]) -> list[str]:
    """All of ours that can have each of these codecs: integers that a server adds need a server.

    Raises:
        SpecError: one is no codec.
    """
    needs_server = any(f"codec.name={CodecName.SHARED.value}" in parse_codec(codec) for codec in codecs)
    return ["colocated", "dedicated:1", *([] if needs_server else ["collective"])]


def parse_rate(text: str) -> int:
    """Bits per second of `1gbit`, `200mbit`, `2.5gbit`.

    Raises:
        SpecError: it is no rate, or below 1 Mbit/s or above 100 Gbit/s.
    """
    match = _RATE.fullmatch(text.strip().lower())
    rate_bps = round(float(match[1]) * _UNITS[match[2]]) if match else 0
    if not 10**6 <= rate_bps <= 10**11:
        raise SpecError(refusal("a rate from 1mbit to 100gbit", "rate", text, "e.g. 1gbit, 200mbit"))
    return rate_bps


def rate_text(rate_bps: int) -> str:
    """The inverse of `parse_rate`."""
    name, unit = next((name, unit) for name, unit in reversed(_UNITS.items()) if rate_bps >= unit)
    return f"{rate_bps / unit:g}{name}"


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One row of the result: what runs, and on which links.

    Attributes:
        topology: None for gloo.
        codec: the short form; empty for gloo.
        spec: the job; None for gloo.
        rate_bps: of every link, each way; None on loopback.
        deadline_s: after which a round is given up.
    """

    topology: Topology | None
    codec: str
    spec: JobSpec | None
    rate_bps: int | None
    deadline_s: float

    @property
    def name(self) -> str:
        """For people and logs."""
        what = f"{self.topology} {self.codec}" if self.topology else "gloo"
        return what if self.rate_bps is None else f"{what} {rate_text(self.rate_bps)}"


def plan_settings(
    *,
    topologies: Sequence[Topology],
    codecs: Sequence[str],
    rates_bps: Sequence[int | None],
    gloo: bool,
    elements: int,
    settings: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
    reserved: frozenset[str] = frozenset(),
) -> list[Setting]:
    """All settings of a run: for every rate gloo, then every topology with every codec.

    `elements` is the gradient's length; `settings`, `environment` and `reserved` are those of `load_job_spec`.

    Raises:
        SpecError: a codec or setting is none, or a setting belongs to a flag of ours.
    """
    for key in (setting.partition("=")[0].strip() for setting in settings):
        if key in OWN_KEYS:
            raise SpecError(refusal(f"the flag for {key}", "--set", key, "the laboratory has flags of its own for it"))
    planned = []
    for rate_bps in dict.fromkeys(rates_bps):
        workers = max(topology.workers for topology in topologies)
        round_s = round_deadline_s(workers, elements, rate_bps)
        if gloo:
            planned.append(Setting(topology=None, codec="", spec=None, rate_bps=rate_bps, deadline_s=round_s))
        for topology in dict.fromkeys(topologies):
            for codec in dict.fromkeys(encoded_by(topology, codec) for codec in codecs):
                own = (*topology.settings, *parse_codec(codec))
                defaults = {"deadlines": {"join_s": _JOIN_S, "round_s": round_s}}
                spec = load_job_spec(
                    yaml_text=json.dumps(defaults),
                    yaml_name="the laboratory's defaults",
                    environment=environment,
                    reserved=reserved,
                    settings=[*settings, *own, f"job_id={JOB_ID}"],
                )
                deadline_s = spec.deadlines.round_s + _GRACE_S
                planned.append(
                    Setting(topology=topology, codec=codec, spec=spec, rate_bps=rate_bps, deadline_s=deadline_s)
                )
    return planned


def round_deadline_s(workers: int, elements: int, rate_bps: int | None) -> float:
    """Seconds after which a round is surely stuck: two minutes, and five times what all gradients take on one link."""
    return 120.0 + (0.0 if rate_bps is None else 5 * 8 * 4 * workers * elements / rate_bps)
