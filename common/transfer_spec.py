"""The job spec's section `transfer`: training that starts from parameters which another training has found."""

from __future__ import annotations

import re
from enum import StrEnum
from typing import Self

from pydantic import field_validator, model_validator

from common.errors import refusal
from common.section import Section

ALL_BUT_HEAD = "all-but-head"
_SHA256 = re.compile(r"[0-9a-f]{64}")


class Head(StrEnum):
    AUTO = "auto"
    SAME = "same"
    NEW = "new"


class TransferSpec(Section):
    """Fine-tuning: what the workers start from, which part of it they keep and which part stays as it is."""

    init: bool = False
    """Workers start from the parameters in a file, `--init`, and are refused without one (`datps train --init` sets
    it). A resumed run goes on from its checkpoint."""
    sha256: str | None = None
    """SHA-256 of that file in hex (of a checkpoint: of its state.safetensors); `datps train` fills it in. Any file
    where absent."""
    head: Head = Head.AUTO
    """The last linear layer: `same` takes the file's, `new` draws it anew, `auto` draws it anew where the file's has
    another shape, is missing, or is known to tell other classes."""
    freeze: tuple[str, ...] = ()
    """Parameters that stay as they are: `all-but-head`, or glob patterns of names within the network: `layer1.*` of
    resnet50; the others number their layers, `0.*` is the first, and `[0-2].*` preact_resnet18's stem and first stage.
    They do not travel. A batch norm whose parameters are all frozen normalizes by the statistics that it came with."""

    @field_validator("freeze", mode="before")
    @classmethod
    def _one_pattern_is_a_list_of_one(cls, value: object) -> object:
        return (value,) if isinstance(value, str) else value

    @field_validator("sha256", mode="before")
    @classmethod
    def _sha256_is_hex(cls, value: object) -> object:
        if value is not None and not (isinstance(value, str) and _SHA256.fullmatch(value)):
            raise ValueError(refusal("64 digits of 0-9 and a-f", "sha256", value))
        return value

    @model_validator(mode="after")
    def _nothing_is_transferred_without_a_file(self) -> Self:
        for name in ("sha256", "head", "freeze"):
            value = getattr(self, name)
            if not self.init and value != TransferSpec.model_fields[name].default:
                shown = list(value) if isinstance(value, tuple) else value
                raise ValueError(refusal("transfer.init=true (or datps train --init FILE)", name, shown))
        return self
