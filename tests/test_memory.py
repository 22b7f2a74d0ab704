"""The C heap that keeps what is freed, counted in page faults of a process of its own."""

from __future__ import annotations

import os
import resource
import subprocess
import sys

import pytest

from common.memory import keep_freed_memory

MESSAGE = 32 << 20
PAGES = MESSAGE // resource.getpagesize()


@pytest.mark.parametrize(
    ("environment", "is_kept"),
    [({}, True), ({"MALLOC_ARENA_MAX": "16"}, False), ({"GLIBC_TUNABLES": "glibc.malloc.arena_max=16"}, False)],
    ids=["as it comes", "MALLOC_ARENA_MAX", "GLIBC_TUNABLES"],
)
@pytest.mark.skipif(sys.platform != "linux", reason="glibc")
def test_a_second_message_needs_no_new_pages_unless_the_environment_has_decided(
    environment: dict[str, str], is_kept: bool
) -> None:
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("MALLOC_", "GLIBC_"))}
    command = [sys.executable, "-m", "tests.test_memory"]
    shown = subprocess.run(command, env=inherited | environment, capture_output=True, text=True, check=True)
    said, faults = shown.stdout.split()
    assert said == str(is_kept)
    assert (int(faults) < PAGES / 10) == is_kept


def main() -> None:
    """Prints whether memory is kept, and the page faults of the second of two messages."""
    print(keep_freed_memory())
    faults = 0
    for _ in range(2):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        message = bytes([1]) * MESSAGE
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
        del message
    print(faults)


if __name__ == "__main__":
    main()
