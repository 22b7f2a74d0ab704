"""`worker.daemon.run` in threads: what a user's mistake does, and that the others go on without harm."""

from __future__ import annotations

import io
import json
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from common.config import ModelName, ModelSpec
from common.errors import CheckpointError, SpecError
from common.events import Emitter
from tests.support import DEADLINE_S, job, running_server
from worker.checkpoint import find_checkpoint, load_checkpoint
from worker.daemon import WorkerOptions, run
from worker.judging.evaluation import evaluate_model
from worker.models import build_model
from worker.replica import load_model

TRAINING_S = 60.0
FAST = ("attack.epsilon=0.2", "attack.steps=1", "attack.step_size=0.1", "evaluation.attack.steps=1")


def work(address: str, worker_id: str = "worker-0", **options: Any) -> tuple[int, list[dict[str, Any]]]:
    """One worker; returns its exit code and events."""
    log = io.StringIO()
    code = run(WorkerOptions(server=address, worker_id=worker_id, **options), Emitter(worker_id, stream=log))
    return code, [json.loads(line) for line in log.getvalue().splitlines()]


def error_of(events: list[dict[str, Any]]) -> str:
    return "\n".join(event["text"] for event in events if event["event"] == "error")


def image_folder(root: Path, images: int = 12) -> Path:
    """Two classes of random 16x16 images, the same ones each time."""
    random = np.random.default_rng(3)
    for part in ("train", "test"):
        for name in ("cat", "dog"):
            folder = root / part / name
            folder.mkdir(parents=True)
            for number in range(images):
                pixels = random.integers(0, 256, (16, 16, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number:04d}.png")
    return root


FOLDER = ("data.name=imagefolder", "data.batch_per_worker=4", "schedule.epochs=1", *FAST)


def test_two_workers_with_folders_of_their_own_train_together(tmp_path: Path) -> None:
    spec = job("workers=2", "data.split=own", "model.name=resnet8", "model.width=4", *FOLDER)
    roots = [image_folder(tmp_path / "a"), image_folder(tmp_path / "b", images=20)]
    out = tmp_path / "run"
    with running_server(spec) as server, ThreadPoolExecutor(2) as pool:
        done = [
            pool.submit(work, server.address, f"worker-{n}", data=roots[n], out=out if n == 0 else None)
            for n in range(2)
        ]
        assert [future.result(TRAINING_S)[0] for future in done] == [0, 0]
        assert server.outcome.result(DEADLINE_S).exit_code == 0
    result = json.loads((out / "result.json").read_text())
    assert result["rounds"] == (24 + 40) // 8
    assert result["samples"] == 24
    report = evaluate_model(str(out), data=roots[0])
    assert report["clean_accuracy"] == result["clean_accuracy"]
    assert report["robust_accuracy"] == result["robust_accuracy"]


def unreadable(root: Path) -> Path:
    (root / "train" / "dog" / "0003.png").write_bytes(b"no image")
    return root


@pytest.mark.parametrize(
    ("prepare", "text"),
    [
        (lambda root: root / "nowhere", "nowhere"),
        (lambda root: unreadable(image_folder(root)), "0003.png"),
        (lambda _: None, "data folder"),
    ],
    ids=["missing folder", "unreadable image", "no folder given"],
)
def test_bad_data_ends_its_own_worker_with_2_and_frees_its_place(tmp_path: Path, prepare: Any, text: str) -> None:
    spec = job("workers=1", "model.name=resnet8", "model.width=4", *FOLDER)
    bad, good = prepare(tmp_path / "bad"), image_folder(tmp_path / "good")
    with running_server(spec) as server:
        code, events = work(server.address, data=bad)
        assert code == 2
        assert text in error_of(events)
        assert "expected " in error_of(events)
        assert ", got " in error_of(events)
        assert work(server.address, data=good)[0] == 0
        assert server.outcome.result(DEADLINE_S).exit_code == 0


def test_another_job_and_a_device_that_is_not_there_are_refused() -> None:
    spec = job("workers=1")
    with running_server(spec) as server:
        code, events = work(server.address, job_id="other")
        assert (code, "expected job_id=datps, got job_id=other" in error_of(events)) == (76, True)
        code, events = work(server.address, device="cuda:99")
        assert (code, "got device=cuda:99" in error_of(events)) == (2, True)


def test_a_server_that_never_comes_up_ends_the_worker_with_75() -> None:
    code, events = work("127.0.0.1:1", connect_s=0.3)
    assert code == 75
    assert error_of(events) == "expected a server that answers within 0.3 s, got server=127.0.0.1:1"


def train_alone(
    out: Path | None = None, resume: Path | None = None, *settings: str
) -> tuple[int, list[dict[str, Any]]]:
    spec = job("workers=1", "schedule.epochs=1", "data.batch_per_worker=128", *FAST, *settings)
    with running_server(spec) as server:
        return work(server.address, out=out, resume=resume)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a short training with a checkpoint."""
    out = tmp_path_factory.mktemp("runs") / "short"
    assert train_alone(out)[0] == 0
    return out


def copy_of(run_folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(run_folder, to))


def test_a_run_folder_holds_what_it_promises(trained: Path) -> None:
    result = json.loads((trained / "result.json").read_text())
    promised = {"clean_accuracy", "robust_accuracy", "rounds", "workers", "servers", "parameters", "seconds"}
    promised |= {"pushed_bytes_per_round", "pulled_bytes_per_round", "communication_seconds", "parameter_digest"}
    assert promised <= set(result)
    assert {"python", "torch", "numpy", "grpcio", "protobuf", "datps"} <= set(result["versions"])
    lines = [json.loads(line) for line in (trained / "rounds.jsonl").read_text().splitlines()]
    assert [line["round"] for line in lines] == list(range(1, 12))
    assert result["pushed_bytes_per_round"] == pytest.approx(sum(line["pushed_bytes"] for line in lines) / 11)


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (lambda folder: cut(folder / "state.safetensors"), "damaged"),
        (lambda folder: cut(folder / "state.json"), "expected a whole checkpoint"),
        (lambda folder: (folder / "state.safetensors").unlink(), "expected a whole checkpoint"),
        (lambda folder: flip(folder / "state.safetensors"), "damaged"),
    ],
    ids=["tensors cut in half", "description cut in half", "tensors missing", "one bit flipped"],
)
def test_a_damaged_checkpoint_is_refused_with_65(trained: Path, tmp_path: Path, damage: Any, text: str) -> None:
    folder = copy_of(trained, tmp_path / "run")
    damage(folder / "checkpoints" / "round-000011")
    code, events = train_alone(None, folder)
    assert code == 65
    assert text in error_of(events)


def cut(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-100] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    "setting", ["model.width=8", "optimizer.name=sgd", "seed=3", "schedule.epochs=9", "codec.bits=4"]
)
def test_a_checkpoint_of_another_job_is_refused_with_65(trained: Path, setting: str) -> None:
    code, events = train_alone(None, trained, setting)
    assert (code, f"got {setting} (a resumed run keeps its job)" in error_of(events)) == (65, True)


def test_what_does_not_touch_the_parameters_may_differ_on_resume(trained: Path) -> None:
    assert train_alone(None, trained, "exchange.bucket_bytes=4096", "evaluation.attack.steps=3")[0] == 0


def test_tensors_of_another_model_are_refused_naming_the_first_that_differs(trained: Path) -> None:
    tensors = load_checkpoint(find_checkpoint(trained)).tensors
    settings = {"in_channels": 1, "image_size": 8, "classes": 10, "mean": (0.5,), "std": (0.5,), "seed": 0}
    with pytest.raises(CheckpointError, match=r"of shape \(8,\), got shape=\(32,\) \(checkpoint of another model\)"):
        load_model(build_model(ModelSpec(width=8), **settings), tensors)
    with pytest.raises(CheckpointError, match=r"expected no tensor 1\.0\.bias, got shape="):
        load_model(build_model(ModelSpec(name=ModelName.RESNET8), **settings), tensors)


def test_a_checkpoint_is_not_evaluated_on_data_or_with_a_model_that_it_was_not_made_for(
    trained: Path, tmp_path: Path
) -> None:
    def evaluated(*settings: str, data: Path | None = None) -> None:
        evaluate_model(str(trained), settings=settings, data=data)

    with pytest.raises(SpecError, match=r"1x8x8 pixels, 10 classes.*got data=3x16x16 pixels, 2 classes"):
        evaluated("data.name=imagefolder", data=image_folder(tmp_path))
    with pytest.raises(SpecError, match=r"expected model\.width=None as in the checkpoint, got model\.width=3"):
        evaluated("model.width=3")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"server": "nowhere"}, "expected host:port, got server='nowhere'"),
        ({"server": "a:b"}, "expected host:port, got server='a:b'"),
        ({"server": "a:1", "worker_id": "a b"}, "got worker_id='a b'"),
    ],
)
def test_a_worker_with_a_bad_address_or_name_is_refused_before_it_connects(options: dict[str, str], text: str) -> None:
    with pytest.raises(SpecError) as error:
        WorkerOptions(**{"worker_id": "worker-0", **options})
    assert text in str(error.value)


def test_a_folder_that_holds_a_run_is_not_overwritten(trained: Path) -> None:
    before = (trained / "rounds.jsonl").read_text()
    code, events = train_alone(trained)
    assert (code, "expected a folder without rounds of another run" in error_of(events)) == (2, True)
    assert (trained / "rounds.jsonl").read_text() == before


def test_the_same_command_succeeds_after_peers_that_did_not_come(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with running_server(job("workers=2", "deadlines.join_s=0.5", *FAST)) as server:
        assert work(server.address, out=out)[0] == 75
    assert train_alone(out)[0] == 0
    assert (out / "result.json").exists()


def test_a_run_that_died_before_its_first_checkpoint_starts_anew_with_resume(tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert train_alone(out)[0] == 0
    shutil.rmtree(out / "checkpoints")
    assert train_alone(out)[0] == 2
    assert train_alone(out, out)[0] == 0
    assert len((out / "rounds.jsonl").read_text().splitlines()) == 11


def test_a_resume_from_an_older_checkpoint_abandons_the_later_ones(tmp_path: Path) -> None:
    out = tmp_path / "run"
    settings = ("schedule.epochs=3", "checkpoint.every_epochs=1", "checkpoint.keep=5", "evaluation.every_epochs=1")
    assert train_alone(out, None, *settings)[0] == 0
    evaluations = (out / "evaluations.jsonl").read_text()
    assert [json.loads(line)["epoch"] for line in evaluations.splitlines()] == [1.0, 2.0]
    before = json.loads((out / "result.json").read_text())["parameter_digest"]
    checkpoints = out / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["round-000011", "round-000022", "round-000033"]
    (checkpoints / "round-000022" / "marker").touch()
    code, _ = train_alone(out, checkpoints / "round-000011", *settings)
    assert code == 0
    assert json.loads((out / "result.json").read_text())["parameter_digest"] == before
    assert not (checkpoints / "round-000022" / "marker").exists()
    assert [json.loads(line)["round"] for line in (out / "rounds.jsonl").read_text().splitlines()] == [*range(1, 34)]
    assert (out / "evaluations.jsonl").read_text() == evaluations


def test_a_folder_that_cannot_be_written_ends_the_worker_with_75_and_tells_the_others_why(tmp_path: Path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    (out / "checkpoints").write_text("in the way")
    spec = job("workers=2", "schedule.epochs=1", "data.batch_per_worker=128", *FAST)
    with running_server(spec) as server, ThreadPoolExecutor(2) as pool:
        failing = pool.submit(work, server.address, "worker-0", out=out, trace=tmp_path / "trace.json")
        done = [failing, pool.submit(work, server.address, "worker-1")]
        (own, own_events), (other, other_events) = [future.result(TRAINING_S) for future in done]
        outcome = server.outcome.result(DEADLINE_S)
    assert (own, "expected a folder with room to write" in error_of(own_events)) == (75, True)
    assert outcome.exit_code in (0, 75)
    if other == 75:
        assert "worker-0 failed: expected a folder with room to write" in error_of(other_events)
    traced = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert {"encode", "push", "decode"} <= {event["name"] for event in traced}  # also of a worker that failed


def test_a_resume_where_there_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    code, events = train_alone(None, tmp_path)
    assert (code, "none found" in error_of(events)) == (2, True)


def test_a_worker_with_a_name_that_is_live_is_refused_and_the_first_goes_on() -> None:
    spec = job("workers=2", "schedule.epochs=1", "data.batch_per_worker=128", *FAST)
    with running_server(spec) as server, ThreadPoolExecutor(3) as pool:
        first: Future[Any] = pool.submit(work, server.address, "worker-0")
        joined(server)
        code, events = work(server.address, "worker-0")
        assert (code, "a worker_id that is not live, got worker_id=worker-0" in error_of(events)) == (75, True)
        assert work(server.address, "worker-1")[0] == 0
        assert first.result(TRAINING_S)[0] == 0


def joined(server: Any) -> None:
    """Waits until the server has told that a worker joined."""
    import threading

    seen = threading.Event()

    def look() -> None:
        if any(event["event"] == "joined" for event in server.events):
            seen.set()
        else:
            server.loop.call_later(0.01, look)

    server.call(look)
    assert seen.wait(DEADLINE_S)
