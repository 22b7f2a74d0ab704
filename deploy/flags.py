"""Flags that exclude each other, and what lists of devices mean."""

from __future__ import annotations

import typer

from common.errors import SpecError, refusal
from worker.local.devices import parse_devices


def devices_of(context: typer.Context, devices: str | None) -> str | None:
    """The list of devices, if it counts; `--device` and `--devices` exclude each other.

    Raises:
        SpecError: both flags are given, or the list means nothing.
    """
    if devices is None or not given(context, "devices", over=("device",)):
        return None
    parse_devices(devices)
    return devices


def given(context: typer.Context, name: str, *, over: tuple[str, ...]) -> bool:
    """Whether an option counts beside those that it excludes: a flag wins over variables.

    Raises:
        SpecError: two flags that exclude each other.
    """

    def is_flag(option: str) -> bool:
        source = context.get_parameter_source(option)
        return source is not None and source.name == "COMMANDLINE"

    others = [other for other in over if is_flag(other)]
    if not others:
        return True
    if is_flag(name):
        both = f"--{name} and --{others[0]}"
        raise SpecError(refusal(f"--{name} or --{others[0]}", "flags", both, "they exclude each other"))
    return False
