"""Whether what we say of a trained model is what others say of it, on the same test images.

    python -m bench.agreement RUN ... [--data FOLDER] [--starts N] [--autoattack-images N]

Robust accuracy under PGD-20 as `datps evaluate` finds it, beside that of foolbox's attack with the same radius, steps
and step size, both the mean over random starts; and on some of the images beside AutoAttack. Of a smoothed model, the
certified accuracy as `datps certify` finds it beside that of a direct computation (other noise, another function for
the confidence bound), both the mean over seeds of the noise. Needs the extras `test` and `eval`.
"""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from rich.console import Console
from scipy import stats
from torch import Tensor

from common.errors import SpecError, refusal
from common.inner_spec import AttackNorm
from deploy.options import DataOption, errors
from deploy.report.paper import RADII
from worker.certificates import certify_samples, summarize
from worker.certification import CertificationSettings
from worker.judging.autoattack import LEAST_CLASSES
from worker.judging.evaluation import choose, evaluate_model
from worker.trained import TrainedModel, open_model

STEPS = 20
WITHIN_POINTS = 1.0
"""By how much foolbox's robust accuracy may differ, and a certified accuracy from that of the direct computation."""
N0, N, ALPHA = 100, 1000, 0.001
NOISES = 3
"""Seeds of the noise whose mean is compared."""


@dataclass(frozen=True, kw_only=True)
class Attacked:
    """One model under attack; accuracies are fractions."""

    name: str
    samples: int
    clean: float
    ours: float
    foolbox: float
    fewer: tuple[int, float, float] | None
    """How many images AutoAttack was run on, and the accuracy on them under ours and under AutoAttack; None where the
    data have too few classes for the suite."""

    @property
    def holds(self) -> bool:
        near = abs(self.ours - self.foolbox) <= WITHIN_POINTS / 100
        return near and (self.fewer is None or self.fewer[2] <= self.fewer[1])

    def row(self) -> str:
        """Of the Markdown table."""
        cells = [self.name, str(self.samples), *(f"{100 * each:.1f}" for each in (self.clean, self.ours, self.foolbox))]
        few = ["", "", ""]
        if self.fewer is not None:
            count, ours, autoattack = self.fewer
            few = [str(count), f"{100 * ours:.1f}", f"{100 * autoattack:.1f}"]
        return _line([*cells, *few, "yes" if self.holds else "NO"])


@dataclass(frozen=True, kw_only=True)
class Certified:
    """One smoothed model; accuracies are fractions, one for each of `RADII`."""

    name: str
    samples: int
    ours: Sequence[float]
    direct: Sequence[float]

    @property
    def holds(self) -> bool:
        return all(abs(a - b) <= WITHIN_POINTS / 100 for a, b in zip(self.ours, self.direct, strict=True))

    def row(self) -> str:
        """Of the Markdown table."""
        pairs = [f"{100 * a:.1f} / {100 * b:.1f}" for a, b in zip(self.ours, self.direct, strict=True)]
        return _line([self.name, str(self.samples), *pairs, "yes" if self.holds else "NO"])


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How much is compared.

    Attributes:
        starts: random starts whose mean is compared: one alone moves the accuracy on 360 images by a point.
        for_autoattack: test images under AutoAttack; all where None.
        threads: of torch.
        data: data folder, if the data set needs one.
    """

    starts: int
    for_autoattack: int | None
    threads: int
    data: Path | None = None


def attacked(name: str, opened: TrainedModel, effort: Effort) -> Attacked:
    """All accuracies under attack.

    Raises:
        SpecError: the model was not trained for a ball in the l-infinity norm.
    """
    attack = opened.spec.evaluation_attack
    if attack.norm is not AttackNorm.LINF:
        raise SpecError(refusal("models of attack.norm=linf", "attack.norm", attack.norm, name))
    epsilon = attack.epsilon
    ours, test = f"pgd:{STEPS}", opened.dataset.test
    evaluate = partial(evaluate_model, opened.name, threads=effort.threads, data=effort.data)
    results = [evaluate(attacks=[ours], settings=[f"seed={seed}"]) for seed in range(effort.starts)]
    fewer: tuple[int, float, float] | None = None
    if len(opened.dataset.classes) >= LEAST_CLASSES:
        some = evaluate(attacks=[ours, "autoattack"], limit=effort.for_autoattack)
        weaker, stronger = (float(each["robust_accuracy"]) for each in some["attacks"])
        fewer = (int(some["samples"]), weaker, stronger)
    indices = torch.arange(len(test.labels))
    return Attacked(
        name=name,
        samples=len(indices),
        clean=float(results[0]["clean_accuracy"]),
        ours=statistics.mean(float(result["robust_accuracy"]) for result in results),
        foolbox=statistics.mean(
            foolbox_accuracy(opened, test.images(indices), test.labels[indices], epsilon, seed)
            for seed in range(effort.starts)
        ),
        fewer=fewer,
    )


def foolbox_accuracy(opened: TrainedModel, images: Tensor, labels: Tensor, epsilon: float, seed: int) -> float:
    """Robust accuracy under foolbox's PGD from a random start, with our default step size."""
    with warnings.catch_warnings():  # of the SciPy names that foolbox imports
        warnings.simplefilter("ignore", DeprecationWarning)
        import foolbox

    torch.manual_seed(seed)
    module = foolbox.PyTorchModel(opened.module, bounds=(0, 1), device="cpu")
    attack = foolbox.attacks.LinfPGD(steps=STEPS, abs_stepsize=epsilon / 8, random_start=True)
    _, _, wrong = attack(module, images, labels, epsilons=epsilon)
    return 1 - float(wrong.float().mean())


def certification(name: str, opened: TrainedModel, limit: int | None) -> Certified:
    """Certified accuracies, ours and those of the direct computation."""
    spec = opened.spec
    noise_std = spec.smoothing.noise_std
    indices = choose(opened.dataset, limit, spec.seed)
    ours = []
    for seed in range(NOISES):
        settings = CertificationSettings(noise_std=noise_std, n0=N0, n=N, alpha=ALPHA, seed=seed)
        certified = summarize(certify_samples(opened, settings, indices, batch=N, file=None), RADII)["certified"]
        ours.append([each["accuracy"] for each in certified])
    reached = np.array([direct_radius(opened, index, noise_std, seed) for seed in range(NOISES) for index in indices])
    return Certified(
        name=name,
        samples=len(indices),
        ours=[statistics.mean(of_radius) for of_radius in zip(*ours, strict=True)],
        direct=[float((reached >= radius).mean()) for radius in RADII],
    )


@torch.no_grad()
def direct_radius(opened: TrainedModel, index: int, noise_std: float, seed: int) -> float:
    """The certified radius of a sample; -1 where the answer is wrong or there is none. Nothing of ours but the model.

    Source: Cohen et al. (2019), CERTIFY, written down as it stands.
    """
    image = opened.dataset.test.images(torch.tensor([index])).numpy()
    random = np.random.default_rng([seed, index])

    def votes(draws: int) -> np.ndarray:
        noise = random.normal(scale=noise_std, size=(draws, *image.shape[1:]))
        answers = opened.module(torch.from_numpy((image + noise).astype(np.float32))).argmax(dim=1)
        return np.bincount(answers.numpy(), minlength=len(opened.dataset.classes))

    selected = int(votes(N0).argmax())
    count = int(votes(N)[selected])
    lower = stats.binomtest(count, N, alternative="greater").proportion_ci(1 - ALPHA, method="exact").low
    if lower <= 0.5 or selected != int(opened.dataset.test.labels[index]):
        return -1.0
    return float(noise_std * stats.norm.ppf(lower))


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _table(heads: Sequence[str], rows: Sequence[Attacked | Certified]) -> None:
    if rows:
        print("\n".join(["", _line(heads), _line(["---"] * len(heads)), *(row.row() for row in rows)]))


def main(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders of trained models.")],
    limit: Annotated[
        int | None, typer.Option("--autoattack-images", min=1, help="So many test images; all if absent.")
    ] = None,
    starts: Annotated[int, typer.Option("--starts", min=1, help="Random starts whose mean is compared.")] = 12,
    threads: Annotated[int, typer.Option("--threads", min=1, help="Of torch; small models are fastest with one.")] = 1,
    data: DataOption = None,
) -> None:
    """Ends with 1 where somebody disagrees."""
    torch.set_num_threads(threads)
    effort = Effort(starts=starts, for_autoattack=limit, threads=threads, data=data)
    under_attack: list[Attacked] = []
    smoothed: list[Certified] = []
    with errors(as_json=False, process="agreement"):
        for folder in runs:
            opened = open_model(str(folder), data=data)
            name = "/".join(folder.parts[-3:])
            Console(stderr=True).print(name, markup=False)
            if opened.spec.smoothing.noise_std > 0:
                smoothed.append(certification(name, opened, None))
            else:
                under_attack.append(attacked(name, opened, effort))
    few = ("images", f"PGD-{STEPS} %", "AutoAttack %")
    _table(["run", "images", "TA %", f"PGD-{STEPS} %", "foolbox %", *few, "agree"], under_attack)
    _table(["run", "images", *(f"at {r}, % ours / direct" for r in RADII), "agree"], smoothed)
    if not all([row.holds for row in under_attack] + [row.holds for row in smoothed]):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
