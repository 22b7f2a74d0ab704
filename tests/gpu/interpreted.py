"""Runs all programs with Triton's interpreter on the CPU: `python -m tests.gpu.interpreted FILE.npz`.

In a process of its own: whether a kernel is interpreted is decided when its module is imported, for Triton's own
functions too, and the rest of the suite may have imported them before.
"""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path

import numpy as np
import torch

from tests.gpu.exchanges import EXCHANGE_PROGRAMS
from tests.gpu.programs import PROGRAMS
from tests.gpu.scenarios import SCENARIO_PROGRAMS
from tests.gpu.trainings import TRAINING_PROGRAMS


def main(path: Path) -> None:
    """Writes an array `program/name` for everything that a program returns, `program/failure` where it fails."""
    assert os.environ["TRITON_INTERPRET"] == "1"
    torch.set_num_threads(1)
    arrays = {}
    with np.errstate(invalid="ignore"):  # the interpreter casts the NaN of refused values to integers
        for name, program in (PROGRAMS | SCENARIO_PROGRAMS | EXCHANGE_PROGRAMS | TRAINING_PROGRAMS).items():
            if name.endswith(" streams"):
                continue
            try:
                arrays |= {f"{name}/{key}": array for key, array in program(torch.device("cpu")).items()}
            except Exception:
                arrays[f"{name}/failure"] = np.array(traceback.format_exc())
    np.savez(path, **arrays)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
