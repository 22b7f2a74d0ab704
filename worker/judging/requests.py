"""What to evaluate with: attacks such as `pgd:50x10,epsilon=8/255`, and sweeps over one of their parameters.

`NAME[:STEPS[xRESTARTS]][,KEY=VALUE...]`. What an attack leaves out comes from the job's evaluation attack.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from pydantic import ValidationError

from common.config import AttackName, AttackNorm, AttackSpec, BatchNormMode, JobSpec
from common.errors import SpecError, refusal

RULE = "pgd, fgsm or autoattack as NAME[:STEPS[xRESTARTS]][,KEY=VALUE...], e.g. pgd:50x10,epsilon=8/255"
SWEEP_RULE = "epsilon=VALUE,... or steps=VALUE,..., e.g. epsilon=0,2/255,4/255"
MAXIMAL_COUNT = 1000
"""Of steps, and of restarts."""
LEAST_STEP = 1e-12
"""A step size is positive even where epsilon is 0."""


class Name(StrEnum):
    PGD = "pgd"
    FGSM = "fgsm"
    AUTOATTACK = "autoattack"


KEYS = {
    Name.PGD: ("epsilon", "norm", "step_size", "random_start", "steps", "restarts"),
    Name.FGSM: ("epsilon", "norm", "step_size", "random_start", "restarts"),
    Name.AUTOATTACK: ("epsilon", "norm"),
}
"""What may be said of each; the standard suite has no parameters of its own."""
SWEPT = ("epsilon", "steps")
COMPONENTS = ("apgd-ce", "apgd-t", "fab-t", "square")
"""Of AutoAttack's standard version, in order."""


@dataclass(frozen=True, kw_only=True)
class ParsedAttack:
    """An attack as its user wrote it, each value checked on its own."""

    name: Name
    given: tuple[tuple[str, str], ...] = ()

    @property
    def label(self) -> str:
        """How results name it: its text in one form, `pgd:20x5,epsilon=8/255`."""
        texts = dict(self.given)
        steps, restarts = texts.pop("steps", ""), texts.pop("restarts", "")
        if steps:
            head = f"{self.name}:{steps}" + (f"x{restarts}" if restarts else "")
        else:
            head = self.name + (f",restarts={restarts}" if restarts else "")
        return ",".join([head, *(f"{key}={text}" for key, text in texts.items())])

    def changed(self, key: str, text: str) -> ParsedAttack:
        """The same attack with another value of one key.

        Raises:
            SpecError: this attack has no such key, or it takes no such value.
        """
        if key not in KEYS[self.name]:
            rule = f"one of {', '.join(KEYS[self.name])} ({self.name})"
            nearest = difflib.get_close_matches(key, KEYS[self.name], n=1)
            raise SpecError(refusal(rule, "key", key, f"did you mean {nearest[0]}?" if nearest else f"{key}={text}"))
        _value(key, text)
        given = {**dict(self.given), key: text}
        return ParsedAttack(name=self.name, given=tuple(given.items()))


@dataclass(frozen=True, kw_only=True)
class Request:
    """An attack with every parameter; two are equal if they do the same, whatever they are called."""

    label: str = field(compare=False)
    name: Name
    norm: AttackNorm
    epsilon: float
    """Radius, in pixel units [0, 1]."""
    steps: int = 1
    restarts: int = 1
    step_size: float | None = None
    """In pixel units; None for AutoAttack, which chooses its own."""
    random_start: bool = False

    @property
    def spec(self) -> AttackSpec:
        """The attack of PGD and FGSM, in eval mode.

        Raises:
            SpecError: a value out of its range.
        """
        try:
            return AttackSpec(
                name=AttackName(self.name.value),
                norm=self.norm,
                epsilon=self.epsilon,
                steps=self.steps,
                step_size=self.step_size,
                random_start=self.random_start,
                batch_norm=BatchNormMode.EVAL,
            )
        except ValidationError as error:
            reasons = "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors())
            raise SpecError(refusal("an attack within its ranges", "attack", self.label, reasons)) from None

    @property
    def stages(self) -> tuple[str, ...]:
        """What it does one after the other, each on the samples that have resisted so far."""
        if self.name is Name.AUTOATTACK:
            return COMPONENTS
        return tuple(f"restart {number}" for number in range(1, self.restarts + 1))

    def parameters(self) -> dict[str, Any]:
        """All of it but its label, JSON-able."""
        if self.name is Name.AUTOATTACK:
            return {"name": "autoattack", "version": "standard", "norm": self.norm.value, "epsilon": self.epsilon}
        return {**self.spec.model_dump(mode="json", exclude={"warmup", "replays"}), "restarts": self.restarts}


@dataclass(frozen=True, kw_only=True)
class ParsedSweep:
    """A key and the values that it takes, as texts."""

    key: str
    values: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """For each value of a key, every attack with that value."""

    key: str
    values: tuple[str, ...]
    rows: tuple[tuple[Request, ...], ...]
    """One row for each value, one request for each attack."""
    attacks: tuple[str, ...]
    """Labels of the attacks that are swept."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to run: attacks, or sweeps of them."""

    attacks: tuple[Request, ...]
    """Whose worst case is asked for; none if there are sweeps."""
    sweeps: tuple[Sweep, ...] = ()

    @property
    def requests(self) -> tuple[Request, ...]:
        """All that has to be run, each once, in order."""
        every = [*self.attacks, *(request for sweep in self.sweeps for row in sweep.rows for request in row)]
        return tuple(dict.fromkeys(every))


def parse_attack(text: str) -> ParsedAttack:
    """Reads an attack.

    Raises:
        SpecError: another name or key, a value that breaks its rule, or a key given twice.
    """
    head, *pairs = text.replace(" ", "").split(",")
    name, colon, counts = head.partition(":")
    if name not in tuple(Name):
        raise SpecError(refusal(RULE, "attack", text))
    parsed = ParsedAttack(name=Name(name))
    if colon:
        steps, times, restarts = counts.partition("x")
        if not steps or (times and not restarts):
            raise SpecError(refusal(RULE, "attack", text, "steps, and restarts behind an x"))
        pairs = [f"steps={steps}", *([f"restarts={restarts}"] if times else []), *pairs]
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not value:
            raise SpecError(refusal(RULE, "attack", text, f"{pair!r} is no KEY=VALUE"))
        if key in dict(parsed.given):
            raise SpecError(refusal(f"{key} once", "attack", text))
        parsed = parsed.changed(key, value)
    return parsed


def parse_sweep(text: str) -> ParsedSweep:
    """Reads a sweep.

    Raises:
        SpecError: another key, no values, the same one twice, or one that breaks its rule.
    """
    key, _, listed = text.replace(" ", "").partition("=")
    values = tuple(listed.split(","))
    if key not in SWEPT or not all(values):
        raise SpecError(refusal(SWEEP_RULE, "sweep", text))
    read = [_value(key, value) for value in values]
    if len(set(read)) < len(read):
        raise SpecError(refusal(f"each {key} once", "sweep", text))
    return ParsedSweep(key=key, values=values)


def make_plan(attacks: Sequence[ParsedAttack], sweeps: Sequence[ParsedSweep], job: JobSpec) -> Plan:
    """What to run; without attacks it is the job's evaluation attack.

    Raises:
        SpecError: attacks that do the same, a sweep over what an attack does not have, or see `resolve`.
    """
    named = list(attacks) or [_of_the_job(job)]
    if not sweeps:
        requests = [resolve(parsed, job) for parsed in named]
        for number, request in enumerate(requests):
            if request in requests[:number]:
                same = requests[requests.index(request)].label
                raise SpecError(refusal("attacks that differ", "attack", request.label, f"the same as {same}"))
        return Plan(attacks=tuple(requests))
    return Plan(attacks=(), sweeps=tuple(_swept(sweep, named, job) for sweep in sweeps))


def resolve(parsed: ParsedAttack, job: JobSpec) -> Request:
    """Fills in what the user left out.

    PGD: the job's evaluation attack, with a step size of epsilon / 8 unless the job sets one. FGSM: one step of epsilon
    from the image itself (Goodfellow et al. 2015), not the random start and 1.25 epsilon of the training attack of the
    same name; both can be asked for.

    Raises:
        SpecError: restarts that would repeat each other, or no radius in the norm that is asked for.
    """
    given: dict[str, Any] = {key: _value(key, text) for key, text in parsed.given}
    theirs = job.evaluation_attack
    norm = given.get("norm", theirs.norm)
    if norm is not theirs.norm and "epsilon" not in given:
        rule = f"epsilon={norm} radius (the job's evaluation attack has one in {theirs.norm})"
        raise SpecError(refusal(rule, "attack", parsed.label))
    epsilon = given.get("epsilon", theirs.epsilon)
    if norm is AttackNorm.LINF and epsilon > 1:
        raise SpecError(refusal("at most 1, in pixel units (norm linf)", "epsilon", f"{epsilon:g}", parsed.label))
    if parsed.name is Name.AUTOATTACK:
        return Request(label=parsed.label, name=parsed.name, norm=norm, epsilon=epsilon)
    is_pgd, restarts = parsed.name is Name.PGD, given.get("restarts", 1)
    random_start = given.get("random_start", theirs.random_start if is_pgd else False)
    if restarts > 1 and not random_start:
        raise SpecError(refusal("random_start=true with restarts", "attack", parsed.label, "they would be the same"))
    own_step = job.evaluation.attack.step_size if norm is theirs.norm else None
    default_step = (epsilon / 8 if own_step is None else own_step) if is_pgd else epsilon
    request = Request(
        label=parsed.label,
        name=parsed.name,
        norm=norm,
        epsilon=epsilon,
        steps=given.get("steps", theirs.steps) if is_pgd else 1,
        restarts=restarts,
        step_size=given.get("step_size", max(default_step, LEAST_STEP)),
        random_start=random_start,
    )
    _ = request.spec  # refuses what is out of range
    return request


def _of_the_job(job: JobSpec) -> ParsedAttack:
    return ParsedAttack(name=Name.PGD, given=(("steps", str(job.evaluation.attack.steps)),))


def _swept(sweep: ParsedSweep, attacks: Sequence[ParsedAttack], job: JobSpec) -> Sweep:
    rows = tuple(tuple(resolve(parsed.changed(sweep.key, value), job) for parsed in attacks) for value in sweep.values)
    labels = tuple(_without(parsed, sweep.key).label for parsed in attacks)
    for label in labels:
        if labels.count(label) > 1:
            raise SpecError(refusal(f"attacks that differ in more than {sweep.key}", "attack", label, "--sweep"))
    return Sweep(key=sweep.key, values=sweep.values, rows=rows, attacks=labels)


def _without(parsed: ParsedAttack, key: str) -> ParsedAttack:
    return ParsedAttack(name=parsed.name, given=tuple(pair for pair in parsed.given if pair[0] != key))


def _value(key: str, text: str) -> Any:
    """The value that a text means.

    Raises:
        SpecError: it means none.
    """
    match key:
        case "epsilon" | "step_size":
            rule = "a number of at least 0, or a fraction as 8/255" if key == "epsilon" else "a number above 0"
            number = _number(text)
            if number is None or number < 0 or (key == "step_size" and number == 0):
                raise SpecError(refusal(rule, key, text))
            return number
        case "steps" | "restarts":
            if not text.isascii() or not text.isdigit() or not 1 <= int(text[:9]) <= MAXIMAL_COUNT or len(text) > 9:
                raise SpecError(refusal(f"a whole number from 1 to {MAXIMAL_COUNT}", key, text))
            return int(text)
        case "norm":
            if text not in tuple(AttackNorm):
                raise SpecError(refusal("linf or l2", key, text))
            return AttackNorm(text)
        case _:
            if text not in ("true", "false"):
                raise SpecError(refusal("true or false", key, text))
            return text == "true"


def _number(text: str) -> float | None:
    """A finite float, or a quotient of two; None if it is neither."""
    try:
        parts = [float(part) for part in text.split("/")]
    except ValueError:
        return None
    if len(parts) > 2 or not all(map(math.isfinite, parts)) or (len(parts) == 2 and parts[1] == 0):
        return None
    number = parts[0] / parts[1] if len(parts) == 2 else parts[0]
    return number if math.isfinite(number) else None
