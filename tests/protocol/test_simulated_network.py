"""Server and workers over a simulated network: whatever it does, all workers decode the plain reference's averages."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.codecs import SERVER, Codec, Encoded, Float32, RandomKey
from common.config import CodecSpec, ExchangeSpec, JobSpec
from common.layout import TensorSpec, pull_codec, push_codec
from tests.protocol.simulation import Averages, DeadlockError, Message, Simulation, local_vectors
from worker.session import Push

TENSORS = [
    TensorSpec(name="conv.weight", shape=(5, 3, 3), buffer=False),
    TensorSpec(name="conv.bias", shape=(5,), buffer=False),
    TensorSpec(name="bn.mean", shape=(5,), buffer=True),
    TensorSpec(name="fc.weight", shape=(7, 9), buffer=False),
    TensorSpec(name="@metrics", shape=(6,), buffer=True),
]
"""113 parameters and 11 elements of state: odd lengths, so that no cut falls where a block or a byte ends by chance."""

CODECS = {
    "none": CodecSpec(name="none"),
    "randomized 8, two-sided": CodecSpec(bits=8, block=8, two_sided=True),
    "randomized 4, two-sided": CodecSpec(bits=4, block=16, two_sided=True),
    "randomized 4, one-sided": CodecSpec(bits=4, block=8),
    "randomized 8, layer, two-sided": CodecSpec(bits=8, block="layer", two_sided=True),
    "randomized 8, all, two-sided": CodecSpec(bits=8, block="all", scale="l2", two_sided=True),
    "paper 8, two-sided": CodecSpec(name="paper", bits=8, two_sided=True),
}
every_codec = pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)


def job(codec: CodecSpec, *, workers: int, servers: int, bucket_bytes: int = 48) -> JobSpec:
    """A job whose buckets are smaller than a job spec allows, so that small vectors have several."""
    exchange = ExchangeSpec.model_construct(bucket_bytes=bucket_bytes)
    spec = JobSpec(seed=5, workers=workers, servers=servers, codec=codec)
    return spec.model_copy(update={"exchange": exchange})


# The plain reference


def through(codec: Codec, values: Float32, start: int, key: RandomKey) -> Float32:
    """Encodes and decodes a whole range at once."""
    encoded: Encoded = codec.encode(values, start, key, codec.measure(values, start))
    out = np.empty_like(values)
    codec.decode(encoded, start, out, add=False)
    return out


def mean(vectors: list[Float32]) -> Float32:
    """Equation (A3): added in order, in float32, and divided by M."""
    total = vectors[0].copy()
    for vector in vectors[1:]:
        total += vector
    return total / np.float32(len(vectors))


def reference(simulation: Simulation) -> dict[int, Averages]:
    """Algorithm A1, lines 7 to 11, in one process: no buckets, no messages, no machines."""
    spec, layout = simulation.spec, simulation.layout
    averages: dict[int, Averages] = {}
    for round_ in range(simulation.first_round, simulation.stop_round):
        local = [local_vectors(layout, i, round_, averages.get(round_ - 1)) for i in range(spec.workers)]
        keys = [RandomKey(seed=spec.seed, round=round_, source=source) for source in (*range(spec.workers), SERVER)]
        pushed = [through(push_codec(layout, spec), gradient, 0, keys[i]) for i, (gradient, _) in enumerate(local)]
        average = mean(pushed)
        for (start, stop), shard in {layout.encoder_range(shard): shard for shard in range(spec.servers)}.items():
            average[start:stop] = through(pull_codec(layout, spec, shard), average[start:stop], start, keys[-1])
        averages[round_] = average, mean([state for _, state in local])
    return averages


def assert_outcome(simulation: Simulation) -> None:
    """All rounds complete at all workers, all bits those of the reference, everything added once."""
    spec, expected = simulation.spec, reference(simulation)
    for worker in simulation.workers:
        assert list(worker.results) == list(expected)
        for round_, (gradient, state) in worker.results.items():
            assert gradient.tobytes() == expected[round_][0].tobytes(), f"worker {worker.index}, round {round_}"
            assert state.tobytes() == expected[round_][1].tobytes(), f"worker {worker.index}, round {round_}"
    for shard, server in enumerate(simulation.servers):
        numbers = [bucket.number for bucket in simulation.layout.of_shard(shard)]
        rounds = range(simulation.first_round, simulation.stop_round)
        assert server.added == dict.fromkeys(product(rounds, numbers, range(spec.workers)), 1)
        assert {round_ for round_, _ in server.averages} == {simulation.stop_round - 1}


# Whatever the network does

schedules = st.one_of(
    st.binary(max_size=300),
    st.builds(lambda seed, length: Random(seed).randbytes(length), st.integers(0, 1 << 32), st.integers(0, 2500)),
)
"""Short ones that shrink well, and long ones that keep the network wild until the end."""


@every_codec
@given(workers=st.integers(1, 4), servers=st.integers(1, 3), first_round=st.sampled_from([0, 7]), schedule=schedules)
@settings(max_examples=25, deadline=None)
def test_all_workers_decode_the_references_averages_whatever_the_network_does(
    codec: CodecSpec, workers: int, servers: int, first_round: int, schedule: bytes
) -> None:
    spec = job(codec, workers=workers, servers=servers)
    simulation = Simulation(TENSORS, spec, first_round=first_round)
    simulation.run(schedule)
    assert_outcome(simulation)


@given(schedule=schedules)
@settings(max_examples=15, deadline=None)
def test_averages_of_blocks_do_not_depend_on_the_number_of_servers_or_the_size_of_buckets(schedule: bytes) -> None:
    results = []
    for servers, bucket_bytes in ((1, 1 << 10), (3, 20)):
        spec = job(CODECS["randomized 4, two-sided"], workers=3, servers=servers, bucket_bytes=bucket_bytes)
        simulation = Simulation(TENSORS, spec)
        simulation.run(schedule)
        results.append([gradient.tobytes() for gradient, _ in simulation.workers[0].results.values()])
    assert results[0] == results[1]


def test_order_of_arrival_would_change_the_average() -> None:
    """So the property above is not true by chance: float32 addition in another order gives other bits."""
    simulation = Simulation(TENSORS, job(CODECS["none"], workers=3, servers=1))
    gradients = [local_vectors(simulation.layout, worker, 0, None)[0] for worker in range(3)]
    assert mean(gradients).tobytes() != mean(gradients[::-1]).tobytes()


# Scripted faults

TWO_SIDED = CODECS["randomized 8, two-sided"]


def started(*, workers: int = 1, servers: int = 2) -> Simulation:
    """All streams are open and all workers have encoded the first round; nothing of it has been delivered."""
    simulation = Simulation(TENSORS, job(TWO_SIDED, workers=workers, servers=servers))
    for shard in range(servers):
        for worker in simulation.workers:
            worker.connect(shard)
        simulation.deliver(shard=shard)
    for worker in simulation.workers:
        work(simulation, worker.index)
    return simulation


def work(simulation: Simulation, worker: int) -> None:
    while simulation.workers[worker].can_work():
        simulation.workers[worker].work()


def pushes(simulation: Simulation, *, workers: Sequence[int], shard: int = 0) -> list[Message]:
    """Contributions of these workers that are in flight to a shard."""
    of_shard = (message for message in simulation.in_flight if message.stream.shard == shard)
    return [message for message in of_shard if isinstance(message.content, Push) and message.stream.worker in workers]


def test_worker_that_goes_on_while_its_hello_is_on_its_way_pushes_what_it_encoded_meanwhile() -> None:
    """The Hello says round 0, the shard has round 1 open, and so has the worker by the time the Welcome arrives."""
    simulation = started()
    simulation.deliver(shard=0)
    simulation.break_stream(0, 0)
    simulation.workers[0].connect(0)
    simulation.deliver(shard=1)
    work(simulation, 0)
    simulation.deliver(shard=0)
    simulation.run(b"")
    assert_outcome(simulation)


def test_break_in_mid_round_makes_a_worker_push_again_just_what_the_shard_lacks() -> None:
    simulation = started(workers=2)
    numbers = [bucket.number for bucket in simulation.layout.of_shard(0)]
    simulation.deliver_one(pushes(simulation, workers=[0])[0])
    simulation.break_stream(0, 0)
    assert pushes(simulation, workers=[0]) == []
    simulation.workers[0].connect(0)
    simulation.deliver_one(simulation.in_flight[-1])  # Hello
    simulation.deliver_one(simulation.in_flight[-1])  # Welcome
    assert [message.content for message in pushes(simulation, workers=[0])] == [
        Push(shard=0, round=0, bucket=number) for number in numbers[1:]
    ]
    simulation.run(b"")
    assert_outcome(simulation)


def test_average_that_is_lost_with_its_stream_is_sent_again() -> None:
    simulation = started(workers=2, servers=1)
    for message in pushes(simulation, workers=[0, 1]):
        simulation.deliver_one(message)
    simulation.break_stream(1, 0)
    simulation.run(b"")
    assert_outcome(simulation)


def test_nothing_is_published_while_one_worker_lags_and_its_contributions_are_added_in_its_turn() -> None:
    simulation = started(workers=3, servers=1)
    for message in pushes(simulation, workers=[0, 2]):
        simulation.deliver_one(message)
    assert simulation.servers[0].averages == {}
    assert simulation.servers[0].rounds.waiting_for == (1,)
    simulation.run(b"")
    assert_outcome(simulation)


# The simulation sees what it looks for


def test_simulation_notices_a_deadlock() -> None:
    simulation = started(workers=2)
    simulation.in_flight.clear()
    with pytest.raises(DeadlockError, match="nothing can happen any more"):
        simulation.run(b"")


def test_simulation_notices_a_replica_that_differs() -> None:
    simulation = started(workers=2, servers=1)
    simulation.deliver(shard=0)
    simulation.workers[1].results[0][0][5] += np.float32(1e-6)
    with pytest.raises(AssertionError, match="the replicas differ"):
        simulation.run(b"")


def test_empty_schedule_runs_undisturbed() -> None:
    simulation = Simulation(TENSORS, job(TWO_SIDED, workers=4, servers=3))
    simulation.run(b"")
    assert_outcome(simulation)
    assert len(simulation.log) == 3 * 2 * 4 * len(simulation.layout.buckets) + 2 * 4 * 3
