"""The job spec: everything that the participants of one job must agree on, frozen and validated.

It is the one source of YAML keys, `--set` flags and `DATPS_*` variables (`common/spec_sources.py` reads them). The
server's job spec is the only one of a job; workers receive it when they join. What belongs to one process (addresses,
paths, devices) is not in here.
"""

from __future__ import annotations

import hashlib
import json
import re
from enum import StrEnum
from typing import Self

import yaml
from pydantic import Field, ValidationInfo, field_validator, model_validator

from common.errors import refusal
from common.outer_config import OptimizerName as OptimizerName
from common.outer_config import OptimizerSpec as OptimizerSpec
from common.outer_config import ScheduleName as ScheduleName
from common.outer_config import ScheduleSpec as ScheduleSpec
from common.section import Number, Section

WORKER_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
WORKER_ID_RULE = "a worker_id of 1 to 63 letters, digits, '.', '_' or '-'"
MAXIMAL_BLOCK = 1 << 19
"""Elements; a bucket holds at least one block, and as float32 it must stay below gRPC's 4 MiB receive limit."""
MAXIMAL_ROTATION, MAXIMAL_TOPK = 1 << 15, 1 << 16
"""Elements of a block that is rotated as one, in a core's caches; and of one that topk chooses from, in 16 bits."""
MAXIMAL_SUM = (1 << 15) - 1
"""Of the integers that a server adds: they travel in 16 bits at most."""


class DatasetName(StrEnum):
    DIGITS = "digits"
    CIFAR10 = "cifar10"
    CIFAR100 = "cifar100"
    IMAGEFOLDER = "imagefolder"


class Split(StrEnum):
    SHARED = "shared"
    OWN = "own"


class ModelName(StrEnum):
    SMALL_CNN = "small_cnn"
    RESNET8 = "resnet8"
    RESNET20 = "resnet20"
    PREACT_RESNET18 = "preact_resnet18"
    RESNET50 = "resnet50"
    WIDE_RESNET28_10 = "wide_resnet28_10"


class AttackName(StrEnum):
    NONE = "none"
    FGSM = "fgsm"
    PGD = "pgd"


class BatchNormMode(StrEnum):
    EVAL = "eval"
    TRAIN = "train"


class CodecName(StrEnum):
    NONE = "none"
    FP16 = "fp16"
    BF16 = "bf16"
    RANDOMIZED = "randomized"
    PAPER = "paper"
    ROTATED = "rotated"
    SHARED = "shared"
    SIGN = "sign"
    TOPK = "topk"


class BlockName(StrEnum):
    LAYER = "layer"
    ALL = "all"


class Topology(StrEnum):
    DEDICATED = "dedicated"
    COLOCATED = "colocated"
    COLLECTIVE = "collective"


class ScaleNorm(StrEnum):
    LINF = "linf"
    L2 = "l2"


class ModelSpec(Section):
    """The network; input normalization is part of it, so that attacks work in pixel space [0, 1]."""

    name: ModelName = ModelName.SMALL_CNN
    """Architecture."""
    width: int | None = Field(default=None, ge=1, le=1024)
    """Channels of the first stage; the architecture's own width where absent (small_cnn and resnet8/20 only)."""


class DataSpec(Section):
    """The data set and how its samples are divided among the workers."""

    name: DatasetName = DatasetName.DIGITS
    """Data set."""
    split: Split = Split.SHARED
    """`shared`: one data set, reshuffled and divided anew each epoch; `own`: each worker has its own folder."""
    image_size: int | None = Field(default=None, ge=8, le=1024)
    """Side of the square images in pixels after resizing; needed by `imagefolder` unless all images are of one size."""
    augment: bool = False
    """Training images: random crop after 4 pixels of zero padding, and horizontal flip."""
    batch_per_worker: int = Field(default=64, ge=1)
    """Samples that each worker draws per round (B of the paper)."""
    validation: Number = Field(default=0.0, ge=0)
    """Training samples that are held out, a fraction or from 1 on a count (`split=own`: of each worker): evaluations
    during training judge on them instead of the test data."""

    @field_validator("validation")
    @classmethod
    def _validation_is_a_fraction_or_a_count(cls, amount: float) -> float:
        if amount >= 1 and amount != int(amount):
            raise ValueError(refusal("a fraction below 1, or a whole number", "validation", amount))
        return amount


class AttackSpec(Section):
    """The inner maximization of equation (A1), in the l-infinity ball."""

    name: AttackName = AttackName.PGD
    """Attack generator; `none` trains on clean images."""
    epsilon: Number = Field(default=8 / 255, ge=0, le=1)
    """Radius of the ball, in pixel units [0, 1]."""
    steps: int = Field(default=10, ge=1, le=1000)
    """Attack steps of PGD; FGSM always takes one."""
    step_size: Number | None = Field(default=None, gt=0)
    """Step size in pixel units; where absent 1.25 epsilon for FGSM and 2.5 epsilon / steps for PGD."""
    random_start: bool = True
    """Start from a uniform draw in the ball instead of its centre."""
    batch_norm: BatchNormMode | None = None
    """Batch-norm mode during the attack; where absent `eval` for PGD and `train` for FGSM."""

    @property
    def resolved_step_size(self) -> float:
        """Step size in pixel units with the attack's default filled in."""
        if self.step_size is not None:
            return self.step_size
        return 1.25 * self.epsilon if self.name is AttackName.FGSM else 2.5 * self.epsilon / self.steps

    @property
    def resolved_batch_norm(self) -> BatchNormMode:
        """Batch-norm mode with the attack's default filled in."""
        if self.batch_norm is not None:
            return self.batch_norm
        return BatchNormMode.TRAIN if self.name is AttackName.FGSM else BatchNormMode.EVAL


class ObjectiveSpec(Section):
    """The local cost f_i of equation (2)."""

    clean_weight: Number = Field(default=0.0, ge=0)
    """lambda of equation (2): weight of the loss on clean images beside the adversarial one."""


class CodecSpec(Section):
    """Gradient compression: equations (A5), (A6) and Algorithm A1, lines 7 and 10."""

    name: CodecName = CodecName.RANDOMIZED
    """`none` (float32), `fp16`, `bf16`; `randomized` (blocks), `paper` (one l2 norm for all, separate sign bit);
    `rotated` (random rotation of blocks, 1 to 4 bits); `shared` (one scale for all workers: the servers add integers);
    `sign` and `topk`, which are biased: each worker keeps what it did not send and adds it to its next gradient."""
    bits: int = 8
    """Bits of one element on the wire (randomized: sign included; paper: plus one sign bit): 2 to 8, or 16; rotated:
    1 to 4; shared: 2 to 8."""
    block: int | BlockName = 512
    """Elements that share one scale, or of which topk sends the largest: a multiple of 8, rotated: a power of two;
    randomized also: `layer`, or `all`."""
    scale: ScaleNorm = ScaleNorm.LINF
    """Norm that scales a block; `randomized` only."""
    density: Number = Field(default=1 / 32, gt=0, le=1)
    """Fraction of the elements of a block that is sent, rounded up; `topk` only."""
    two_sided: bool = False
    """Encode the average too (Algorithm A1, line 10); otherwise it travels as float32. With `shared` the sums always
    travel as integers."""

    @field_validator("bits")
    @classmethod
    def _bits_are_supported(cls, bits: int, info: ValidationInfo) -> int:
        by_name: dict[object, tuple[str, list[int]]] = {CodecName.ROTATED: ("1 to 4 (codec rotated)", [1, 2, 3, 4])}
        by_name[CodecName.SHARED] = ("2 to 8 (codec shared)", [2, 3, 4, 5, 6, 7, 8])
        rule, supported = by_name.get(info.data.get("name"), ("2 to 8, or 16", [2, 3, 4, 5, 6, 7, 8, 16]))
        if bits not in supported:
            raise ValueError(refusal(rule, "bits", bits))
        return bits

    @field_validator("block", mode="before")
    @classmethod
    def _block_is_a_length_or_a_name(cls, block: object, info: ValidationInfo) -> object:
        name = info.data.get("name")
        if name is CodecName.ROTATED:
            rule, lengths = f"a power of two from 64 to {MAXIMAL_ROTATION}", {64 << k for k in range(10)}
            supported = isinstance(block, int) and block in lengths
        else:
            most = MAXIMAL_TOPK if name is CodecName.TOPK else MAXIMAL_BLOCK
            rule = f"a multiple of 8 from 8 to {most}"
            supported = isinstance(block, int) and 8 <= block <= most and block % 8 == 0
        if name in (CodecName.ROTATED, CodecName.SHARED, CodecName.SIGN, CodecName.TOPK):
            rule += f" (codec {name})"
        else:
            rule += ", layer or all"
            supported = supported or block in tuple(BlockName)
        if not supported or isinstance(block, bool):
            raise ValueError(refusal(rule, "block", block))
        return BlockName(block) if isinstance(block, str) else block

    @field_validator("two_sided")
    @classmethod
    def _averages_are_not_biased(cls, two_sided: bool, info: ValidationInfo) -> bool:
        if two_sided and info.data.get("name") in (CodecName.SIGN, CodecName.TOPK):
            raise ValueError(refusal("two_sided=false (it needs a residual; servers keep none)", "two_sided", True))
        return two_sided

    @property
    def keeps_residual(self) -> bool:
        """Whether each worker keeps what it did not send: the codec is biased."""
        return self.name in (CodecName.SIGN, CodecName.TOPK)


class ExchangeSpec(Section):
    """How the gradient travels."""

    topology: Topology = Topology.DEDICATED
    """Who averages: `dedicated` servers, `colocated` (every worker's node runs a shard) or `collective` (no server)."""
    bucket_bytes: int | None = Field(default=None, ge=1 << 10, le=(4 << 20) - (1 << 16))
    """Upper bound of one message's payload, in the wider direction; where absent, 2 MiB (colocated) or 512 KiB."""
    window_bytes: int = Field(default=16 << 20, ge=1 << 10)
    """How much a server reads of a worker's contributions to buckets that others have yet to contribute to."""
    read_ahead_bytes: int = Field(default=512 << 10, ge=64 << 10, le=1 << 30)
    """How much a stream's peer may send before it is read (HTTP/2 window); a long link needs its rate x round trip."""


class EvaluationAttackSpec(Section):
    """The PGD attack behind robust accuracy (RA)."""

    epsilon: Number | None = Field(default=None, ge=0, le=1)
    """Radius in pixel units; the training attack's where absent (paper, section 6.1)."""
    steps: int = Field(default=20, ge=1, le=10000)
    """Attack steps."""
    step_size: Number | None = Field(default=None, gt=0)
    """Step size in pixel units; epsilon / 8 where absent."""
    random_start: bool = True
    """Start from a uniform draw in the ball instead of its centre."""


class EvaluationSpec(Section):
    """How the model is judged; its attack is its own, never the training attack."""

    every_epochs: int = Field(default=5, ge=0)
    """Evaluate during training after so many epochs; 0 evaluates at the end only."""
    patience: int | None = Field(default=None, ge=1)
    """Stop training early after so many evaluations on `data.validation` without a higher robust accuracy."""
    attack: EvaluationAttackSpec = EvaluationAttackSpec()
    batch: int = Field(default=256, ge=1)
    """Images per forward pass."""


class CheckpointSpec(Section):
    """When the state is saved."""

    every_epochs: int = Field(default=10, ge=0)
    """Save after so many epochs; 0 saves at the end (and on SIGTERM) only."""
    keep: int = Field(default=2, ge=1)
    """Newest checkpoints that are kept."""


class DeadlineSpec(Section):
    """After how many seconds waiting ends with an error that says who and what."""

    join_s: Number = Field(default=120.0, gt=0)
    """Server: from its first worker's Join until the view is full; worker: until it is admitted."""
    round_s: Number = Field(default=600.0, gt=0)
    """Server: from a round's opening until it closes."""
    hello_s: Number = Field(default=15.0, gt=0)
    """Server: until a new stream has said who it is."""
    report_s: Number = Field(default=5.0, gt=0)
    """Server: how often it says whom it is waiting for."""
    keepalive_s: Number = Field(default=10.0, gt=0)
    """Both: interval of the HTTP/2 pings, and how long one may stay unanswered."""


class JobSpec(Section):
    """One training job."""

    job_id: str = Field(default="datps", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")
    """Name of the job; a worker that names another one is refused."""
    seed: int = Field(default=0, ge=0, lt=1 << 63)
    """Seed of everything random."""
    workers: int = Field(default=4, ge=1, le=4096)
    """M: workers that aggregate together."""
    servers: int = Field(default=1, ge=1, le=256)
    """S: servers, each with one shard."""
    model: ModelSpec = ModelSpec()
    data: DataSpec = DataSpec()
    attack: AttackSpec = AttackSpec()
    objective: ObjectiveSpec = ObjectiveSpec()
    optimizer: OptimizerSpec = OptimizerSpec()
    schedule: ScheduleSpec = ScheduleSpec()
    codec: CodecSpec = CodecSpec()
    exchange: ExchangeSpec = ExchangeSpec()
    evaluation: EvaluationSpec = EvaluationSpec()
    checkpoint: CheckpointSpec = CheckpointSpec()
    deadlines: DeadlineSpec = DeadlineSpec()

    @model_validator(mode="after")
    def _topology_fits(self) -> Self:
        topology = self.exchange.topology
        if topology is not Topology.DEDICATED and self.servers != 1:
            raise ValueError(refusal(f"servers=1, which only admits workers ({topology})", "servers", self.servers))
        if topology is Topology.COLLECTIVE and self.codec.two_sided:
            rule = "codec.two_sided=false (collective: no server encodes the average)"
            raise ValueError(refusal(rule, "codec.two_sided", True))
        if topology is Topology.COLLECTIVE and self.codec.name is CodecName.SHARED:
            raise ValueError(refusal("another codec (collective: no server adds integers)", "codec.name", "shared"))
        return self

    @model_validator(mode="after")
    def _sums_of_integers_fit(self) -> Self:
        levels = (1 << (self.codec.bits - 1)) - 1
        if self.codec.name is CodecName.SHARED and self.workers * levels > MAXIMAL_SUM:
            rule = f"sums of at most {MAXIMAL_SUM} (workers times 2^(bits - 1) - 1, codec shared)"
            raise ValueError(refusal(rule, "sum", f"{self.workers} * {levels} = {self.workers * levels}"))
        return self

    @model_validator(mode="after")
    def _early_stopping_looks_at_validation_data(self) -> Self:
        if self.evaluation.patience is not None and not (self.data.validation and self.evaluation.every_epochs):
            rule = "data.validation and evaluation.every_epochs above 0 (early stopping, never on test data)"
            raise ValueError(refusal(rule, "evaluation.patience", self.evaluation.patience))
        return self

    @property
    def shards(self) -> int:
        """S: into how many shards the gradient is cut; one server each."""
        return {
            Topology.DEDICATED: self.servers,
            Topology.COLOCATED: self.workers,
            Topology.COLLECTIVE: 1,
        }[self.exchange.topology]

    @property
    def peak_learning_rate(self) -> float:
        """eta_1 as it is used: with `optimizer.base_batch` times the samples of a round, M B, over so many."""
        optimizer, drawn = self.optimizer, self.workers * self.data.batch_per_worker
        return optimizer.learning_rate * (drawn / (optimizer.base_batch or drawn))

    @property
    def evaluation_attack(self) -> AttackSpec:
        """The evaluation attack with epsilon and step size resolved."""
        attack = self.evaluation.attack
        epsilon = self.attack.epsilon if attack.epsilon is None else attack.epsilon
        return AttackSpec(
            name=AttackName.PGD,
            epsilon=epsilon,
            steps=attack.steps,
            step_size=attack.step_size if attack.step_size is not None else max(epsilon / 8, 1e-12),
            random_start=attack.random_start,
            batch_norm=BatchNormMode.EVAL,
        )

    def digest(self) -> str:
        """SHA-256 of the canonical form, in hex: two processes with equal digests run the same job."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def to_json(self) -> str:
        """Canonical JSON: sorted keys, every value resolved."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))

    def to_yaml(self) -> str:
        """All keys with their resolved values, for `job.yaml`."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)
