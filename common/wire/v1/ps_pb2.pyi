from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Reason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    REASON_UNSPECIFIED: _ClassVar[Reason]
    REASON_PROTOCOL_VERSION: _ClassVar[Reason]
    REASON_JOB: _ClassVar[Reason]
    REASON_LAYOUT: _ClassVar[Reason]
    REASON_PARAMETERS: _ClassVar[Reason]
    REASON_WORKER_ID: _ClassVar[Reason]
    REASON_VIEW_FULL: _ClassVar[Reason]
    REASON_VIEW: _ClassVar[Reason]
    REASON_ROUND: _ClassVar[Reason]
    REASON_BUCKET: _ClassVar[Reason]
    REASON_CODEC: _ClassVar[Reason]
    REASON_CONTENT: _ClassVar[Reason]
    REASON_MALFORMED: _ClassVar[Reason]
    REASON_DATA: _ClassVar[Reason]
    REASON_INCARNATION: _ClassVar[Reason]
    REASON_NAME: _ClassVar[Reason]

class Ending(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ENDING_UNSPECIFIED: _ClassVar[Ending]
    ENDING_COMPLETED: _ClassVar[Ending]
    ENDING_STOPPED: _ClassVar[Ending]
    ENDING_FAILED: _ClassVar[Ending]
    ENDING_ABORTED: _ClassVar[Ending]
REASON_UNSPECIFIED: Reason
REASON_PROTOCOL_VERSION: Reason
REASON_JOB: Reason
REASON_LAYOUT: Reason
REASON_PARAMETERS: Reason
REASON_WORKER_ID: Reason
REASON_VIEW_FULL: Reason
REASON_VIEW: Reason
REASON_ROUND: Reason
REASON_BUCKET: Reason
REASON_CODEC: Reason
REASON_CONTENT: Reason
REASON_MALFORMED: Reason
REASON_DATA: Reason
REASON_INCARNATION: Reason
REASON_NAME: Reason
ENDING_UNSPECIFIED: Ending
ENDING_COMPLETED: Ending
ENDING_STOPPED: Ending
ENDING_FAILED: Ending
ENDING_ABORTED: Ending

class Refusal(_message.Message):
    __slots__ = ("reason", "text", "round", "bucket")
    REASON_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    BUCKET_FIELD_NUMBER: _ClassVar[int]
    reason: Reason
    text: str
    round: int
    bucket: int
    def __init__(self, reason: _Optional[_Union[Reason, str]] = ..., text: _Optional[str] = ..., round: _Optional[int] = ..., bucket: _Optional[int] = ...) -> None: ...

class Abort(_message.Message):
    __slots__ = ("text", "worker_ids", "retry")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    WORKER_IDS_FIELD_NUMBER: _ClassVar[int]
    RETRY_FIELD_NUMBER: _ClassVar[int]
    text: str
    worker_ids: _containers.RepeatedScalarFieldContainer[str]
    retry: bool
    def __init__(self, text: _Optional[str] = ..., worker_ids: _Optional[_Iterable[str]] = ..., retry: bool = ...) -> None: ...

class Waiting(_message.Message):
    __slots__ = ("worker_ids", "waited_s", "round", "missing")
    WORKER_IDS_FIELD_NUMBER: _ClassVar[int]
    WAITED_S_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    MISSING_FIELD_NUMBER: _ClassVar[int]
    worker_ids: _containers.RepeatedScalarFieldContainer[str]
    waited_s: float
    round: int
    missing: int
    def __init__(self, worker_ids: _Optional[_Iterable[str]] = ..., waited_s: _Optional[float] = ..., round: _Optional[int] = ..., missing: _Optional[int] = ...) -> None: ...

class JoinRequest(_message.Message):
    __slots__ = ("introduction", "readiness")
    INTRODUCTION_FIELD_NUMBER: _ClassVar[int]
    READINESS_FIELD_NUMBER: _ClassVar[int]
    introduction: Introduction
    readiness: Readiness
    def __init__(self, introduction: _Optional[_Union[Introduction, _Mapping]] = ..., readiness: _Optional[_Union[Readiness, _Mapping]] = ...) -> None: ...

class Introduction(_message.Message):
    __slots__ = ("protocol_version", "job_id", "worker_id")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    job_id: str
    worker_id: str
    def __init__(self, protocol_version: _Optional[int] = ..., job_id: _Optional[str] = ..., worker_id: _Optional[str] = ...) -> None: ...

class Readiness(_message.Message):
    __slots__ = ("layout_digest", "replica_digest", "round", "samples", "classes", "address")
    LAYOUT_DIGEST_FIELD_NUMBER: _ClassVar[int]
    REPLICA_DIGEST_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    CLASSES_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    layout_digest: bytes
    replica_digest: bytes
    round: int
    samples: int
    classes: str
    address: str
    def __init__(self, layout_digest: _Optional[bytes] = ..., replica_digest: _Optional[bytes] = ..., round: _Optional[int] = ..., samples: _Optional[int] = ..., classes: _Optional[str] = ..., address: _Optional[str] = ...) -> None: ...

class Tensor(_message.Message):
    __slots__ = ("name", "shape", "buffer")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    BUFFER_FIELD_NUMBER: _ClassVar[int]
    name: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    buffer: bool
    def __init__(self, name: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ..., buffer: bool = ...) -> None: ...

class JoinResponse(_message.Message):
    __slots__ = ("offer", "waiting", "admission", "refusal", "abort", "stop")
    OFFER_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    ADMISSION_FIELD_NUMBER: _ClassVar[int]
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    ABORT_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    offer: JobOffer
    waiting: Waiting
    admission: Admission
    refusal: Refusal
    abort: Abort
    stop: StopRequest
    def __init__(self, offer: _Optional[_Union[JobOffer, _Mapping]] = ..., waiting: _Optional[_Union[Waiting, _Mapping]] = ..., admission: _Optional[_Union[Admission, _Mapping]] = ..., refusal: _Optional[_Union[Refusal, _Mapping]] = ..., abort: _Optional[_Union[Abort, _Mapping]] = ..., stop: _Optional[_Union[StopRequest, _Mapping]] = ...) -> None: ...

class JobOffer(_message.Message):
    __slots__ = ("job_spec", "incarnation")
    JOB_SPEC_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    job_spec: str
    incarnation: int
    def __init__(self, job_spec: _Optional[str] = ..., incarnation: _Optional[int] = ...) -> None: ...

class Admission(_message.Message):
    __slots__ = ("worker_index", "view", "worker_ids", "samples", "shard_addresses", "worker_addresses")
    WORKER_INDEX_FIELD_NUMBER: _ClassVar[int]
    VIEW_FIELD_NUMBER: _ClassVar[int]
    WORKER_IDS_FIELD_NUMBER: _ClassVar[int]
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    SHARD_ADDRESSES_FIELD_NUMBER: _ClassVar[int]
    WORKER_ADDRESSES_FIELD_NUMBER: _ClassVar[int]
    worker_index: int
    view: int
    worker_ids: _containers.RepeatedScalarFieldContainer[str]
    samples: _containers.RepeatedScalarFieldContainer[int]
    shard_addresses: _containers.RepeatedScalarFieldContainer[str]
    worker_addresses: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, worker_index: _Optional[int] = ..., view: _Optional[int] = ..., worker_ids: _Optional[_Iterable[str]] = ..., samples: _Optional[_Iterable[int]] = ..., shard_addresses: _Optional[_Iterable[str]] = ..., worker_addresses: _Optional[_Iterable[str]] = ...) -> None: ...

class LeaveRequest(_message.Message):
    __slots__ = ("worker_id", "view", "incarnation", "ending", "text", "retry", "replica_digest")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    VIEW_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    ENDING_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    RETRY_FIELD_NUMBER: _ClassVar[int]
    REPLICA_DIGEST_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    view: int
    incarnation: int
    ending: Ending
    text: str
    retry: bool
    replica_digest: bytes
    def __init__(self, worker_id: _Optional[str] = ..., view: _Optional[int] = ..., incarnation: _Optional[int] = ..., ending: _Optional[_Union[Ending, str]] = ..., text: _Optional[str] = ..., retry: bool = ..., replica_digest: _Optional[bytes] = ...) -> None: ...

class LeaveResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class WorkerMessage(_message.Message):
    __slots__ = ("hello", "contribution", "goodbye")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    CONTRIBUTION_FIELD_NUMBER: _ClassVar[int]
    GOODBYE_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    contribution: Contribution
    goodbye: Goodbye
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., contribution: _Optional[_Union[Contribution, _Mapping]] = ..., goodbye: _Optional[_Union[Goodbye, _Mapping]] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("protocol_version", "job_id", "job_digest", "view", "coordinator_incarnation", "worker_ids", "worker_index", "shard", "tensors", "layout_digest", "round", "buckets", "node_memory")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    JOB_DIGEST_FIELD_NUMBER: _ClassVar[int]
    VIEW_FIELD_NUMBER: _ClassVar[int]
    COORDINATOR_INCARNATION_FIELD_NUMBER: _ClassVar[int]
    WORKER_IDS_FIELD_NUMBER: _ClassVar[int]
    WORKER_INDEX_FIELD_NUMBER: _ClassVar[int]
    SHARD_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_DIGEST_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    BUCKETS_FIELD_NUMBER: _ClassVar[int]
    NODE_MEMORY_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    job_id: str
    job_digest: bytes
    view: int
    coordinator_incarnation: int
    worker_ids: _containers.RepeatedScalarFieldContainer[str]
    worker_index: int
    shard: int
    tensors: _containers.RepeatedCompositeFieldContainer[Tensor]
    layout_digest: bytes
    round: int
    buckets: _containers.RepeatedScalarFieldContainer[int]
    node_memory: bool
    def __init__(self, protocol_version: _Optional[int] = ..., job_id: _Optional[str] = ..., job_digest: _Optional[bytes] = ..., view: _Optional[int] = ..., coordinator_incarnation: _Optional[int] = ..., worker_ids: _Optional[_Iterable[str]] = ..., worker_index: _Optional[int] = ..., shard: _Optional[int] = ..., tensors: _Optional[_Iterable[_Union[Tensor, _Mapping]]] = ..., layout_digest: _Optional[bytes] = ..., round: _Optional[int] = ..., buckets: _Optional[_Iterable[int]] = ..., node_memory: bool = ...) -> None: ...

class Contribution(_message.Message):
    __slots__ = ("view", "round", "bucket", "codec", "scales", "payload", "parameter_digest", "incarnation")
    VIEW_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    BUCKET_FIELD_NUMBER: _ClassVar[int]
    CODEC_FIELD_NUMBER: _ClassVar[int]
    SCALES_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    PARAMETER_DIGEST_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    view: int
    round: int
    bucket: int
    codec: str
    scales: bytes
    payload: bytes
    parameter_digest: bytes
    incarnation: int
    def __init__(self, view: _Optional[int] = ..., round: _Optional[int] = ..., bucket: _Optional[int] = ..., codec: _Optional[str] = ..., scales: _Optional[bytes] = ..., payload: _Optional[bytes] = ..., parameter_digest: _Optional[bytes] = ..., incarnation: _Optional[int] = ...) -> None: ...

class Goodbye(_message.Message):
    __slots__ = ("ending", "text", "retry")
    ENDING_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    RETRY_FIELD_NUMBER: _ClassVar[int]
    ending: Ending
    text: str
    retry: bool
    def __init__(self, ending: _Optional[_Union[Ending, str]] = ..., text: _Optional[str] = ..., retry: bool = ...) -> None: ...

class ServerMessage(_message.Message):
    __slots__ = ("welcome", "average", "waiting", "refusal", "abort", "stop")
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    AVERAGE_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    ABORT_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    welcome: Welcome
    average: Average
    waiting: Waiting
    refusal: Refusal
    abort: Abort
    stop: StopRequest
    def __init__(self, welcome: _Optional[_Union[Welcome, _Mapping]] = ..., average: _Optional[_Union[Average, _Mapping]] = ..., waiting: _Optional[_Union[Waiting, _Mapping]] = ..., refusal: _Optional[_Union[Refusal, _Mapping]] = ..., abort: _Optional[_Union[Abort, _Mapping]] = ..., stop: _Optional[_Union[StopRequest, _Mapping]] = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("incarnation", "round", "missing")
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    MISSING_FIELD_NUMBER: _ClassVar[int]
    incarnation: int
    round: int
    missing: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, incarnation: _Optional[int] = ..., round: _Optional[int] = ..., missing: _Optional[_Iterable[int]] = ...) -> None: ...

class Average(_message.Message):
    __slots__ = ("view", "round", "bucket", "codec", "scales", "payload", "incarnation")
    VIEW_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    BUCKET_FIELD_NUMBER: _ClassVar[int]
    CODEC_FIELD_NUMBER: _ClassVar[int]
    SCALES_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    view: int
    round: int
    bucket: int
    codec: str
    scales: bytes
    payload: bytes
    incarnation: int
    def __init__(self, view: _Optional[int] = ..., round: _Optional[int] = ..., bucket: _Optional[int] = ..., codec: _Optional[str] = ..., scales: _Optional[bytes] = ..., payload: _Optional[bytes] = ..., incarnation: _Optional[int] = ...) -> None: ...

class StopRequest(_message.Message):
    __slots__ = ("text",)
    TEXT_FIELD_NUMBER: _ClassVar[int]
    text: str
    def __init__(self, text: _Optional[str] = ...) -> None: ...
