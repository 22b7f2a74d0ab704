"""SmoothAdv: training on Gaussian noisy copies, with the same noise in the attack and in the update.

With S copies of each sample (N in the paper), the S * B * M noisy images of a round are spread over the workers, and
over the local processes of each, sample by sample: whoever has a sample has all of its copies, because the attack's
loss is a function of their mean. So a worker's forward passes have S times its batch, and more copies per sample take
more workers with smaller batches.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.config import SmoothingSpec
from worker.randomness import Purpose, stream_generator


def noise_generators(
    seed: int, batch: int, indices: Sequence[int], owner: int | None, device: torch.device | str = "cpu"
) -> Iterator[torch.Generator]:
    """A generator for each sample of a batch, made when it is asked for.

    Args:
        seed: the job's.
        batch: the batch's number over the training.
        indices: the samples' numbers in their data.
        owner: where each worker has data of its own, the worker whose they are: its sample of a number is another one
            than the others' of that number.
        device: where the noise is drawn; a different device draws different numbers.
    """
    owners = () if owner is None else (owner,)
    return (stream_generator(seed, Purpose.SMOOTHING, batch, index, *owners, device=device) for index in indices)


def draw_noise(spec: SmoothingSpec, images_NCHW: Tensor, generators: Iterable[torch.Generator]) -> Tensor | None:
    """The noise of S copies of each sample, from the sample's own generator: the same whoever has the sample.

    Args:
        spec: `noise_std` is sigma, `samples` is S.
        images_NCHW: float32; only their number, shape and device are asked for.
        generators: one for each sample, on the images' device; not touched without noise.

    Returns:
        float32 [N, S, C, H, W], to be added in pixel space, before normalization, and not clamped; None without
        noise.
    """
    if spec.noise_std == 0:
        return None
    count, *shape = images_NCHW.shape
    noise = torch.empty((count, spec.samples, *shape), device=images_NCHW.device)
    for copies, generator in zip(noise, generators, strict=True):
        copies.normal_(0.0, spec.noise_std, generator=generator)
    return noise


def noisy_copies(images_NCHW: Tensor, noise_NSCHW: Tensor) -> Tensor:
    """All copies of the first sample, then all of the second, and so on: [N * S, C, H, W], not in [0, 1]."""
    return (images_NCHW.unsqueeze(1) + noise_NSCHW).flatten(0, 1)


class SmoothedModel(nn.Module):
    """The smoothed soft classifier, estimated from given noise; an attack on it is that of SmoothAdv.

    Its outputs are the logarithms of the mean softmax over a sample's S copies. They are logits of that mean, too, so
    their cross-entropy is -log of the mean softmax at the label.

    Source: Salman et al. 2019 (SmoothAdv-PGD), whose noise is the same in all attack steps and in the update. Deviation
    from their code: the mean is taken with logsumexp, not of probabilities with a floor of 1e-20.
    """

    def __init__(self, model: nn.Module, noise_NSCHW: Tensor) -> None:
        """`model`: logits of images; `noise_NSCHW`: as `draw_noise` gives it, for one batch."""
        super().__init__()
        self.model = model
        self._noise = noise_NSCHW

    def forward(self, images_NCHW: Tensor) -> Tensor:
        """float32 [N, K], log-probabilities."""
        logits = self.model(noisy_copies(images_NCHW, self._noise))
        copies = self._noise.shape[1]
        log_softmax = F.log_softmax(logits, dim=1).view(len(images_NCHW), copies, -1)
        return log_softmax.logsumexp(dim=1) - math.log(copies)


def smoothed(model: nn.Module, noise_NSCHW: Tensor | None) -> nn.Module:
    """What is attacked: the smoothed classifier, or without noise the model itself."""
    return model if noise_NSCHW is None else SmoothedModel(model, noise_NSCHW)
