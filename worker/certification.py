"""Certification by randomized smoothing: CERTIFY of Cohen et al. (2019), for one sample at a time.

The smoothed classifier answers what the model answers most often under Gaussian noise. CERTIFY finds that class c_A and
a radius within which no l2 perturbation of the image changes it, with probability at least 1 - alpha over the noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from scipy.special import betaincinv, ndtri
from torch import Tensor, nn

from common.errors import SpecError, refusal
from worker.evaluation import eval_mode
from worker.randomness import Purpose, stream_generator

NOISE_BLOCK = 100
"""Draws that a generator makes in one call: the same calls whatever the batch is, so the same noise."""


@dataclass(frozen=True, kw_only=True)
class CertificationSettings:
    """What a certificate depends on beside model and image."""

    noise_std: float
    """sigma of the smoothed classifier, in the unit of pixels, which are in [0, 1]."""
    n0: int
    """Draws that select the class."""
    n: int
    """Draws that estimate its probability."""
    alpha: float
    """Probability that a certificate is wrong: of each one by itself, not of all together."""
    seed: int
    """Of the noise."""

    def __post_init__(self) -> None:
        """Refuses what certifies nothing.

        Raises:
            SpecError: a number out of its range, or so few draws that every sample would abstain.
        """
        if not (math.isfinite(self.noise_std) and self.noise_std > 0):
            raise SpecError(refusal("a standard deviation above 0", "noise_std", self.noise_std))
        if not 0 < self.alpha < 1:
            raise SpecError(refusal("a probability between 0 and 1", "alpha", self.alpha))
        if self.n0 < 1:
            raise SpecError(refusal("at least 1 draw to select the class", "n0", self.n0))
        if self.n < 1 or lower_confidence_bound(self.n, self.n, self.alpha) <= 0.5:
            fewest = math.floor(math.log(self.alpha, 0.5)) + 1
            context = f"alpha={self.alpha}; with fewer every sample abstains"
            raise SpecError(refusal(f"at least {fewest} draws", "n", self.n, context))

    @property
    def maximal_radius(self) -> float:
        """The radius of a sample that all n draws agree on; no certificate reaches farther."""
        return self.noise_std * float(ndtri(lower_confidence_bound(self.n, self.n, self.alpha)))


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """What CERTIFY says of one sample."""

    predicted: int | None
    """c_A, the class of the smoothed classifier; None where it abstains."""
    radius: float
    """l2, in the unit of pixels; 0 where it abstains."""
    votes: int
    """Of the n draws, those of the selected class, also where it abstains."""


def certify(
    model: nn.Module,
    image_CHW: Tensor,
    settings: CertificationSettings,
    *,
    index: int,
    batch: int,
    drawn: Callable[[int], None] = lambda _: None,
) -> Certificate:
    """CERTIFY(f, sigma, x, n0, n, alpha): counts under selection noise, then under independent estimation noise.

    The noise is keyed by (seed, sample index) and drawn on the image's device: a CPU and a GPU, or two kinds of GPU,
    draw different numbers. It is the same for every `batch`, which changes a count only where float rounding under
    another shape moves a draw over a decision boundary. As `n` grows the first draws stay the same.

    Args:
        model: logits [N, K] of images [N, C, H, W]; it normalizes them itself, so noise comes before normalization.
            Runs in eval mode and is put back into its modes, also on an exception.
        image_CHW: float32 in [0, 1], on the model's device.
        index: of the sample in its data set.
        batch: noisy copies per forward pass, at least 1.
        drawn: is told of each pass how many copies it had; on a GPU when it is issued, not when it has run.

    Raises:
        SpecError: the model gives no logits [N, K], or NaN.

    Source: Cohen, Rosenfeld, Kolter, "Certified Adversarial Robustness via Randomized Smoothing", ICML 2019,
    the pseudocode in section 3.2.
    """

    def counts(purpose: Purpose, draws: int) -> Tensor:
        generator = stream_generator(settings.seed, purpose, index, device=image_CHW.device)
        return class_counts(
            model,
            image_CHW,
            noise_std=settings.noise_std,
            draws=draws,
            batch=batch,
            generator=generator,
            drawn=drawn,
        )

    with eval_mode(model):
        selection = counts(Purpose.SELECTION_NOISE, settings.n0)
        estimation = counts(Purpose.ESTIMATION_NOISE, settings.n)
    return certificate(
        _without_nan(selection), _without_nan(estimation), noise_std=settings.noise_std, alpha=settings.alpha
    )


def certificate(
    selection_K: Sequence[int], estimation_K: Sequence[int], *, noise_std: float, alpha: float
) -> Certificate:
    """From counts to a certificate.

    Args:
        selection_K: of n0 draws, how many were of each class; of classes that share the greatest, the first is taken.
        estimation_K: the same of n other draws.
        noise_std, alpha: see `CertificationSettings`.

    Source: as `certify`; the radius is that of Theorem 1 with 1 - p_A for p_B.
    """
    selected = max(range(len(selection_K)), key=selection_K.__getitem__)
    votes, n = estimation_K[selected], sum(estimation_K)
    p_lower = lower_confidence_bound(votes, n, alpha)
    if p_lower > 0.5:
        return Certificate(predicted=selected, radius=noise_std * float(ndtri(p_lower)), votes=votes)
    return Certificate(predicted=None, radius=0.0, votes=votes)


def lower_confidence_bound(successes: int, trials: int, alpha: float) -> float:
    """One-sided lower bound of a probability, exact (Clopper and Pearson): too great with probability alpha at most.

    It is the p at which `successes` or more of `trials` have probability alpha: the alpha-quantile of the beta
    distribution with parameters k and n - k + 1.

    Args:
        successes: k, 0 to `trials`.
        trials: n, at least 1.
        alpha: in (0, 1).
    """
    if successes == 0:
        return 0.0
    return float(betaincinv(successes, trials - successes + 1, alpha))


@torch.no_grad()
def class_counts(
    model: nn.Module,
    image_CHW: Tensor,
    *,
    noise_std: float,
    draws: int,
    batch: int,
    generator: torch.Generator,
    drawn: Callable[[int], None] = lambda _: None,
) -> Tensor:
    """SampleUnderNoise: how often the model answers each class for image + N(0, noise_std^2 I), not clamped.

    Nothing waits for the device between the passes.

    Args:
        model: in eval mode.
        image_CHW, batch, drawn: see `certify`.
        draws: how many, at least 1.
        generator: of the noise, on the image's device.

    Returns:
        int64 [K + 1] on the device: the counts of the K classes, and last of the draws with NaN among their logits.
    """
    counts: Tensor | None = None
    for noise_NCHW in _noise(image_CHW.shape, draws, batch, generator):
        logits_NK = model(torch.add(image_CHW, noise_NCHW, alpha=noise_std))
        if logits_NK.dim() != 2 or len(logits_NK) != len(noise_NCHW):
            rule = f"logits of shape [{len(noise_NCHW)}, K]"
            raise SpecError(refusal(rule, "shape", list(logits_NK.shape), "what the model gives"))
        classes = logits_NK.shape[1]
        answers_N = torch.where(logits_NK.isnan().any(dim=1), classes, logits_NK.argmax(dim=1))
        if counts is None:
            counts = torch.zeros(classes + 1, dtype=torch.int64, device=answers_N.device)
        counts.scatter_add_(0, answers_N, torch.ones_like(answers_N))
        drawn(len(answers_N))
    assert counts is not None
    return counts


def _noise(shape: Sequence[int], draws: int, batch: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Standard normal noise [N, *shape] of `draws` draws, N = `batch` but for the last.

    How many numbers a call asks for decides how a generator makes them. So it is always asked for whole blocks, which
    are then cut into batches.
    """
    device = generator.device
    left = torch.empty(0, *shape, device=device)
    for start in range(0, draws, batch):
        wanted = min(batch, draws - start)
        blocks = math.ceil(max(wanted - len(left), 0) / NOISE_BLOCK)
        fresh = [torch.randn(NOISE_BLOCK, *shape, generator=generator, device=device) for _ in range(blocks)]
        noise = torch.cat([left, *fresh])
        yield noise[:wanted]
        left = noise[wanted:]


def _without_nan(counts: Tensor) -> list[int]:
    """The counts of the classes, on the host.

    Raises:
        SpecError: there were NaN; their argmax would be a class like any other.
    """
    *of_classes, nan = counts.tolist()
    if nan:
        raise SpecError(refusal("logits without NaN", "draws with NaN", nan, f"of {sum(of_classes) + nan} draws"))
    return of_classes
