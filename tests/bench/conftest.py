"""What the laboratory's tests need: namespaces where there can be any, a reason where not."""

from __future__ import annotations

import subprocess

import pytest

from bench.links import refuse_where_impossible
from common.errors import SpecError


@pytest.fixture(scope="session")
def _why_no_namespaces() -> str | None:
    """Probed with plain commands: a defect of our own must fail a test, not skip it."""
    try:
        refuse_where_impossible()
    except SpecError as error:
        return str(error)
    probe, device = "datps-test-probe", ["dev", "lo", "root"]
    shaper = ["tbf", "rate", "1gbit", "burst", "100000", "limit", "200000"]
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True, check=False)
    if made.returncode != 0:
        return f"no permission to make network namespaces: {made.stderr.strip()}"
    try:
        command = ["tc", "-n", probe, "qdisc", "add", *device, *shaper]
        shaped = subprocess.run(command, capture_output=True, text=True, check=False)
        return None if shaped.returncode == 0 else f"no tbf in this kernel: {shaped.stderr.strip()}"
    finally:
        subprocess.run(["ip", "netns", "delete", probe], check=False)


@pytest.fixture
def namespaces(_why_no_namespaces: str | None) -> None:
    """Skips a test where there can be no shaped links."""
    if _why_no_namespaces:
        pytest.skip(_why_no_namespaces)
