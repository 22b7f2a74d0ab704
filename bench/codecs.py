"""`datps bench codec`: every codec's bytes, error, bias and speed in one table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from bench.codec_errors import Errors, errors_of, vectors
from bench.codec_speed import SpeedPlan, speeds_of
from bench.report import environment, table
from common.codecs import make_codec, make_sum_codec
from common.config import CodecName, CodecSpec

VARIANTS: dict[str, CodecSpec] = {
    "none": CodecSpec(name=CodecName.NONE),
    "bf16": CodecSpec(name=CodecName.BF16),
    "fp16": CodecSpec(name=CodecName.FP16),
    **{f"randomized {bits}": CodecSpec(bits=bits) for bits in (16, 8, 6, 5, 4, 3, 2)},
    "paper 8": CodecSpec(name=CodecName.PAPER, bits=8),
    **{f"rotated {bits}": CodecSpec(name=CodecName.ROTATED, bits=bits) for bits in (4, 3, 2, 1)},
    **{f"shared {bits}": CodecSpec(name=CodecName.SHARED, bits=bits) for bits in (8, 4, 3)},
    "sign": CodecSpec(name=CodecName.SIGN),
    "topk 1/32": CodecSpec(name=CodecName.TOPK),
}
"""Rows by name; a biased codec's speed is that with error feedback."""
BARS = {"randomized 8": ("encode", 2.5), "randomized 4": ("encode", 3.0), "randomized 2": ("encode", 3.0)}
DECODE_BAR = ("randomized 8", 1.0)
"""Times of a copy of the same float32 vector in the same run that 8, 4 and 2 bits may take."""
_WIDTH = 100
"""Columns that both tables and the legend fit into."""
_LEGEND = """\
push, pull: bytes of an element, exactly. pull is that of a two-sided job, float32 where a codec
cannot be two-sided; both of shared have the round of the scales in them.
normal to bias: |estimate - x|^2 / |x|^2, above of one contribution, below of the mean over
{workers} workers, who have one vector where it is synthetic and gradients of their own batches where it
is not; all without error feedback. bias, on {biased_on}: its square over |x|^2, estimated without bias
(it may be negative), and how many standard errors that is: up to about 3 there is none to be seen.
encode, decode: ns of an element, and times of a copy of the same float32 vector ({copy_ns:.2f} ns); the
least of {repeats}, on one thread. encode: of sign and topk with error feedback, of shared with this
worker's scales. decode: onto an accumulator; of shared the integers."""


@dataclass(frozen=True, kw_only=True)
class CodecPlan:
    """What is measured.

    Attributes:
        elements: of the vector whose encoding is timed.
        bucket: elements of a bucket.
        repeats: of each codec's timing, of which the least counts; a copy is timed beside each.
        workers: M of the means.
        data: folder of CIFAR-10 for one more real gradient, or None.
        only: names of the rows; all if empty.
    """

    elements: int
    bucket: int = 1 << 18
    repeats: int = 5
    workers: int = 6
    data: Path | None = None
    only: tuple[str, ...] = ()

    @property
    def variants(self) -> dict[str, CodecSpec]:
        """The rows."""
        return {name: spec for name, spec in VARIANTS.items() if not self.only or name in self.only}


def run_codecs(plan: CodecPlan, say: Callable[[str], None]) -> dict[str, Any]:
    """Measures all rows."""
    say(f"gradients of {plan.workers} workers")
    sets = vectors(plan.workers, plan.data)
    errors: dict[str, Errors] = {}
    for name, spec in plan.variants.items():
        say(f"errors: {name}")
        errors[name] = errors_of(spec, sets)
    timing = SpeedPlan(elements=plan.elements, bucket=plan.bucket, repeats=plan.repeats)
    speeds = speeds_of(plan.variants, timing, say)
    rows = [
        {
            "name": name,
            "codec": spec.model_dump(mode="json"),
            **bytes_of(spec, plan.elements, plan.workers),
            **errors[name].as_dict(),
            **speeds.row(name),
        }
        for name, spec in plan.variants.items()
    ]
    return {
        "kind": "codec",
        "environment": environment(),
        "elements": plan.elements,
        "bucket": plan.bucket,
        "repeats": plan.repeats,
        "workers": plan.workers,
        "biased_on": sets.biased_on,
        "vectors": list(sets.by_name),
        "copy_ns": speeds.copy_ns,
        "rows": rows,
        "bars": bars_of(rows),
    }


def bytes_of(spec: CodecSpec, elements: int, workers: int) -> dict[str, float]:
    """Bytes of an element each way, of a vector that one encoder sees whole."""
    push = make_codec(spec, start=0, stop=elements, layer_edges=(0, elements))
    pushed = push.wire_bytes(0, elements)
    if push.needs_shared_scales:
        assert isinstance(spec.block, int)
        scales = 4 * -(-elements // spec.block)
        pushed += scales
        pulled = make_sum_codec(spec, workers).wire_bytes(0, elements) + scales
    else:
        pulled = 4 * elements if push.biased else pushed
    return {"pushed_bytes_per_element": pushed / elements, "pulled_bytes_per_element": pulled / elements}


def bars_of(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What was promised of the quantizer's speed, and whether it holds."""
    wanted = [(name, f"{what}_over_copy", bar) for name, (what, bar) in BARS.items()]
    wanted.append((DECODE_BAR[0], "decode_over_copy", DECODE_BAR[1]))
    by_name = {row["name"]: row for row in rows}
    return [
        {"name": name, "what": key, "bar": bar, "found": by_name[name][key], "holds": by_name[name][key] <= bar}
        for name, key, bar in wanted
        if name in by_name
    ]


def print_codecs(result: dict[str, Any], console: Console) -> None:
    """Two tables for people: what a codec sends, leaves and takes; and the error of means, and bias."""
    if console.width < _WIDTH:  # a narrow terminal breaks the lines, but nothing is cut
        console = Console(file=console.file, width=_WIDTH)
    names = result["vectors"]
    costs = table("codec", "push", "pull", *names, "encode", "x copy", "decode", "x copy")
    means = table(f"mean of {result['workers']} workers", *names, "bias", "std errors")
    costs.padding = means.padding = (0, 0, 0, 0)
    for row in result["rows"]:
        costs.add_row(
            row["name"],
            *(f"{row[f'{way}_bytes_per_element']:.3f}" for way in ("pushed", "pulled")),
            *(_short(row["nmse"][name]["one"]) for name in names),
            *(f"{row[f'{what}_{unit}']:.2f}" for what in ("encode", "decode") for unit in ("ns", "over_copy")),
        )
        means.add_row(
            row["name"],
            *(_short(row["nmse"][name]["mean"]) for name in names),
            _short(row["squared_bias"]),
            f"{row['bias_standard_errors']:.1f}",
        )
    console.print(costs)
    console.print(means)
    told = {name: result[name] for name in ("workers", "biased_on", "copy_ns", "repeats")}
    console.print(_LEGEND.format(**told), style="bright_black", highlight=False)
    for bar in result["bars"]:
        verdict = "holds" if bar["holds"] else "does not hold"
        what = bar["what"].removesuffix("_over_copy")
        console.print(f"{bar['name']} bits, {what}: {bar['found']:.2f} copies, bar {bar['bar']:.1f}: {verdict}")


def _short(number: float) -> str:
    """Two digits; what is nothing but rounding is 0."""
    return "0" if abs(number) < 1e-12 else f"{number:.2g}"
