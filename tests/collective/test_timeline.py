"""The timelines of workers that exchange through collectives: every phase of every bucket, by round and bucket."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from common.timeline import Timeline
from tests.collective.support import CollectiveMember, collective, join
from tests.phases import assert_collectives_took_part, spans_of
from tests.support import DEADLINE_S, in_threads, running_server

WORKERS, ROUNDS = ("worker-0", "worker-1"), 2


@pytest.mark.parametrize("codec", ["codec.name=none", "codec.bits=8", "codec.name=paper"])
def test_every_phase_of_every_bucket_is_there_once_for_each_worker(codec: str, tmp_path: Path) -> None:
    spec = collective("workers=2", "exchange.bucket_bytes=1024", codec)
    timelines = {name: Timeline(name, on=True) for name in WORKERS}
    with running_server(spec) as server, ExitStack() as stack:
        with ThreadPoolExecutor(2) as pool:
            joining = [pool.submit(join, server.address, name, timeline=timelines[name]) for name in WORKERS]
            joined = [future.result(DEADLINE_S) for future in joining]
        stack.callback(lambda: in_threads([member.vanish for member in joined]))
        for round_ in range(ROUNDS):
            in_threads([lambda each=member, now=round_: each.average(now) for member in joined])
        in_threads([lambda each=member: CollectiveMember.leave(each) for member in joined])
        layout = joined[0].layout
    spans = []
    for name, timeline in timelines.items():
        timeline.write(tmp_path / f"{name}.json")
        spans += spans_of(tmp_path / f"{name}.json")
    assert len(layout.buckets) > 4
    assert_collectives_took_part(spans, layout, ROUNDS, WORKERS, summed=codec == "codec.name=none")
    kinds = {(span.args["bucket"], span.args["kind"]) for span in spans}
    assert kinds == {(bucket.number, bucket.kind.value) for bucket in layout.buckets}
