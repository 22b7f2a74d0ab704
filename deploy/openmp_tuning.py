"""How torch's threads wait for each other, which is set in the environment before it is imported."""

from __future__ import annotations

import os

SPIN_COUNT = "30000"
"""About a tenth of what libgomp does by itself: some 0.1 ms of looking again and again before a thread sleeps."""
_DECIDED = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")


def tune_openmp() -> None:
    """Sets `GOMP_SPINCOUNT` for this process and those that it starts, unless the environment has decided.

    A thread that waits by spinning keeps the core that the one it waits for would need, as soon as others use the
    machine, too (docs/decisions/0012).
    """
    if not any(name in os.environ for name in _DECIDED):
        os.environ["GOMP_SPINCOUNT"] = SPIN_COUNT
