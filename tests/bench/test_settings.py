"""Short forms of codecs, topologies and rates, and the settings of a run."""

from __future__ import annotations

import pytest

from bench.settings import (
    Setting,
    encoded_by,
    parse_codec,
    parse_rate,
    parse_topology,
    plan_settings,
    rate_text,
    round_deadline_s,
)
from common.config import CodecName
from common.errors import SpecError


def plan(**changes: object) -> list[Setting]:
    values = {
        "topologies": [parse_topology("colocated", 3), parse_topology("dedicated:2", 3)],
        "codecs": ["8x2", "32"],
        "rates_bps": [10**9, 2 * 10**8],
        "gloo": True,
        "elements": 1000,
    }
    return plan_settings(**{**values, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "settings"),
    [
        ("8", ("codec.name=randomized", "codec.bits=8", "codec.two_sided=false")),
        ("4x2", ("codec.name=randomized", "codec.bits=4", "codec.two_sided=true")),
        ("paper:8x2", ("codec.name=paper", "codec.bits=8", "codec.two_sided=true")),
        ("32", ("codec.name=none", "codec.two_sided=false")),
        ("none", ("codec.name=none", "codec.two_sided=false")),
        ("bf16x2", ("codec.name=bf16", "codec.two_sided=true")),
        ("fp16", ("codec.name=fp16", "codec.two_sided=false")),
    ],
)
def test_codec_has_a_short_form(text: str, settings: tuple[str, ...]) -> None:
    assert parse_codec(text) == settings


@pytest.mark.parametrize("text", ["", "x2", "8x3", "8 x2", "-8", "fp16:8", "eight", "8x2x2", "papr:8"])
def test_codec_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(SpecError, match="expected BITS, BITSx2"):
        parse_codec(text)


@pytest.mark.parametrize(
    ("text", "rate_bps"),
    [("1gbit", 10**9), ("200mbit", 2 * 10**8), ("2.5Gbit/s", 25 * 10**8), ("1000 kbit", 10**6), ("10000000bit", 10**7)],
)
def test_rate_is_read_in_bits_per_second(text: str, rate_bps: int) -> None:
    assert parse_rate(text) == rate_bps
    assert parse_rate(rate_text(rate_bps)) == rate_bps


@pytest.mark.parametrize("text", ["", "1", "1gb", "fast", "-1gbit", "0mbit", "1kbit", "1000gbit", "1e3mbit"])
def test_rate_that_is_none_or_absurd_is_refused(text: str) -> None:
    with pytest.raises(SpecError, match="expected a rate from 1mbit to 100gbit"):
        parse_rate(text)


def test_topologies_place_servers() -> None:
    colocated, dedicated = parse_topology("colocated", 4), parse_topology("dedicated:2", 4)
    assert (colocated.shards, colocated.nodes) == (4, 4)
    assert [colocated.node_of_shard(shard) for shard in range(4)] == [0, 1, 2, 3]
    assert (dedicated.shards, dedicated.nodes) == (2, 6)
    assert [dedicated.node_of_shard(shard) for shard in range(2)] == [4, 5]
    collective = parse_topology("collective", 4)
    assert (collective.shards, collective.nodes) == (0, 4)
    assert str(parse_topology("dedicated", 4)) == "dedicated:1"


@pytest.mark.parametrize(
    "text", ["", "ring", "colocated:2", "dedicated:", "dedicated:0", "dedicated:x", "dedicated:65"]
)
def test_topology_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(SpecError, match="expected colocated, collective, dedicated"):
        parse_topology(text, 4)


def test_topology_is_the_jobs_own() -> None:
    planned = plan(topologies=[parse_topology(name, 3) for name in ("colocated", "collective", "dedicated:2")])
    jobs = {str(setting.topology): setting.spec for setting in planned if setting.spec}
    found = {name: (spec.exchange.topology, spec.servers, spec.shards) for name, spec in jobs.items()}
    assert found == {
        "colocated": ("colocated", 1, 3),
        "collective": ("collective", 1, 1),
        "dedicated:2": ("dedicated", 2, 2),
    }


def test_collectives_encode_no_average_so_that_both_ways_is_one_way_there() -> None:
    assert encoded_by(parse_topology("collective", 3), "8x2") == "8"
    assert encoded_by(parse_topology("colocated", 3), "8x2") == "8x2"
    planned = plan(topologies=[parse_topology("collective", 3)], codecs=["8x2", "8", "32"], rates_bps=[None])
    assert [setting.name for setting in planned] == ["gloo", "collective 8", "collective 32"]


def test_every_rate_has_gloo_and_every_topology_with_every_codec() -> None:
    names = [setting.name for setting in plan()]
    assert names[:5] == [
        "gloo 1gbit",
        "colocated 8x2 1gbit",
        "colocated 32 1gbit",
        "dedicated:2 8x2 1gbit",
        "dedicated:2 32 1gbit",
    ]
    assert len(names) == len(set(names)) == 10


def test_settings_reach_the_job_and_twice_the_same_counts_once() -> None:
    (setting,) = plan(
        topologies=[parse_topology("dedicated:2", 3)] * 2,
        codecs=["4x2", "4x2"],
        rates_bps=[None],
        gloo=False,
        settings=["exchange.bucket_bytes=65536", "deadlines.round_s=7"],
    )
    assert setting.spec is not None
    assert (setting.spec.workers, setting.spec.servers) == (3, 2)
    assert (setting.spec.codec.name, setting.spec.codec.bits) == (CodecName.RANDOMIZED, 4)
    assert setting.spec.codec.two_sided
    assert setting.spec.exchange.bucket_bytes == 65536
    assert setting.deadline_s == 37.0
    assert setting.name == "dedicated:2 4x2"


def test_environment_gives_way_to_flags() -> None:
    environment = {"DATPS_EXCHANGE__BUCKET_BYTES": "65536", "DATPS_WORKERS": "9", "DATPS_JSON": "1"}
    setting = plan(environment=environment, reserved=frozenset({"DATPS_JSON"}))[-1]
    assert setting.spec is not None
    assert setting.spec.workers == 3
    assert setting.spec.exchange.bucket_bytes == 65536


@pytest.mark.parametrize(
    "key", ["workers", "servers", "exchange.topology", "codec.bits", "codec.two_sided", "codec.name", "job_id"]
)
def test_setting_that_belongs_to_a_flag_is_refused(key: str) -> None:
    with pytest.raises(SpecError, match=f"expected the flag for {key}"):
        plan(settings=[f"{key}=1"])


def test_slow_links_get_longer_deadlines() -> None:
    assert round_deadline_s(6, 10**6, None) == 120.0
    assert round_deadline_s(6, 10**6, 10**6) == 120.0 + 5 * 6 * 32
