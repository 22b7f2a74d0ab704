"""Where the GPU's programs run: interpreted, once, in a process of its own; and on a GPU, where there is one."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[2]

SECONDS = 300
"""For a test with its fixtures: a process of its own takes ten, many times that on a machine with much else to do."""

Outcome = Callable[[str], dict[str, np.ndarray]]


def run_module(name: str, path: Path, **environment: str) -> Path:
    """Runs `python -m name path` from the repository's root; returns the path."""
    done = subprocess.run(
        [sys.executable, "-m", name, str(path)],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=SECONDS - 20,
    )
    assert done.returncode == 0, done.stderr
    return path


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Path]]:
    """Waits for a file that a process of its own writes; all of these run at the same time."""
    folder = tmp_path_factory.mktemp("gpu")
    with ThreadPoolExecutor(2) as pool:
        files = {
            "interpreted.npz": pool.submit(
                run_module, "tests.gpu.interpreted", folder / "interpreted.npz", TRITON_INTERPRET="1"
            ),
            "compiled.json": pool.submit(
                run_module, "tests.gpu.compiled", folder / "compiled.json", TRITON_INTERPRET="0"
            ),
        }
        yield lambda name: files[name].result()


@pytest.fixture(scope="session")
def interpreted(written: Callable[[str], Path]) -> Outcome:
    """What a program returns when it is interpreted."""
    with np.load(written("interpreted.npz")) as file:
        arrays = dict(file)

    def outcome(name: str) -> dict[str, np.ndarray]:
        found = {key.partition("/")[2]: array for key, array in arrays.items() if key.partition("/")[0] == name}
        assert "failure" not in found, str(found["failure"])
        assert found, f"no program is called {name}"
        return found

    return outcome


@pytest.fixture(params=["interpreted", "native"])
def outcome(request: pytest.FixtureRequest) -> Outcome:
    """What a program of `programs.py` returns, here and there."""
    return request.getfixturevalue(request.param)


@pytest.fixture
def native() -> Outcome:
    """What a program returns on the GPU."""
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device here: the kernels are only interpreted and compiled, not run")
    from tests.gpu.programs import PROGRAMS
    from tests.gpu.scenarios import SCENARIO_PROGRAMS

    return lambda name: (PROGRAMS | SCENARIO_PROGRAMS)[name](torch.device("cuda"))
