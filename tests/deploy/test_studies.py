"""`datps study`: what is planned, what is run and run again, what the table says. Commands are recorded, not run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from common.codecs.checks import FINITE_VALUE
from common.config import CodecName
from common.errors import DatpsError, SpecError, refusal
from deploy.studies.plan import job_of, read_study, runs_of
from deploy.studies.run import CommandError, document_of, execute
from tests.deploy.studies import ROBUST, TEACHING, TWO_ROWS, Machine, study


def test_runs_are_rows_times_seeds_and_each_has_its_job() -> None:
    planned = list(runs_of(read_study(TWO_ROWS, "two.yaml")))
    jobs = [job_of(run) for run in planned]
    assert [(run.folder, job.seed, job.codec.name, job.codec.bits) for run, job in zip(planned, jobs, strict=True)] == [
        ("32-bits/seed-0", 0, CodecName.NONE, 8),
        ("32-bits/seed-1", 1, CodecName.NONE, 8),
        ("4-bits/seed-0", 0, CodecName.RANDOMIZED, 4),
        ("4-bits/seed-1", 1, CodecName.RANDOMIZED, 4),
    ]
    assert {(job.schedule.epochs, job.schedule.decay_at) for job in jobs} == {(2, (0.5, 0.75))}


def test_a_grid_multiplies_the_rows() -> None:
    text = TWO_ROWS.replace("rows:", "grid: {workers: [1, 2], data.batch_per_worker: [16]}\nrows:").split("checks")[0]
    planned = list(runs_of(read_study(text, "two.yaml")))
    assert len(planned) == 2 * 2 * 2
    assert planned[2].row == "32 bits, workers 2, batch_per_worker 16"
    assert (job_of(planned[2]).workers, job_of(planned[2]).data.batch_per_worker) == (2, 16)


def test_the_table_has_means_spreads_and_verdicts(tmp_path: Path) -> None:
    carried_out = study(TWO_ROWS, tmp_path / "out", Machine(ROBUST))
    lines, verdicts = carried_out.run()
    table = document_of(carried_out.spec, lines, verdicts)
    assert "| 32 bits | 90.0 | 72.0 (70.0 to 74.0) |" in table
    assert "| 4 bits | 90.0 | 70.5 (69.0 to 72.0) |" in table
    assert [verdict.holds for verdict in verdicts] == [True, False]
    assert verdicts[0].found == pytest.approx(0.705)
    assert verdicts[0].least == 0.70
    assert "70.50 %, at least 70.00 % expected: holds" in table
    assert "90.00 %, at least 91.00 % expected: DOES NOT HOLD" in table
    assert (tmp_path / "out/table.md").read_text() == table
    assert len(json.loads((tmp_path / "out/study.json").read_text())["lines"]) == 2


def test_what_is_done_is_not_done_again_and_what_was_begun_goes_on(tmp_path: Path) -> None:
    stopped = Machine(ROBUST, fail_at="4-bits/seed-0")
    with pytest.raises(DatpsError, match="datps train ended with 75; error: expected a better day"):
        study(TWO_ROWS, tmp_path, stopped).run()
    machine = Machine(ROBUST)
    study(TWO_ROWS, tmp_path, machine).run()
    assert [command[:3] for command in machine.commands] == [
        ["train", "--resume", str(tmp_path / "4-bits/seed-0")],
        ["train", "--recipe", "digits-dat-fgsm"],
    ]
    study(TWO_ROWS, tmp_path, machine).run()
    assert len(machine.commands) == 2


def test_a_run_of_another_job_is_not_taken_for_this_one(tmp_path: Path) -> None:
    study(TWO_ROWS, tmp_path, Machine(ROBUST)).run()
    changed = TWO_ROWS.replace("codec.bits: 4", "codec.bits: 2")
    with pytest.raises(SpecError, match=r"expected codec.bits=2 as the study says \(or remove the folder\), got"):
        study(changed, tmp_path, Machine(ROBUST)).run()


def test_a_folder_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("chapter one")
    with pytest.raises(SpecError, match=r"it holds thesis\.tex"):
        study(TWO_ROWS, tmp_path, Machine(ROBUST))
    assert (tmp_path / "thesis.tex").read_text() == "chapter one"


def test_tuning_takes_what_is_best_on_the_validation_split_and_uses_it_for_all_seeds(tmp_path: Path) -> None:
    text = TWO_ROWS.replace(
        "settings: {codec.bits: 4}}",
        "settings: {codec.bits: 4, data.validation: 0.1}, tune: {optimizer.learning_rate: [0.01, 0.04]}}",
    )
    figures = {"0.01": (0.7, 0.5, 0.5), "0.04": (0.6, 0.6, 0.6)}  # the first seed alone would take the other one
    tuned = {
        f"4-bits/tune-learning_rate-{rate}/seed-{1000 + number}": robust
        for rate, by_seed in figures.items()
        for number, robust in enumerate(by_seed)
    }
    machine = Machine(ROBUST | tuned)
    lines, _ = study(text, tmp_path, machine).run()
    assert (lines[1].tuned, lines[1].chosen) == (2, {"optimizer.learning_rate": 0.04})
    final = [command for command in machine.commands if str(tmp_path / "4-bits/seed-1") in command]
    assert "optimizer.learning_rate=0.04" in final[0]
    assert "2 tried; optimizer.learning_rate=0.04" in (tmp_path / "table.md").read_text()


TUNED = TWO_ROWS.replace(
    "settings: {codec.bits: 4}}",
    "settings: {codec.bits: 4, data.validation: 0.1}, tune: {optimizer.learning_rate: [0.04, 9.0]}}",
)
ROBUST_WHEN_TUNED = ROBUST | {f"4-bits/tune-learning_rate-0.04/seed-{seed}": 0.1 for seed in (1000, 1001, 1002)}
DIVERGENCE = f"error: worker-1 failed with exit code 76: {refusal(FINITE_VALUE, 'element 0', 'nan', 'gradient')}"


def test_a_training_that_diverges_while_it_tunes_is_the_worst_and_is_not_tried_again(tmp_path: Path) -> None:
    machine = Machine(ROBUST_WHEN_TUNED, fail_at="learning_rate-9.0", status=76, words=DIVERGENCE)
    lines, _ = study(TUNED, tmp_path, machine).run()
    assert (lines[1].tuned, lines[1].diverged, lines[1].chosen) == (2, 1, {"optimizer.learning_rate": 0.04})
    assert "2 tried, 1 diverged; optimizer.learning_rate=0.04" in (tmp_path / "table.md").read_text()
    diverged = tmp_path / "4-bits/tune-learning_rate-9.0/seed-1000/diverged.txt"
    assert "element 0=nan" in diverged.read_text()
    again = Machine(ROBUST_WHEN_TUNED)
    study(TUNED, tmp_path, again).run()
    assert again.verbs == []


@pytest.mark.parametrize(
    ("fail_at", "status", "words"),
    [
        ("learning_rate-9.0", 76, "error: expected layout_digest=aa as on worker-0, got layout_digest=bb"),
        ("learning_rate-9.0", 75, DIVERGENCE),
        ("32-bits/seed-1", 76, DIVERGENCE),
    ],
    ids=["another mismatch", "another code", "a run of the table"],
)
def test_no_other_failure_passes_for_a_divergence(tmp_path: Path, fail_at: str, status: int, words: str) -> None:
    with pytest.raises(CommandError, match=r"datps train ended with 7[56]"):
        study(TUNED, tmp_path, Machine(ROBUST_WHEN_TUNED, fail_at=fail_at, status=status, words=words)).run()


def test_a_row_all_of_whose_trainings_diverge_is_told(tmp_path: Path) -> None:
    machine = Machine(ROBUST_WHEN_TUNED, fail_at="/tune-", status=76, words=DIVERGENCE)
    with pytest.raises(SpecError, match="with which no training diverges"):
        study(TUNED, tmp_path, machine).run()


def test_rows_start_from_models_that_earlier_rows_have_trained(tmp_path: Path) -> None:
    text = TEACHING.replace("unlabeled: 32 bits", "init: 32 bits, unlabeled: 32 bits").replace("[0]", "[0, 1]")
    machine = Machine(ROBUST)
    study(text, tmp_path, machine).run()
    labels = str(tmp_path / "32-bits/seed-1-pseudo-labels.safetensors")
    labelling, training = machine.commands[-2:]
    assert labelling[:5] == ["pseudo-label", str(tmp_path / "32-bits/seed-1"), "held-back", "--out", labels]
    assert training[training.index("--init") + 1] == str(tmp_path / "32-bits/seed-1")
    assert training[training.index("--unlabeled") + 1] == labels


def test_two_processes_never_work_in_one_folder(tmp_path: Path) -> None:
    class Nested(Machine):
        """Starts the same study again while its command runs."""

        def __call__(self, command: Sequence[str], log: Path) -> int:
            with pytest.raises(SpecError, match="expected a folder that no other `datps study` is at work in"):
                study(TWO_ROWS, tmp_path, Machine(ROBUST)).run()
            return super().__call__(command, log)

    machine = Nested(ROBUST)
    study(TWO_ROWS, tmp_path, machine).run()
    assert len(machine.commands) == 4
    assert (tmp_path / "study.yaml").read_text() == TWO_ROWS


def test_ctrl_c_lets_the_command_end_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = """if True:
        import signal, sys
        signal.signal(signal.SIGTERM, lambda *_: print("saved") or sys.exit(1))
        print("ready", flush=True)
        signal.pause()"""
    log, wait = tmp_path / "log", subprocess.Popen.wait
    calls = []

    def interrupted(process: subprocess.Popen[bytes], timeout: float | None = None) -> int:
        calls.append(process)
        if len(calls) > 1:
            return wait(process, timeout)
        while not log.read_text().endswith("ready\n"):
            os.sched_yield()
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess.Popen, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        execute([sys.executable, "-c", code], log)
    assert log.read_text().endswith("ready\nsaved\n")


def test_tuning_takes_models_of_the_seeds_in_turn() -> None:
    more = (
        "settings: {codec.bits: 4, data.validation: 0.1}, init: 32 bits, tune: {optimizer.learning_rate: [0.01, 0.04]}"
    )
    planned = list(runs_of(read_study(TWO_ROWS.replace("settings: {codec.bits: 4}", more), "two.yaml")))
    assert [(run.seed, run.init) for run in planned[2:]] == [
        *((1000, "32-bits/seed-0"), (1001, "32-bits/seed-1"), (1002, "32-bits/seed-0")),
        *((1000, "32-bits/seed-0"), (1001, "32-bits/seed-1"), (1002, "32-bits/seed-0")),
        *((0, "32-bits/seed-0"), (1, "32-bits/seed-1")),
    ]


def test_every_study_in_the_repository_can_be_planned() -> None:
    folder = Path(__file__).parent.parent.parent / "bench" / "studies"
    documents = sorted(folder.glob("*.yaml"))
    assert documents
    for document in documents:
        assert list(runs_of(read_study(document.read_text(), document.name))), document.name
