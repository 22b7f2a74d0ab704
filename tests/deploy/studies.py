"""Stands for `datps` in tests of `datps study`: commands are recorded, not run, and leave what they would leave."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from common.config import JobSpec
from common.spec_sources import load_job_spec
from deploy import runs
from deploy.recipes import recipe
from deploy.studies.run import Places, Study
from deploy.train import with_local_files
from worker.certificates import COLUMNS, CertifiedSample
from worker.certification import Certificate
from worker.checkpoint import save_checkpoint
from worker.data import Unlabeled
from worker.judging.requests import parse_attack
from worker.local_files import refuse_unfit_unlabeled
from worker.pseudo_labels import PseudoLabels, load_pseudo_labels, save_pseudo_labels

TWO_ROWS = """
title: Two codecs
recipe: digits-dat-fgsm
settings: {schedule.epochs: 2, schedule.decay_at: [1/2, 3/4]}
seeds: [0, 1]
rows:
  - {name: 32 bits, settings: {codec.name: none}}
  - {name: 4 bits, settings: {codec.bits: 4}}
checks:
  - {row: 4 bits, of: robust_accuracy, at_least: 32 bits, within: spread}
  - {row: 4 bits, of: clean_accuracy, at_least: 32 bits, gap: 1}
"""
ROBUST = {"32-bits/seed-0": 0.70, "32-bits/seed-1": 0.74, "4-bits/seed-0": 0.69, "4-bits/seed-1": 0.72}
TEACHING = (
    TWO_ROWS.replace("schedule.epochs: 2,", "schedule.epochs: 2, data.labeled: 60,")
    .replace("codec.bits: 4}}", "codec.bits: 4, data.unlabeled_fraction: 0.5}, unlabeled: 32 bits}")
    .replace("seeds: [0, 1]", "seeds: [0]")
)
"""The second row learns from images that the first one has labeled."""


class Machine:
    """Does what `datps` does, as far as a study sees it; accuracies are given by run folder."""

    def __init__(
        self, robust: dict[str, float], fail_at: str = "", status: int = 75, version: str = "", words: str = ""
    ) -> None:
        """`fail_at`: trainings whose folder has this in its name end with `status`, saying `words`.

        `version`: other parameters come out of each training.
        """
        self.robust = robust
        self.words = words or "error: expected a better day, got day=monday"
        self.fail_at = fail_at
        self.status = status
        self.version = version
        self.commands: list[list[str]] = []

    def __call__(self, command: Sequence[str], log: Path) -> int:
        arguments = list(command[3:])
        self.commands.append(arguments)
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text(f"epoch 1\n{self.words}\n")
        flags = {a: b for a, b in pairwise(arguments) if a.startswith("--")}
        match arguments[0]:
            case "train":
                return self._train(arguments, flags)
            case "pseudo-label":
                self._label(Path(arguments[1]), Path(flags["--out"]))
            case "evaluate":
                self._evaluate(Path(arguments[1]), arguments, flags)
            case "certify":
                self._certify(Path(arguments[1]), flags)
        return 0

    @property
    def verbs(self) -> list[str]:
        """What has been done, `train 4-bits/seed-0`."""
        return [f"{each[0]} {_key(_folder(each))}" for each in self.commands]

    def _train(self, arguments: Sequence[str], flags: dict[str, str]) -> int:
        folder = _folder(arguments)
        key = _key(folder)
        folder.mkdir(parents=True, exist_ok=True)
        unlabeled = Path(flags["--unlabeled"]) if "--unlabeled" in flags else None
        if "--recipe" in flags:
            settings = [b for a, b in pairwise(arguments) if a == "--set"]
            settings += ["transfer.init=true"] * ("--init" in flags)
            spec = load_job_spec(yaml_text=recipe(flags["--recipe"]).text, yaml_name="recipe", settings=settings)
            init = Path(flags["--init"]) if "--init" in flags else None
            spec = with_local_files(spec, unlabeled=unlabeled, init=init)
            runs.write_job(folder, spec, "title")
        spec, _ = runs.read_job(folder)
        refuse_unfit_unlabeled(spec.data, unlabeled)
        digest = f"{self.version}{key}"
        content = load_pseudo_labels(unlabeled) if unlabeled else None
        labels = str(Unlabeled(samples=len(content.labels), digest=content.digest())) if content else ""
        tensors = {"x": torch.full((1,), float(len(digest)))}
        save_checkpoint(folder / "checkpoints", tensors, described(spec, digest, labels), keep=1)
        if self.fail_at and self.fail_at in key:
            return self.status
        result = {
            "clean_accuracy": 0.9,
            "robust_accuracy": self.robust[key],
            "validation_robust_accuracy": self.robust[key] / 2,
            "rounds": 7,
            "parameter_digest": digest,
        }
        (folder / "result.json").write_text(json.dumps(result))
        return 0

    def _label(self, teacher: Path, out: Path) -> None:
        digest = _result(teacher)["parameter_digest"]
        images = torch.full((2, 1, 8, 8), len(digest), dtype=torch.uint8)
        content = PseudoLabels(images=images, labels=torch.tensor([0, 1]), made_by={"parameter_digest": digest})
        save_pseudo_labels(out, content)

    def _evaluate(self, folder: Path, arguments: Sequence[str], flags: dict[str, str]) -> None:
        out = Path(flags["--out"])
        out.mkdir(exist_ok=True)
        labels = [parse_attack(b).label for a, b in pairwise(arguments) if a == "--attack"]
        content = {
            "samples": int(flags.get("--limit", 360)),
            "test_samples": 360,
            "parameter_digest": _result(folder)["parameter_digest"],
            "attacks": [{"attack": label, "robust_accuracy": len(label) / 100} for label in labels],
        }
        (out / "evaluation.json").write_text(json.dumps(content))

    def _certify(self, folder: Path, flags: dict[str, str]) -> None:
        parameters: dict[str, Any] = {name: int(flags[f"--{name}"]) for name in ("n0", "n", "every")}
        parameters |= {"noise_std": float(flags["--noise-std"]), "alpha": float(flags["--alpha"]), "samples": 360}
        parameters["seed"] = runs.read_job(folder)[0].seed
        found = Certificate(predicted=3, radius=parameters["n"] / 10_000, votes=parameters["n"])
        every = range(0, 360, parameters["every"])[: int(flags.get("--limit", 360))]
        rows = [CertifiedSample(index=index, label=3, certificate=found, seconds=0.0).line() for index in every]
        head = [f"# datps certify {json.dumps(parameters)}", "\t".join(COLUMNS)]
        Path(flags["--out"]).write_text("".join(f"{line}\n" for line in [*head, *rows]))


def described(spec: JobSpec, digest: str, unlabeled: str) -> dict[str, Any]:
    """What a checkpoint says of itself."""
    return {
        "round": 7,
        "rounds": 7,
        "classes": 10,
        "in_channels": 1,
        "image_size": 8,
        "mean": [0.3],
        "std": [0.4],
        "spec": spec.model_dump(mode="json"),
        "data": "digits",
        "unlabeled": unlabeled,
        "parameter_digest": digest,
    }


def study(text: str, folder: Path, machine: Machine) -> Study:
    """The study in a folder, its commands carried out by `machine`."""
    return Study(text, "two.yaml", Places(folder=folder, device="cpu"), run_command=machine)


def _folder(arguments: Sequence[str]) -> Path:
    flags = {a: b for a, b in pairwise(arguments) if a.startswith("--")}
    return Path(flags.get("--resume") or flags["--out"]) if arguments[0] == "train" else Path(arguments[1])


def _key(folder: Path) -> str:
    return "/".join(folder.parts[-2:]) if "tune-" not in str(folder) else "/".join(folder.parts[-3:])


def _result(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return content
