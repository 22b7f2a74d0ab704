"""`datps train --trace` in real processes: one file with every phase of every bucket."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from common.spec_sources import load_job_spec
from tests.local.support import CPU, dataset_of
from tests.phases import assert_collectives_took_part, assert_servers_took_part, spans_of
from tests.processes.test_processes import datps
from worker.workplace import Workplace

pytestmark = [pytest.mark.processes, pytest.mark.timeout(360)]

SETTINGS = (
    *("workers=2", "model.width=4", "data.batch_per_worker=256", "schedule.epochs=1", "evaluation.every_epochs=0"),
    *("attack.epsilon=0.2", "attack.steps=1", "attack.step_size=0.1", "evaluation.attack.steps=1"),
    *("exchange.bucket_bytes=1024", "checkpoint.every_epochs=0"),
)
WORKERS = ("worker-0", "worker-1")
WAIT_S = 300.0
"""Ten seconds where the cores are idle; most of them are imports of five processes."""
TWO_SIDED, ONE_SIDED = ("codec.bits=8", "codec.two_sided=true"), "codec.two_sided=false"
OF_ROUNDS = {"evaluate", "attack", "check", "forward and backward", "wait for averages", "update"}


@pytest.mark.parametrize(
    ("settings", "processes"),
    [
        (TWO_SIDED, {"server-0", *WORKERS}),
        (("exchange.topology=colocated", *TWO_SIDED), {"server-0", "shard-0", "shard-1", *WORKERS}),
        (("exchange.topology=collective", "codec.name=none", ONE_SIDED), {"server-0", *WORKERS}),
        (("exchange.topology=collective", "codec.bits=8", ONE_SIDED), {"server-0", *WORKERS}),
    ],
    ids=["dedicated", "colocated", "all-reduce", "all-gather of 8 bits"],
)
def test_every_phase_of_every_bucket_is_in_the_trace_once_for_each_process_that_takes_part(
    settings: tuple[str, ...], processes: set[str], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    arguments = ("train", "--no-baseline", "--trace", "--json", "--out", str(out))
    with datps(*arguments, settings=(*SETTINGS, *settings)) as process:
        output, errors = process.communicate(timeout=WAIT_S)
    assert process.returncode == 0, output + errors
    rounds = json.loads((out / "result.json").read_text())["rounds"]
    spec = load_job_spec(yaml_text=(out / "job.yaml").read_text(), yaml_name="job.yaml")
    layout = Workplace.build(spec, dataset_of(spec), CPU, None, None).layout
    assert rounds >= 2
    assert len(layout.buckets) > 4

    spans = spans_of(out / "trace.json")
    named = [event for event in json.loads((out / "trace.json").read_text())["traceEvents"] if event["ph"] == "M"]
    assert {event["args"]["name"] for event in named if event["name"] == "process_name"} == processes
    if spec.exchange.topology == "collective":
        assert_collectives_took_part(spans, layout, rounds, WORKERS, summed=spec.codec.name == "none")
    else:
        servers = sorted(name for name in processes if name.startswith("shard-")) or ["server-0"]
        assert_servers_took_part(spans, layout, rounds, WORKERS, servers)
    of_rounds = [(span.process, span.args["round"], span.name) for span in spans if span.track == "rounds"]
    assert sorted(of_rounds) == sorted((w, r, name) for w in WORKERS for r in range(rounds) for name in OF_ROUNDS)
