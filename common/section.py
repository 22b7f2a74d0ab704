"""What all sections of the job spec have in common: frozen, strict, numbers that may be written as fractions."""

from __future__ import annotations

from fractions import Fraction
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator

from common.errors import refusal


def number(value: object) -> object:
    """Reads `8/255` as a number; everything else is left as it is, to the validators."""
    if isinstance(value, str) and "/" in value:
        try:
            return float(Fraction(value.replace(" ", "")))
        except (ValueError, ZeroDivisionError):
            return value
    return value


Number = Annotated[float, BeforeValidator(number), Field(allow_inf_nan=False)]
"""A finite float; YAML and flags may write it as a fraction, `8/255`."""


class Section(BaseModel):
    """Base of all sections: frozen, keyword-only, no unknown keys; the docstring under a field is its help."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True)

    @field_validator("*", mode="before")
    @classmethod
    def _switches_are_no_numbers(cls, value: object, info: ValidationInfo) -> object:
        # YAML reads `yes` and `on` as true, which would pass for 1.
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation is not bool:
            raise ValueError(refusal("a value that is no switch", str(info.field_name), value))
        return value
