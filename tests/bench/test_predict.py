"""Predictions beside a result of the laboratory; no process is started, rates are given."""

from __future__ import annotations

import io
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from bench import codec_speed
from bench.cost_model import Cluster, Kind, Load, predict
from bench.predict import Question, fastest_ranges, print_predict, run_predict, workers_shown
from bench.rates import LoopbackRow, kernel_rates, ring_costs, split_costs
from common.errors import SpecError
from tests.bench.test_cost_model import KERNEL, WIRE
from worker.exchange.feedback import ErrorFeedback

ELEMENTS = 512 * 2000
QUESTION = Question(
    topologies=("dedicated:1", "colocated", "collective"),
    codecs=("32", "8x2"),
    rates_bps=(10**9,),
    elements=ELEMENTS,
    cores_per_node=2,
)


@pytest.fixture
def rates(tmp_path: Path) -> Path:
    kernels = {codec: asdict(KERNEL) for codec in ("none", "32", "8", "8x2", "shared:4", "shared:8")}
    path = tmp_path / "rates.json"
    path.write_text(json.dumps({"rates": {"kernels": kernels, "wire": asdict(WIRE)}}))
    return path


def measured_rows() -> list[dict[str, Any]]:
    shared = {"rate_bits_per_s": 10**9, "workers": 3, "elements": ELEMENTS, "median_s": 0.1}
    ours = {"exchange": "ours", "topology": "colocated", "codec": "8x2", "bucket_bytes": 1 << 18}
    return [
        {"name": "gloo 1gbit", "exchange": "gloo", "topology": "ring", "codec": "32", **shared},
        {"name": "colocated 8x2 1gbit", **ours, **shared},
    ]


def quiet(_text: str) -> None:
    pass


def test_result_of_the_laboratory_is_read_and_compared(tmp_path: Path, rates: Path) -> None:
    goodput = {"rate_bits_per_s": 10**9, "goodput_bits_per_s": 9 * 10**8}
    measured = tmp_path / "network.json"
    environment = {"cores": 2, "link_goodput": [goodput]}
    measured.write_text(json.dumps({"environment": environment, "rows": measured_rows()}))
    result = run_predict(measured, rates, QUESTION, quiet)
    gloo, colocated = result["compared"]
    payload_bytes = ELEMENTS + 4 * 2000
    load = Load(elements=ELEMENTS, pushed_bytes=payload_bytes, pulled_bytes=payload_bytes, bucket_bytes=1 << 18)
    cluster = Cluster(kind=Kind.COLOCATED, workers=3, shards=3, rate_bps=10**9, cores_per_node=2, cores_shared=2)
    assert colocated["predicted_s"] == predict(cluster, load, KERNEL, replace(WIRE, goodput=0.9)).round_s
    assert colocated["error"] == pytest.approx((colocated["predicted_s"] - 0.1) / 0.1)
    assert gloo["predicted_s"] > 8 * 4 / 3 * 4 * ELEMENTS / 9e8
    assert result["median_error"] == pytest.approx((abs(gloo["error"]) + abs(colocated["error"])) / 2)


def test_every_topology_and_codec_is_predicted_up_to_a_thousand_workers(rates: Path) -> None:
    result = run_predict(None, rates, QUESTION, quiet)
    assert (workers_shown()[0], workers_shown()[-1]) == (2, 1024)
    names = [(row["topology"], row["codec"]) for row in result["predictions"]]
    assert names == [
        *(("dedicated:1", "32"), ("dedicated:1", "8x2")),
        *(("colocated", "32"), ("colocated", "8x2")),
        *(("collective", "32"), ("collective", "8")),
    ]
    for row in result["predictions"]:
        assert row["round_s"] == sorted(row["round_s"])
        assert len(row["round_s"]) == len(workers_shown())
    for codec in QUESTION.codecs:
        ranges = [each for each in result["fastest"] if each["codec"] == codec]
        assert (ranges[0]["first_workers"], ranges[-1]["last_workers"]) == (2, 1024)
    assert result["compared"] == []


def test_sums_that_servers_add_are_wider_for_more_workers_and_their_scales_travel_ahead(rates: Path) -> None:
    result = run_predict(None, rates, replace(QUESTION, codecs=("shared:4",)), quiet)
    assert [row["topology"] for row in result["predictions"]] == [
        "dedicated:1",
        "colocated",
    ]  # no server adds otherwise
    row = result["predictions"][0]
    for workers, sum_bits in ((2, 5), (4, 6), (16, 8), (32, 16), (1024, 16)):  # of +-7 times as many
        load = Load(
            elements=ELEMENTS,
            pushed_bytes=ELEMENTS // 2,
            pulled_bytes=ELEMENTS * sum_bits // 8,
            bucket_bytes=512 << 10,
            scale_bytes=4 * 2000,
        )
        cluster = Cluster(kind=Kind.DEDICATED, workers=workers, shards=1, rate_bps=10**9, cores_per_node=2)
        assert row["round_s"][row["workers"].index(workers)] == predict(cluster, load, KERNEL, WIRE).round_s


def test_nothing_is_said_of_more_workers_than_the_sums_have_room_for(rates: Path) -> None:
    question = replace(QUESTION, codecs=("8x2", "shared:8"))
    result = run_predict(None, rates, question, quiet)
    for row in result["predictions"]:
        most = 256 if row["codec"] == "shared:8" else 1024  # 32,767 / 127 = 258
        assert row["workers"] == [workers for workers in workers_shown() if workers <= most]
        assert len(row["round_s"]) == len(row["workers"])
    assert max(each["last_workers"] for each in result["fastest"] if each["codec"] == "shared:8") == 258
    text = io.StringIO()
    print_predict(result, Console(file=text, width=200))
    (line,) = (line for line in text.getvalue().splitlines() if "colocated shared:8" in line)
    assert line.split()[-2:] == ["-", "-"]


def test_a_codec_that_no_topology_can_have_is_refused_before_anything_is_measured() -> None:
    question = replace(QUESTION, topologies=("collective",), codecs=("shared:4",))
    rule = r"expected dedicated or colocated among the topologies \(codec shared:4: .*\), got topology=collective"
    with pytest.raises(SpecError, match=rule):
        run_predict(None, None, question, pytest.fail)


def test_fastest_is_told_by_range() -> None:
    def at(workers: int, name: str) -> float:
        return {"line": float(workers), "flat": 5.0}[name]

    assert fastest_ranges(at, ["line", "flat"], 9) == [(2, 5, "line"), (6, 9, "flat")]
    assert fastest_ranges(at, ["flat"], 9) == [(2, 9, "flat")]


@pytest.mark.parametrize("content", ["[]", "nonsense", '{"rows": [{}], "environment": {"cores": 2}}', "{}"])
def test_file_that_is_no_result_is_refused(content: str, tmp_path: Path, rates: Path) -> None:
    measured = tmp_path / "measured.json"
    measured.write_text(content)
    with pytest.raises(SpecError, match="expected a"):
        run_predict(measured, rates, QUESTION, quiet)


def test_rates_of_another_kind_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "rates.json"
    path.write_text(json.dumps({"rates": {"kernels": {"32": {"speed": 3}}}}))
    with pytest.raises(SpecError, match="expected rates that"):
        run_predict(None, path, QUESTION, quiet)


def test_costs_of_messages_and_bytes_are_told_apart() -> None:
    few, many = (LoopbackRow(cpu_s=1.5 + 4 * buckets * 0.01, median_s=1.0, buckets=buckets) for buckets in (2, 20))
    message_s, byte_s = split_costs(few, many, ends_per_bucket=4, kernels_s=0.5, end_bytes=100)
    assert message_s == pytest.approx(0.01)
    assert byte_s == pytest.approx(0.01)


def test_costs_of_a_ring_are_told_apart() -> None:
    bucket_s, message_s, byte_s, add_s, d = 0.01, 0.001, 1e-6, 1e-7, 1000

    def row(workers: int, buckets: int) -> LoopbackRow:
        hops, size = 2 * (workers - 1), 2 * (workers - 1) / workers * 4 * d
        cpu_s = d * add_s + buckets * (bucket_s + 2 * hops * message_s) + 2 * size * byte_s
        return LoopbackRow(cpu_s=workers * cpu_s, median_s=1.0, buckets=buckets)

    assert ring_costs(row(2, 5), row(2, 50), row(4, 50), d, add_s) == pytest.approx((bucket_s, message_s, byte_s))


@pytest.mark.parametrize("codec", ["none", "8x2", "paper:8x2", "rotated:2x2", "shared:4", "sign", "topk"])
def test_kernels_take_time(codec: str) -> None:
    measured = kernel_rates(codec, elements=512 * 40)
    assert all(0 <= second < 1e-5 for second in asdict(measured).values())
    assert measured.encode_s + measured.add_s > 0


@pytest.mark.parametrize(("codec", "biased"), [("8x2", False), ("shared:4", False), ("sign", True), ("topk", True)])
def test_encoding_is_timed_with_error_feedback_where_a_worker_has_it(
    codec: str, biased: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = []

    class Seen(ErrorFeedback):
        def encode(self, codec: Any, values: Any, *arguments: Any, **memory: Any) -> Any:
            lengths.append(len(values))
            return super().encode(codec, values, *arguments, **memory)

    monkeypatch.setattr(codec_speed, "ErrorFeedback", Seen)
    kernel_rates(codec, elements=512 * 4)
    assert set(lengths) == ({512 * 4} if biased else set())
