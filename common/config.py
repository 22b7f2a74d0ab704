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

from common.data_spec import DatasetName as DatasetName
from common.data_spec import DataSpec as DataSpec
from common.data_spec import Split as Split
from common.errors import refusal
from common.inner_spec import AttackLoss as AttackLoss
from common.inner_spec import AttackName as AttackName
from common.inner_spec import AttackNorm as AttackNorm
from common.inner_spec import AttackSpec as AttackSpec
from common.inner_spec import BatchNormMode as BatchNormMode
from common.inner_spec import ObjectiveName as ObjectiveName
from common.inner_spec import ObjectiveSpec as ObjectiveSpec
from common.inner_spec import OverfittingSpec as OverfittingSpec
from common.inner_spec import SmoothingSpec as SmoothingSpec
from common.outer_spec import OptimizerName as OptimizerName
from common.outer_spec import OptimizerSpec as OptimizerSpec
from common.outer_spec import ScheduleName as ScheduleName
from common.outer_spec import ScheduleSpec as ScheduleSpec
from common.section import Number, Section
from common.transfer_spec import Head as Head
from common.transfer_spec import TransferSpec as TransferSpec

WORKER_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
WORKER_ID_RULE = "a worker_id of 1 to 63 letters, digits, '.', '_' or '-'"
MAXIMAL_BLOCK = 1 << 19
"""Elements; a bucket holds at least one block, and as float32 it must stay below gRPC's 4 MiB receive limit."""
MAXIMAL_ROTATION, MAXIMAL_TOPK = 1 << 15, 1 << 16
"""Elements of a block that is rotated as one, in a core's caches; and of one that topk chooses from, in 16 bits."""
MAXIMAL_SUM = (1 << 15) - 1
"""Of the integers that a server adds: they travel in 16 bits at most."""


class ModelName(StrEnum):
    SMALL_CNN = "small_cnn"
    RESNET8 = "resnet8"
    RESNET20 = "resnet20"
    PREACT_RESNET18 = "preact_resnet18"
    RESNET50 = "resnet50"
    WIDE_RESNET28_10 = "wide_resnet28_10"


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


class Precision(StrEnum):
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


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


class ShortcutStart(StrEnum):
    ACTIVATION = "activation"
    INPUT = "input"


class ModelSpec(Section):
    """The network; input normalization is part of it, so that attacks work in pixel space [0, 1]."""

    name: ModelName = ModelName.SMALL_CNN
    """Architecture."""
    width: int | None = Field(default=None, ge=1, le=1024)
    """Channels of the first stage; the architecture's own width where absent (small_cnn and resnet8/20 only)."""
    input_size: int | None = Field(default=None, ge=8, le=1024)
    """Side in pixels to which the model itself enlarges its images (bilinear), for fine-tuning at the size of the
    pre-training; attacks see the images as they are. Their own size where absent."""
    shortcut: ShortcutStart = ShortcutStart.ACTIVATION
    """Where a 1x1 shortcut starts: behind the block's first activation (He et al. 2016b), or at the block's `input`, as
    checkpoints of Wong et al. 2020 and Rice et al. 2020 may need it (preact_resnet18 and wide_resnet28_10 only)."""


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
    """Upper bound of one message's payload, in the wider direction; where absent, 1 MiB (colocated) or 512 KiB."""
    window_bytes: int = Field(default=16 << 20, ge=1 << 10)
    """How much a server reads of a worker's contributions to buckets that others have yet to contribute to."""
    read_ahead_bytes: int = Field(default=512 << 10, ge=64 << 10, le=1 << 30)
    """How much a stream's peer may send before it is read (HTTP/2 window); a long link needs its rate x round trip."""
    receive_buffer_bytes: int | None = Field(default=None, ge=4 << 10, le=1 << 30)
    """SO_RCVBUF at both ends of a stream, which bounds what TCP has on its way; the kernel decides where absent."""


class ComputeSpec(Section):
    """How a worker computes logits and gradients in training; evaluation is always plain float32."""

    precision: Precision = Precision.FLOAT32
    """`bfloat16`: products of matrices and convolutions in that format (autocast); parameters stay float32."""
    channels_last: bool = False
    """Images and activations as NHWC in memory, which suits tensor cores and oneDNN; images of one channel are the same
    either way."""
    compile: bool = False
    """Compile the network with torch.compile; takes up to a minute at the start, and needs a C++ compiler."""


class EvaluationAttackSpec(Section):
    """The PGD attack behind robust accuracy (RA)."""

    epsilon: Number | None = Field(default=None, ge=0)
    """Radius in pixel units, in the training attack's norm; the training attack's where absent (paper, section 6.1)."""
    steps: int = Field(default=20, ge=1, le=1000)
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
    transfer: TransferSpec = TransferSpec()
    attack: AttackSpec = AttackSpec()
    smoothing: SmoothingSpec = SmoothingSpec()
    overfitting: OverfittingSpec = OverfittingSpec()
    objective: ObjectiveSpec = ObjectiveSpec()
    optimizer: OptimizerSpec = OptimizerSpec()
    schedule: ScheduleSpec = ScheduleSpec()
    compute: ComputeSpec = ComputeSpec()
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
    def _inner_maximization_fits(self) -> Self:
        attack, objective = self.attack, self.objective
        if attack.name is AttackName.NONE and objective.name is ObjectiveName.TRADES:
            raise ValueError(refusal("an attack (objective trades)", "attack.name", attack.name.value))
        if attack.name is AttackName.NONE and self.overfitting.check_every_epochs:
            rule = "overfitting.check_every_epochs=0 without an attack to overfit to"
            raise ValueError(refusal(rule, "overfitting.check_every_epochs", self.overfitting.check_every_epochs))
        if attack.replays > 1 and objective.name is not ObjectiveName.ADVERSARIAL:
            rule = f"objective.name=adversarial with attack.replays={attack.replays}"
            raise ValueError(refusal(rule, "objective.name", objective.name.value))
        if attack.replays > 1 and self.smoothing.noise_std > 0:
            rule = f"smoothing.noise_std=0 with attack.replays={attack.replays}"
            raise ValueError(refusal(rule, "smoothing.noise_std", self.smoothing.noise_std))
        epsilon = self.evaluation_epsilon
        if attack.norm is AttackNorm.LINF and epsilon > 1:
            raise ValueError(refusal("at most 1, in pixel units (norm linf)", "evaluation.attack.epsilon", epsilon))
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
    def evaluation_epsilon(self) -> float:
        """The evaluation attack's radius with its default filled in."""
        own = self.evaluation.attack.epsilon
        return self.attack.epsilon if own is None else own

    @property
    def overfitting_check_epochs(self) -> int:
        """After how many epochs the training is checked for catastrophic overfitting, default filled in; 0 never."""
        own = self.overfitting.check_every_epochs
        return int(self.attack.name is AttackName.FGSM) if own is None else own

    @property
    def peak_learning_rate(self) -> float:
        """eta_1 as it is used: with `optimizer.base_batch` times the samples of a round, M B, over so many."""
        optimizer, drawn = self.optimizer, self.workers * self.data.batch_per_worker
        return optimizer.learning_rate * (drawn / (optimizer.base_batch or drawn))

    @property
    def evaluation_attack(self) -> AttackSpec:
        """The evaluation attack with epsilon and step size resolved."""
        attack, epsilon = self.evaluation.attack, self.evaluation_epsilon
        return AttackSpec(
            name=AttackName.PGD,
            norm=self.attack.norm,
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
