"""Adversarial training "for free": each batch for m rounds in a row, with an attack step in each that needs no pass."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from worker.attacks import Attack, GradientAttack


class Replays:
    """What one process of a worker keeps of a batch between its replays: the perturbed images.

    In every round of a batch the one backward pass gives the gradient of the parameters and that of the perturbed
    images; the perturbation takes its step along the latter, and the next round of the same batch trains on the result.
    Batch norm is in train mode, as the pass is that of training.

    Rounds stay synchronous: all workers are at the same replay of their batches, as both are functions of the round. A
    state to go on from is saved between two batches only, where nothing is kept, so that checkpoints hold no
    perturbation and a resumed run is identical to one that was never stopped. The best model is saved wherever it was
    judged, between two replays too: it is kept to be used, and a run that went on from it would begin that round's
    batch anew, from its start in the ball, at the replay that is due.

    Source: Shafahi et al. 2019 ("Adversarial training for free!"), Algorithm 1. As there, T rounds are T / m batches.
    Deviation: there the perturbation of a batch starts from that of the batch before, slot by slot; here it starts
    anew, from a uniform draw in the ball (or its centre). Wong et al. 2020 found the two alike, with one step a batch.
    """

    def __init__(self, replays: int) -> None:
        """`replays`: m; with 1, each batch has one round, and its perturbation comes from the attack's own passes."""
        self._replays = replays
        self._kept: Tensor | None = None

    def batch(self, round_: int) -> int:
        """The number of the batch that is trained on in a round: t // m."""
        return round_ // self._replays

    def between_batches(self, round_: int) -> bool:
        """Whether nothing is kept after so many rounds."""
        return round_ % self._replays == 0

    def perturb(
        self, attack: Attack, model: nn.Module, images_NCHW: Tensor, labels_N: Tensor, start_NCHW: Tensor
    ) -> Tensor:
        """The images that this round trains on; with replays without any pass, and backward gives them a gradient."""
        if self._replays == 1:
            return attack.perturb(model, images_NCHW, labels_N, start_NCHW)
        return (start_NCHW if self._kept is None else self._kept).detach().requires_grad_()

    @torch.no_grad()
    def after_backward(self, attack: Attack, round_: int, images_NCHW: Tensor, perturbed_NCHW: Tensor) -> None:
        """The attack step of this round, for the next; after a batch's last round nothing is kept.

        Args:
            attack: of this round; its ball and step size count.
            round_: counted from 0.
            images_NCHW: the clean images.
            perturbed_NCHW: what `perturb` gave, with its gradient.
        """
        self._kept = None
        if self.between_batches(round_ + 1):
            return
        assert isinstance(attack, GradientAttack)
        assert perturbed_NCHW.grad is not None
        self._kept = attack.project(images_NCHW, attack.ascend(perturbed_NCHW.detach(), perturbed_NCHW.grad))
