"""Where a job spec comes from: flags, environment, YAML, or another process's JSON; one mechanism for all.

Precedence: flag > environment > YAML > default. Unknown keys are refused with the nearest known name.
"""

from __future__ import annotations

import difflib
import functools
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from common.config import JobSpec
from common.errors import SpecError, refusal

ENVIRONMENT_PREFIX = "DATPS_"
_NESTED = "__"
AnySection = TypeVar("AnySection", bound=BaseModel)


def job_spec_from_json(text: str) -> JobSpec:
    """The inverse of `JobSpec.to_json`.

    Raises:
        SpecError: the text is not a job spec.
    """
    try:
        return validated(JobSpec, json.loads(text), "job spec as JSON")
    except (json.JSONDecodeError, RecursionError) as error:
        raise SpecError(refusal("a job spec as JSON", "text", text[:40], str(error))) from None


def spec_keys(model: type[BaseModel] = JobSpec, prefix: str = "") -> Iterator[tuple[str, str, object]]:
    """All dotted keys of a section with (key, help, default), in order of declaration."""
    for name, field in model.model_fields.items():
        annotation = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            yield from spec_keys(annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field.description or "", field.get_default()


def differences(ours: JobSpec, theirs: JobSpec) -> Iterator[tuple[str, object, object]]:
    """The dotted keys in which two jobs differ, with both values."""
    for key, _, _ in spec_keys():
        values = [functools.reduce(getattr, key.split("."), spec) for spec in (ours, theirs)]
        if values[0] != values[1]:
            yield key, values[0], values[1]


def environment_name(key: str) -> str:
    """`codec.two_sided` -> `DATPS_CODEC__TWO_SIDED`."""
    return ENVIRONMENT_PREFIX + key.replace(".", _NESTED).upper()


def load_job_spec(
    *,
    yaml_text: str | None = None,
    yaml_name: str = "YAML",
    environment: Mapping[str, str] | None = None,
    settings: Iterable[str] = (),
    reserved: frozenset[str] = frozenset(),
) -> JobSpec:
    """Builds the job spec; precedence `settings` > `environment` > YAML > default.

    Args:
        yaml_text: the YAML document, a mapping of sections.
        yaml_name: what error messages call it.
        environment: `DATPS_*` variables are read from it, `DATPS_CODEC__BITS=4` for `codec.bits`.
        settings: `dotted.key=value`; values are parsed as YAML scalars or lists.
        reserved: `DATPS_*` names that belong to a process's own flags and are passed over.

    Raises:
        SpecError: an unknown key (with the nearest known one), or a value that breaks its rule.
    """
    known = [key for key, _, _ in spec_keys()]
    merged: dict[str, Any] = {}
    sources: dict[str, str] = {}
    if yaml_text is not None:
        for key, value in _parse_yaml(yaml_text, yaml_name):
            if value is None and any(name.startswith(f"{key}.") for name in known):
                continue  # a section without keys
            _place(merged, sources, known, key, value, yaml_name)
    by_variable = {environment_name(key): key for key in known}
    for name, value in sorted((environment or {}).items()):
        if not name.startswith(ENVIRONMENT_PREFIX) or name in reserved:
            continue
        if name not in by_variable:
            _refuse_unknown("variable", name, list(by_variable), "environment")
        _place(merged, sources, known, by_variable[name], _scalar(value, name, "environment"), f"environment {name}")
    for setting in settings:
        key, separator, value = setting.partition("=")
        if not separator:
            raise SpecError(refusal("dotted.key=value", "setting", setting, "--set"))
        _place(merged, sources, known, key.strip(), _scalar(value, key, "--set"), "--set")
    return validated(JobSpec, merged, "job spec", sources)


def read_yaml(text: str, name: str) -> Any:
    """What a YAML document holds; `name` is what error messages call it.

    Raises:
        SpecError: it is none.
    """
    with _refusing_bad_yaml(name):
        return yaml.safe_load(text)


def _parse_yaml(text: str, name: str) -> list[tuple[str, Any]]:
    document = read_yaml(text, name)
    if document is None:
        return []
    if not isinstance(document, Mapping):
        raise SpecError(refusal("a mapping of sections", "document", type(document).__name__, name))
    with _refusing_bad_yaml(name):  # a mapping may hold itself
        return list(_flatten(document))


@contextmanager
def _refusing_bad_yaml(name: str) -> Iterator[None]:
    try:
        yield
    except (yaml.YAMLError, RecursionError, ValueError) as error:  # ValueError: 2024-13-45 is no date
        raise SpecError(refusal("valid YAML", "document", name, str(error).replace("\n", " "))) from None


def _scalar(text: str, name: str, source: str) -> object:
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError):
        raise SpecError(refusal("a YAML value", name, text, source)) from None


def _flatten(mapping: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in mapping.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _place(
    merged: dict[str, Any], sources: dict[str, str], known: list[str], key: str, value: object, source: str
) -> None:
    if key not in known:
        _refuse_unknown("key", key, known, source)
    *sections, name = key.split(".")
    target = merged
    for section in sections:
        target = target.setdefault(section, {})
    target[name] = value
    sources[key] = source


def _refuse_unknown(kind: str, name: str, known: list[str], source: str) -> None:
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
    hint = f"; did you mean {nearest[0]}?" if nearest else ""
    raise SpecError(refusal(f"a known {kind}{hint}", kind, name, source))


def validated(
    model: type[AnySection], content: Mapping[str, Any], context: str, sources: Mapping[str, str] | None = None
) -> AnySection:
    """A section from its keys and values; `sources`: where each dotted key comes from, if not all from `context`.

    Raises:
        SpecError: one line for each key that is unknown or breaks its rule.
    """
    try:
        return model.model_validate(content)
    except ValidationError as error:
        known = [key for key, _, _ in spec_keys(model)]
        lines = [_describe(details, context, sources or {}, known) for details in error.errors()]
        raise SpecError("\n".join(dict.fromkeys(lines))) from None


def _describe(details: ErrorDetails, context: str, sources: Mapping[str, str], known: Sequence[str]) -> str:
    """One refusal per pydantic error, in the project's form."""
    prefixes = list(itertools.accumulate((str(part) for part in details["loc"]), "{}.{}".format))
    key = prefixes[-1] if prefixes else "document"
    source = next((sources[prefix] for prefix in prefixes if prefix in sources), context)
    if details["type"] == "value_error":
        return f"{details['ctx']['error']} ({key}, {source})"
    if details["type"] == "extra_forbidden":
        nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
        return refusal(f"a known key; did you mean {nearest[0]}?", "key", key, source)
    message = details["msg"].removeprefix("Input should be ").removeprefix("a valid ").removeprefix("String should ")
    rule = re.split(", (?:unable|got)", message)[0]
    return refusal(rule, key, details["input"], source)
