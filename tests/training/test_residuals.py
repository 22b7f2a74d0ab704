"""Residuals on disk: what is saved is what is loaded, and what does not belong here is refused by name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from common.codecs import make_codec
from common.config import CodecSpec
from common.errors import EXIT_CHECKPOINT, CheckpointError, SpecError, StorageError
from common.layout import Layout, TensorSpec, plan_layout
from tests.codecs.table import KEY, gaussian
from tests.support import TENSORS, job
from worker.exchange.feedback import ErrorFeedback
from worker.residuals import Residuals, newest_whole, residual_file

SPEC = CodecSpec(name="sign", block=64, two_sided=False)


def layout_of(*settings: str, tensors: tuple[TensorSpec, ...] = TENSORS) -> Layout:
    return plan_layout(tensors, job("codec.name=sign", *settings))


LAYOUT = layout_of()
PARAMETERS = b"p" * 16
"""Some parameters' digest."""


def after_rounds(rounds: int) -> ErrorFeedback:
    """Error feedback with what some rounds have left."""
    feedback, codec = ErrorFeedback(LAYOUT.d), make_codec(SPEC, start=0, stop=LAYOUT.d, layer_edges=(0, LAYOUT.d))
    for round_ in range(rounds):
        feedback.encode(codec, gaussian(LAYOUT.d, seed=round_), 0, KEY)
    return feedback


def residuals(
    folder: Path, feedback: ErrorFeedback, worker_index: int = 1, keep: int = 2, layout: Layout = LAYOUT
) -> Residuals:
    return Residuals(folder, feedback, layout=layout, worker_index=worker_index, keep=keep)


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_what_is_loaded_is_what_was_saved(tmp_path: Path) -> None:
    saved, loaded = after_rounds(3), ErrorFeedback(LAYOUT.d)
    residuals(tmp_path, saved).save(3, PARAMETERS)
    residuals(tmp_path, loaded).begin(3, PARAMETERS, anew=True)
    assert np.array_equal(loaded.residual, saved.residual)
    assert files(tmp_path) == ["round-000003/residual-1.safetensors"]


def test_workers_share_a_folder_and_each_keeps_its_newest_and_one_more_than_there_are_checkpoints(
    tmp_path: Path,
) -> None:
    """With one checkpoint, that of round 10 is the run's only one until that of round 15 is whole."""
    own, other = residuals(tmp_path, after_rounds(1), 0), residuals(tmp_path, after_rounds(2), 1, keep=1)
    for round_ in (5, 10, 15):
        own.save(round_, PARAMETERS)
        other.save(round_, PARAMETERS)
    of_0 = [f"round-0000{round_}/residual-0.safetensors" for round_ in ("05", "10", "15")]
    of_1 = [f"round-0000{round_}/residual-1.safetensors" for round_ in ("10", "15")]
    assert files(tmp_path) == sorted(of_0 + of_1)
    loaded = ErrorFeedback(LAYOUT.d)
    residuals(tmp_path, loaded, 1).begin(15, PARAMETERS, anew=True)
    assert np.array_equal(loaded.residual, after_rounds(2).residual)


def test_going_on_forgets_this_workers_later_rounds_only(tmp_path: Path) -> None:
    for round_ in (5, 10):
        for worker in (0, 1):
            residuals(tmp_path, after_rounds(1), worker).save(round_, PARAMETERS)
    residuals(tmp_path, ErrorFeedback(LAYOUT.d), 1).begin(5, PARAMETERS, anew=True)
    assert files(tmp_path) == [
        *("round-000005/residual-0.safetensors", "round-000005/residual-1.safetensors"),
        "round-000010/residual-0.safetensors",
    ]


def test_a_run_that_begins_refuses_a_folder_of_another_run_unless_it_is_started_anew(tmp_path: Path) -> None:
    residuals(tmp_path, after_rounds(1)).save(5, PARAMETERS)
    with pytest.raises(SpecError, match="expected a folder without residuals of another run"):
        residuals(tmp_path, ErrorFeedback(LAYOUT.d)).begin(0, PARAMETERS, anew=False)
    residuals(tmp_path, ErrorFeedback(LAYOUT.d), 2).begin(0, PARAMETERS, anew=False)
    feedback = ErrorFeedback(LAYOUT.d)
    residuals(tmp_path, feedback).begin(0, PARAMETERS, anew=True)
    assert files(tmp_path) == []
    assert not feedback.residual.any()


def test_a_missing_file_is_an_unusable_checkpoint_and_is_named(tmp_path: Path) -> None:
    residuals(tmp_path, after_rounds(1)).save(5, PARAMETERS)
    with pytest.raises(CheckpointError, match=r"residual after round 10, got file=.*round-000010/residual-1") as caught:
        residuals(tmp_path, ErrorFeedback(LAYOUT.d)).begin(10, PARAMETERS, anew=True)
    assert caught.value.exit_code == EXIT_CHECKPOINT == 65
    assert files(tmp_path) == ["round-000005/residual-1.safetensors"]


@pytest.mark.parametrize("at", [0, 9, 300, -1])
def test_a_damaged_file_is_refused(tmp_path: Path, at: int) -> None:
    residuals(tmp_path, after_rounds(2)).save(5, PARAMETERS)
    path = residual_file(tmp_path, 5, 1)
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"residual-1\.safetensors"):
        residuals(tmp_path, ErrorFeedback(LAYOUT.d)).begin(5, PARAMETERS, anew=True)


def test_a_file_that_is_cut_off_is_refused(tmp_path: Path) -> None:
    residuals(tmp_path, after_rounds(2)).save(5, PARAMETERS)
    path = residual_file(tmp_path, 5, 1)
    for size in (0, 5, 200, path.stat().st_size - 1):
        path.write_bytes(path.read_bytes()[:size])
        with pytest.raises(CheckpointError, match="expected a whole residual"):
            residuals(tmp_path, ErrorFeedback(LAYOUT.d)).begin(5, PARAMETERS, anew=True)


def test_a_file_of_another_round_worker_vector_or_run_is_refused(tmp_path: Path) -> None:
    residuals(tmp_path, after_rounds(2)).save(5, PARAMETERS)
    content = residual_file(tmp_path, 5, 1).read_bytes()
    for round_, worker, rule in ((6, 1, "round=6"), (5, 0, "worker_index=0")):
        path = residual_file(tmp_path, round_, worker)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=f"expected {rule}, got"):
            residuals(tmp_path, ErrorFeedback(LAYOUT.d), worker).begin(round_, PARAMETERS, anew=True)
    swapped = layout_of(tensors=(TENSORS[1], TENSORS[0], *TENSORS[2:]))
    assert swapped.d == LAYOUT.d
    with pytest.raises(CheckpointError, match="expected vector_sha256="):
        residuals(tmp_path, ErrorFeedback(LAYOUT.d), layout=swapped).begin(5, PARAMETERS, anew=True)
    with pytest.raises(
        CheckpointError, match=f"expected parameter_digest={'71' * 16}, got parameter_digest={'70' * 16}"
    ):
        residuals(tmp_path, ErrorFeedback(LAYOUT.d)).begin(5, b"q" * 16, anew=True)


def test_buckets_and_servers_may_change(tmp_path: Path) -> None:
    saved, loaded = after_rounds(2), ErrorFeedback(LAYOUT.d)
    residuals(tmp_path, saved).save(5, PARAMETERS)
    other = layout_of("servers=2", "exchange.bucket_bytes=1024")
    assert other.digest() != LAYOUT.digest()
    residuals(tmp_path, loaded, layout=other).begin(5, PARAMETERS, anew=True)
    assert np.array_equal(loaded.residual, saved.residual)


def test_saving_sweeps_what_an_interrupted_save_has_left_and_says_why_it_cannot(tmp_path: Path) -> None:
    for name in ("round-000003/.residual-1.abc", "round-000005/.residual-1.def", "round-000005/.residual-10.abc"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("half")
    residuals(tmp_path, after_rounds(1)).save(5, PARAMETERS)
    assert files(tmp_path) == ["round-000005/.residual-10.abc", "round-000005/residual-1.safetensors"]
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="expected a folder with room to write"):
        residuals(tmp_path / "file", after_rounds(1)).save(5, PARAMETERS)


def test_the_newest_whole_checkpoint_has_the_residuals_of_all_workers(tmp_path: Path) -> None:
    checkpoints, folder = tmp_path / "checkpoints", tmp_path / "residuals"
    assert newest_whole(folder, checkpoints, 2) is None
    for round_ in (5, 10, 15):
        (checkpoints / f"round-{round_:06d}").mkdir(parents=True)
        for worker in range(2 if round_ < 15 else 1):
            residuals(folder, after_rounds(1), worker, keep=5).save(round_, PARAMETERS)
    assert newest_whole(folder, checkpoints, 2) == checkpoints / "round-000010"
    assert newest_whole(folder, checkpoints, 1) == checkpoints / "round-000015"
    assert newest_whole(folder, checkpoints, 3) is None
