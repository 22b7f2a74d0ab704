"""Real processes with error feedback: a run goes on with the residuals of all its workers, or says whose is missing."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from tests.processes.test_processes import SMALL, WAIT_S, datps, train, wait_for_line

pytestmark = [pytest.mark.processes, pytest.mark.timeout(400)]

SIGN = ("codec.name=sign", "codec.two_sided=false", "codec.block=64")


def test_a_run_that_is_stopped_and_resumed_ends_with_the_parameters_of_an_undisturbed_one(tmp_path: Path) -> None:
    undisturbed, out = train(tmp_path / "undisturbed", *SIGN), tmp_path / "stopped"
    with datps("train", "--no-baseline", "--json", "--out", str(out), settings=(*SMALL, *SIGN)) as process:
        wait_for_line(process, out / "logs" / "worker-0.jsonl", '"event": "round"')
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=WAIT_S)
        assert process.returncode == 143
    (saved,) = (path.name for path in (out / "checkpoints").iterdir())
    own = out / "residuals" / saved
    assert sorted(path.name for path in own.iterdir()) == ["residual-0.safetensors", "residual-1.safetensors"]
    missing = own / "residual-1.safetensors"
    content = missing.read_bytes()
    missing.unlink()
    with datps("train", "--no-baseline", "--json", "--resume", str(out)) as process:
        output, _ = process.communicate(timeout=WAIT_S)
        assert process.returncode == 65
        assert str(missing) in output
    missing.write_bytes(content)
    with datps("train", "--no-baseline", "--json", "--resume", str(out)) as process:
        output, errors = process.communicate(timeout=WAIT_S)
        assert process.returncode == 0, output + errors
    result = json.loads((out / "result.json").read_text())
    assert result["parameter_digest"] == undisturbed["parameter_digest"]
    assert 0.1 < result["pushed_bytes_per_round"] / result["parameters"] < 0.3
