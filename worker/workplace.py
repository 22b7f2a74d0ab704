"""What every process of a worker builds from the job spec: model, replica, layout, and in the end its trainer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from common.config import CodecName, JobSpec, Topology
from common.errors import CheckpointError, SpecError, refusal
from common.layout import Layout, TensorSpec, plan_layout
from common.spec_sources import differences, spec_keys
from common.timeline import OFF, Timeline
from worker.checkpoint import Checkpoint
from worker.data import BatchPlan, Dataset
from worker.exchange.base import Exchange
from worker.exchange.coordination import Admission
from worker.local.team import LocalTeam
from worker.models import build_model
from worker.optimizers import Shares
from worker.pretrained import Weights
from worker.readiness import backward_order
from worker.record import describe_data, describe_unlabeled
from worker.replica import Replica
from worker.trainer import Recorder, Trainer
from worker.transfer import Initialized, freeze

FREE_ON_RESUME = ("job_id", "servers", "exchange.", "evaluation.", "checkpoint.", "deadlines.", "overfitting.")
"""Keys of the job spec that may differ from the checkpoint's: none of them changes a parameter, but see `_bound`."""


@dataclass(frozen=True, kw_only=True)
class Workplace:
    """One process's copy of what is trained.

    Attributes:
        spec: the job.
        dataset: what it is trained on.
        device: where the model is.
        replica: the state, from the checkpoint if there is one.
        layout: how its vectors are cut.
        round: the round to begin with.
        team: the local processes of this worker; None if there is one.
        initialized: what was taken from another training's parameters, if anything was.
    """

    spec: JobSpec
    dataset: Dataset
    device: torch.device
    replica: Replica
    layout: Layout
    round: int
    team: LocalTeam | None
    initialized: Initialized | None = None

    @classmethod
    def build(
        cls,
        spec: JobSpec,
        dataset: Dataset,
        device: torch.device,
        checkpoint: Checkpoint | None,
        team: LocalTeam | None,
        weights: Weights | None = None,
    ) -> Workplace:
        """Builds everything from its parts; a checkpoint wins over `weights`.

        Raises:
            CheckpointError: the checkpoint is another job's.
            SpecError: a model that does not fit, or the checkpoint is of other data.
            DataError: the weights are another model's.
        """

        def divide(tensors: Sequence[TensorSpec]) -> Shares:
            assert team is not None
            return team.divide(plan_layout(tensors, spec))

        model = model_for(spec, dataset)
        initialized = weights.give(model, spec.transfer, dataset, spec.seed) if weights and not checkpoint else None
        frozen = freeze(model, spec.transfer.freeze)
        model = model.to(device)
        example = dataset.train.images(torch.arange(2)).to(device)
        replica = Replica(model, spec.optimizer, backward_order(model, example), divide if team else None, frozen)
        layout = plan_layout(replica.tensors, spec)
        if checkpoint:
            _refuse_other_job(checkpoint, spec, layout)
            refuse_other_data(checkpoint, dataset)
            _refuse_other_unlabeled(checkpoint, dataset)
            replica.load_state(checkpoint.tensors)
            replica.selection = checkpoint.selection
        return cls(
            spec=spec,
            dataset=dataset,
            device=device,
            replica=replica,
            layout=layout,
            round=checkpoint.round if checkpoint else 0,
            team=team,
            initialized=initialized,
        )

    def plan(self, samples: tuple[int, ...]) -> BatchPlan:
        """Who draws what; `samples`: labeled ones of each worker's data, by worker_index."""
        spec = self.spec
        return BatchPlan(
            samples_by_worker=samples,
            split=spec.data.split,
            batch_per_worker=spec.data.batch_per_worker,
            workers=spec.workers,
            seed=spec.seed,
            unlabeled=self.dataset.unlabeled.samples if self.dataset.unlabeled else 0,
            unlabeled_per_batch=spec.data.unlabeled_per_batch,
        )

    def trainer(
        self,
        exchange: Exchange,
        admission: Admission,
        recorder: Recorder,
        stop_requested: Callable[[], bool] = lambda: False,
        timeline: Timeline = OFF,
    ) -> Trainer:
        """What runs the rounds, from `round` on."""
        return Trainer(
            spec=self.spec,
            replica=self.replica,
            dataset=self.dataset,
            plan=self.plan(admission.samples),
            worker_index=admission.worker_index,
            exchange=exchange,
            layout=self.layout,
            device=self.device,
            recorder=recorder,
            stop_requested=stop_requested,
            first_round=self.round,
            timeline=timeline,
            team=self.team,
        )


def open_device(name: str, threads: int | None) -> torch.device:
    """The device, with torch's settings for reproducible results.

    Raises:
        SpecError: no such device here, or not even one thread.
    """
    if threads is not None:
        if threads < 1:
            raise SpecError(refusal("at least 1 thread", "threads", threads))
        torch.set_num_threads(threads)
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise SpecError(refusal("cpu or cuda", "device", name))
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).split("\n", maxsplit=1)[0]
        raise SpecError(refusal("a device that torch has here", "device", name, reason)) from None
    return device


def model_for(spec: JobSpec, dataset: Dataset) -> torch.nn.Module:
    """The job's model for images as the data set has them."""
    return build_model(
        spec.model,
        in_channels=dataset.in_channels,
        image_size=dataset.image_size,
        classes=len(dataset.classes),
        mean=dataset.mean,
        std=dataset.std,
        seed=spec.seed,
    )


def refuse_other_data(checkpoint: Checkpoint, dataset: Dataset) -> None:
    """A checkpoint says what data its model is made for.

    Raises:
        SpecError: these are other data.
    """
    ours = describe_data(dataset)
    if ours != checkpoint.data:
        raise SpecError(refusal(f"data of the checkpoint ({checkpoint.data})", "data", ours, str(checkpoint.path)))


def _refuse_other_unlabeled(checkpoint: Checkpoint, dataset: Dataset) -> None:
    ours = describe_unlabeled(dataset, checkpoint.spec.data)
    if ours != checkpoint.unlabeled:
        rule = f"unlabeled data of the checkpoint ({checkpoint.unlabeled})"
        raise SpecError(refusal(rule, "unlabeled", ours, str(checkpoint.path)))


def _refuse_other_job(checkpoint: Checkpoint, spec: JobSpec, layout: Layout) -> None:
    """A run that goes on keeps its job, but for what does not touch the parameters."""
    bound = _bound(checkpoint.spec, spec, layout)
    for key, theirs, ours in differences(checkpoint.spec, spec):
        if key in bound or not key.startswith(FREE_ON_RESUME):
            rule = f"{key}={theirs} as in {checkpoint.path}"
            raise CheckpointError(refusal(rule, key, ours, "a resumed run keeps its job"))


def _bound(before: JobSpec, now: JobSpec, layout: Layout) -> frozenset[str]:
    """The keys of `FREE_ON_RESUME` that touch the parameters, or which are the best, between these two jobs."""
    bound: set[str] = set()
    if any(job.exchange.topology is Topology.COLLECTIVE and job.codec.name is CodecName.NONE for job in (before, now)):
        bound |= {"exchange.topology", "exchange.bucket_bytes"}  # an all-reduce adds each bucket in an order of its own
    if now.data.validation:  # the best so far was judged with it
        bound |= {key for key, _, _ in spec_keys() if key.startswith("evaluation.attack.")}
    if not layout.dealt and before.shards != now.shards:
        bound |= {"servers", "exchange.topology"}  # the averages' scales span a shard
    return frozenset(bound)
