"""Averages without servers: a parameter server's bits, or the float32 mean; the same on all workers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from common.codecs import Float32, RandomKey
from common.config import JobSpec
from common.layout import BucketKind, Layout, plan_layout, push_codec, state_codec
from tests.collective.support import collective, collective_members
from tests.support import DEADLINE_S, TENSORS, in_threads, job, members, running_server, running_servers
from worker.exchange.base import Traffic
from worker.exchange.gradients import HostGradient

ROUNDS = 2
ONE_SIDED = {
    "fp16": ["codec.name=fp16"],
    "bf16": ["codec.name=bf16"],
    "8 bits": ["codec.bits=8"],
    "4 bits in blocks of 64": ["codec.bits=4", "codec.block=64"],
    "3 bits l2 by layer": ["codec.bits=3", "codec.block=layer", "codec.scale=l2"],
    "16 bits of all": ["codec.bits=16", "codec.block=all"],
    "paper 8 bits": ["codec.name=paper", "codec.bits=8"],
    "rotated 2 bits": ["codec.name=rotated", "codec.bits=2", "codec.block=64"],
    "sign": ["codec.name=sign", "codec.block=64"],
    "topk": ["codec.name=topk", "codec.block=64", "codec.density=1/8"],
}


def gradients(layout: Layout, workers: int) -> Float32:
    """float32 [rounds, workers, d] of very different magnitudes, so that the order of additions matters."""
    random = np.random.default_rng(7)
    shape = (ROUNDS, workers, layout.d)
    return (random.standard_normal(shape) * 10.0 ** random.integers(-6, 3, shape)).astype(np.float32)


def states(layout: Layout, workers: int) -> Float32:
    return np.random.default_rng(8).standard_normal((ROUNDS, workers, layout.e)).astype(np.float32)


def averages(joined: list[Any], average: Callable[[Any, int, Float32, Float32, bytes], object]) -> list[list[Any]]:
    """The averages of all rounds, [worker][round] -> (gradient, state)."""
    layout = joined[0].layout
    g, s = gradients(layout, len(joined)), states(layout, len(joined))

    def work(worker: int) -> list[tuple[Float32, Float32]]:
        got = []
        for round_ in range(ROUNDS):
            gradient, state = g[round_, worker].copy(), s[round_, worker].copy()
            average(joined[worker], round_, gradient, state, b"%016d" % round_)
            got.append((gradient, state))
        return got

    return in_threads([lambda w=worker: work(w) for worker in range(len(joined))])


def by_collectives(spec: JobSpec) -> list[list[Any]]:
    with running_server(spec) as server, collective_members(spec, server.address) as joined:
        got = averages(joined, lambda member, *round_: member.average(*round_))
        in_threads([member.leave for member in joined])
        assert server.outcome.result(DEADLINE_S).exit_code == 0
    return got


def by_servers(spec: JobSpec) -> list[list[Any]]:
    with running_servers(spec) as servers, members(spec, servers[0].address) as joined:
        return averages(joined, lambda member, *round_: member.exchange.average(*round_))


def as_bytes(got: list[list[Any]]) -> list[list[Any]]:
    return [[(gradient.tobytes(), state.tobytes()) for gradient, state in rounds] for rounds in got]


@pytest.mark.parametrize("codec", ONE_SIDED, ids=ONE_SIDED.keys())
def test_a_one_sided_average_has_the_bits_of_parameter_servers(codec: str) -> None:
    """Of biased codecs also in the second round, to which each worker adds its residual of the first."""
    settings = ("workers=3", "exchange.bucket_bytes=1024", "seed=5", *ONE_SIDED[codec])
    expected = as_bytes(by_servers(job("servers=2", *settings)))
    assert as_bytes(by_collectives(collective(*settings))) == expected


def test_without_codec_the_average_is_the_mean_within_rounding_and_the_same_on_all_workers() -> None:
    spec = collective("workers=3", "codec.name=none", "exchange.bucket_bytes=1024")
    got = by_collectives(spec)
    assert as_bytes(got) == [as_bytes(got)[0]] * 3
    layout = plan_layout(TENSORS, spec)
    g, s = gradients(layout, 3), states(layout, 3)
    for round_ in range(ROUNDS):
        gradient, state = got[0][round_]
        magnitude = np.abs(g[round_].astype(np.float64)).sum(axis=0)
        assert (np.abs(gradient - g[round_].astype(np.float64).mean(axis=0)) <= 2 * 2.0**-24 * magnitude).all()
        assert np.array_equal(state, (s[round_, 0] + s[round_, 1] + s[round_, 2]) / np.float32(3))


@pytest.mark.parametrize("settings", [["codec.name=none"], ["codec.bits=4"]], ids=" ".join)
def test_one_worker_alone_gets_back_what_it_has_encoded(settings: list[str]) -> None:
    spec = collective("workers=1", *settings)
    layout = plan_layout(TENSORS, spec)
    push, own = push_codec(layout, spec), gradients(layout, 1)
    for round_, (gradient, state) in enumerate(by_collectives(spec)[0]):
        expected = np.empty(layout.d, np.float32)
        key = RandomKey(seed=spec.seed, round=round_, source=0)
        push.decode(push.encode(own[round_, 0], 0, key), 0, expected, add=False)
        assert np.array_equal(gradient, expected)
        assert np.array_equal(state, states(layout, 1)[round_, 0])


def test_a_window_of_less_than_a_bucket_changes_nothing() -> None:
    settings = ("workers=2", "codec.bits=8", "exchange.bucket_bytes=2048")
    expected = as_bytes(by_collectives(collective(*settings)))
    assert as_bytes(by_collectives(collective(*settings, "exchange.window_bytes=1024"))) == expected


def traffic_of(spec: JobSpec) -> tuple[Traffic, Layout]:
    with running_server(spec) as server, collective_members(spec, server.address) as joined:
        return in_threads([member.average for member in joined])[0], joined[0].layout


def test_traffic_is_what_the_ring_algorithms_put_on_a_workers_link() -> None:
    header = 24
    traffic, layout = traffic_of(collective("workers=4", "codec.name=none"))
    assert traffic.pushed_bytes == traffic.pulled_bytes == 2 * 3 * layout.d + 3 * 4 * layout.e + 3 * header
    spec = collective("workers=3", "codec.bits=4")
    traffic, layout = traffic_of(spec)
    push, plain = push_codec(layout, spec), state_codec(layout)
    encoded = sum(
        (push if bucket.kind is BucketKind.GRADIENT else plain).wire_bytes(bucket.start, bucket.n)
        for bucket in layout.buckets
    )
    assert traffic.pushed_bytes == traffic.pulled_bytes == 2 * (encoded + header)
    assert 0 < traffic.waited_s <= traffic.seconds
    assert traffic_of(collective("workers=1"))[0].pushed_bytes == 0


def test_a_bucket_is_exchanged_while_others_are_not_ready_yet() -> None:
    spec = collective("workers=2", "codec.name=none", "exchange.bucket_bytes=1024")
    with running_server(spec) as server, collective_members(spec, server.address) as joined:
        layout = joined[0].layout
        vectors = [np.full(layout.d, worker + 1, np.float32) for worker in range(2)]
        first = layout.buckets[0]
        for member, vector in zip(joined, vectors, strict=True):
            member.exchange.begin(0, HostGradient(vector), b"d" * 16)
            member.exchange.ready([first.number])
        for member in joined:
            exchange: Any = member.exchange
            with exchange._condition:
                assert exchange._condition.wait_for(lambda e=exchange: first.number not in e._awaited, DEADLINE_S)
        assert all((vector[: first.n] == 1.5).all() for vector in vectors)
        assert all((vector[first.n :] == worker + 1).all() for worker, vector in enumerate(vectors))
