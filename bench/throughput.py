"""`datps bench throughput`: what training through the system costs beside a plain PyTorch loop.

One worker, codec `none`, a real server process on loopback: nothing is emulated, so what is missing to 1 is the price
of the exchange, its copies and the trainer's own bookkeeping. Blocks of rounds of both loops take turns in one process.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from bench.gate import StartingLine
from bench.job import START_S, Job
from bench.processes import Crew, Loopback, Say
from bench.report import environment, table
from bench.settings import Setting
from bench.signals import signals_unwind
from bench.throughput_worker import KINDS, ThroughputOrders
from bench.workload import WORKLOAD
from common.config import AttackLoss, AttackName, AttackNorm, BatchNormMode, CodecName, JobSpec, ObjectiveName
from common.errors import SpecError, refusal

_END_S = 30.0


@dataclass(frozen=True, kw_only=True)
class ThroughputPlan:
    """What is measured.

    Attributes:
        blocks, warmup_blocks: timed and untimed ones, of each kind.
        block_rounds: rounds of one block.
        data: `synthetic` or `digits`.
        threads: of the worker.
    """

    blocks: int
    warmup_blocks: int
    block_rounds: int
    data: str
    threads: int


def run_throughput(setting: Setting, plan: ThroughputPlan, say: Say) -> dict[str, Any]:
    """Measures one job of one worker on loopback.

    Raises:
        SpecError: the job is refused.
        DatpsError: the measurement failed.
    """
    assert setting.spec is not None
    _refuse_other_methods(setting.spec)
    with signals_unwind():
        ready, events, done = _measure(setting, plan, say)
    batch = setting.spec.data.batch_per_worker
    return {
        "environment": environment(),
        "setting": {
            "model": setting.spec.model.name.value,
            "data": plan.data,
            "batch": batch,
            "attack_steps": setting.spec.attack.steps,
            "codec": setting.codec,
            "threads": plan.threads,
            "block_rounds": plan.block_rounds,
            "parameters": ready["parameters"],
            "job_spec": setting.spec.model_dump(mode="json"),
        },
        "same_parameters": done["same_parameters"],
        **row_of(events, batch * plan.block_rounds),
    }


def _refuse_other_methods(spec: JobSpec) -> None:
    """The plain loop is written out for one method."""
    written = {
        "attack.name": (spec.attack.name, AttackName.PGD),
        "attack.norm": (spec.attack.norm, AttackNorm.LINF),
        "attack.loss": (spec.attack.loss, AttackLoss.CROSS_ENTROPY),
        "attack.warmup": (spec.attack.warmup, 0.0),
        "attack.random_start": (spec.attack.random_start, True),
        "attack.batch_norm": (spec.attack.resolved_batch_norm, BatchNormMode.EVAL),
        "smoothing.noise_std": (spec.smoothing.noise_std, 0.0),
        "objective.name": (spec.objective.name, ObjectiveName.ADVERSARIAL),
        "objective.clean_weight": (spec.objective.clean_weight, 0.0),
        "data.augment": (spec.data.augment, False),
        "codec.name": (spec.codec.name, CodecName.NONE),
    }
    for key, (got, expected) in written.items():
        if got != expected:
            raise SpecError(refusal(f"{key}={expected}", key, got, "the plain loop has nothing else"))


def row_of(events: Sequence[dict[str, Any]], samples: int) -> dict[str, Any]:
    """The figures of all timed blocks; `samples`: of one block.

    `throughput_ratio` is that of the median blocks, `throughput_ratio_of_totals` that of all time spent, and the range
    is over the pairs of neighbouring blocks.
    """
    ours, plain = ([float(e["seconds"]) for e in events if e["kind"] == kind] for kind in KINDS)
    pairs = [p / o for o, p in zip(ours, plain, strict=True)]
    return {
        "throughput_ratio": statistics.median(plain) / statistics.median(ours),
        "throughput_ratio_of_totals": sum(plain) / sum(ours),
        "throughput_ratio_smallest": min(pairs),
        "throughput_ratio_largest": max(pairs),
        "samples_per_s": samples / statistics.median(ours),
        "plain_samples_per_s": samples / statistics.median(plain),
        "waited_fraction": sum(float(e["waited_s"]) for e in events) / sum(ours),
        "blocks_s": ours,
        "plain_blocks_s": plain,
    }


def _measure(
    setting: Setting, plan: ThroughputPlan, say: Say
) -> tuple[dict[str, Any], list[dict[str, Any]], dict[str, Any]]:
    assert setting.topology is not None
    assert setting.spec is not None
    timed = []
    with tempfile.TemporaryDirectory(prefix="datps-bench-") as name:
        folder = Path(name)
        orders = ThroughputOrders(
            blocks=plan.warmup_blocks + plan.blocks,
            warmup_blocks=plan.warmup_blocks,
            block_rounds=plan.block_rounds,
            data=plan.data,
            threads=plan.threads,
            gate=str(folder / "gate"),
            deadline_s=setting.deadline_s,
        )
        orders.write(folder / WORKLOAD)
        with StartingLine(folder / "gate", 1, lambda _start: None), Crew(folder, say) as crew:
            job = Job(crew, [Loopback()] * 2, setting.topology, setting.spec, folder, traced=False)
            environment = {"OMP_NUM_THREADS": str(plan.threads)}
            (worker,) = job.start("bench.throughput_worker", folder / WORKLOAD, environment)

            def heard(kind: str, what: str, deadline_s: float = setting.deadline_s) -> dict[str, Any]:
                return crew.collect(kind, [worker], deadline_s, what)[worker]

            ready = heard("throughput_ready", "the model", setting.deadline_s + START_S)
            for number in range(orders.blocks):
                for _ in KINDS:
                    event = heard("throughput_block", f"block {number + 1}")
                    is_timed = number >= plan.warmup_blocks
                    name = f"{'block' if is_timed else 'warm-up block'} {number + 1}"
                    say(f"{name}, {event['kind']}: {plan.block_rounds} rounds in {event['seconds']:.3f} s")
                    if is_timed:
                        timed.append(event)
            done = heard("throughput_done", "the parameters")
            crew.join(_END_S)
    return ready, timed, done


def print_throughput(result: dict[str, Any], console: Console) -> None:
    """One table for people."""
    setting = result["setting"]
    title = f"{setting['model']}, {setting['data']}, batch {setting['batch']}, {setting['attack_steps']} attack steps"
    shown = table(title, "samples/s")
    shown.add_row("datps, one worker", f"{result['samples_per_s']:.1f}")
    shown.add_row("plain PyTorch loop", f"{result['plain_samples_per_s']:.1f}")
    console.print(shown)
    same = "the same" if result["same_parameters"] else "NOT the same"
    console.print(
        f"Ratio {result['throughput_ratio']:.3f} ({result['throughput_ratio_smallest']:.3f} to "
        f"{result['throughput_ratio_largest']:.3f} by pair of blocks); waiting for averages took "
        f"{100 * result['waited_fraction']:.1f} %. Both loops ended at {same} parameters.",
        highlight=False,
    )
