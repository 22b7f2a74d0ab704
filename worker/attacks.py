"""Inner maximization oracles of equation (A1): perturbations in the l-infinity ball by signed gradient ascent.

One loop (`GradientSignAttack.perturb`) with three small parts that a new attack overrides: `start`, `gradient` and
`ascend`. The attack differentiates with respect to the images only: parameters are frozen while it runs, so no
parameter gradient is computed, stored or changed. What it does to the model is undone, also on an exception.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from common.config import AttackName, AttackSpec, BatchNormMode


class Attack:
    """Perturbs nothing: the attack `none`, and the base of the others."""

    def __call__(
        self, model: nn.Module, images_NCHW: Tensor, labels_N: Tensor, generator: torch.Generator | None
    ) -> Tensor:
        """The perturbed images, from a start drawn from `generator`.

        Args:
            model: logits [N, K] of images [N, C, H, W]; left as it was.
            images_NCHW: float32 in [0, 1]; left as they were.
            labels_N: int64 class numbers.
            generator: on the images' device; not needed without a random start.

        Returns:
            float32 [N, C, H, W] in [0, 1] and within epsilon of the images, detached. The attack `none` returns the
            very tensor it was given.
        """
        return self.perturb(model, images_NCHW, labels_N, self.start(images_NCHW, generator))

    def start(self, images_NCHW: Tensor, generator: torch.Generator | None) -> Tensor:  # noqa: ARG002 (overridden)
        """Where the ascent starts, in the ball and in [0, 1]."""
        return images_NCHW

    def perturb(self, model: nn.Module, images_NCHW: Tensor, labels_N: Tensor, start_NCHW: Tensor) -> Tensor:  # noqa: ARG002
        """The perturbed images, from a given start: without any randomness."""
        return start_NCHW


class GradientSignAttack(Attack):
    """Projected ascent along the sign of the input gradient: PGD, and with one step FGSM.

    Source: Madry et al. 2018 (PGD), Wong et al. 2020 (FGSM with random start), as used by the paper, section 4.
    Deviations from the paper's code: running batch-norm statistics never see the attack's forward passes (its FGSM runs
    in train mode and pollutes them), and parameter gradients are not computed (there `backward` fills them).
    """

    def __init__(
        self, *, epsilon: float, steps: int, step_size: float, random_start: bool, batch_norm: BatchNormMode
    ) -> None:
        """`epsilon` and `step_size` are in pixel units [0, 1]."""
        self.epsilon = epsilon
        self.steps = steps
        self.step_size = step_size
        self.random_start = random_start
        self.batch_norm = batch_norm

    def start(self, images_NCHW: Tensor, generator: torch.Generator | None) -> Tensor:
        """The images, plus a uniform draw from the ball, clamped to [0, 1], if the start is random."""
        if not self.random_start:
            return images_NCHW.detach()
        noise = torch.empty_like(images_NCHW).uniform_(-self.epsilon, self.epsilon, generator=generator)
        return noise.add_(images_NCHW.detach()).clamp_(0.0, 1.0)

    def perturb(self, model: nn.Module, images_NCHW: Tensor, labels_N: Tensor, start_NCHW: Tensor) -> Tensor:
        """`steps` times ascend and project, from `start_NCHW`; no host synchronization in the loop."""
        lower = (images_NCHW.detach() - self.epsilon).clamp_(min=0.0)
        upper = (images_NCHW.detach() + self.epsilon).clamp_(max=1.0)
        perturbed = start_NCHW.detach()
        with _only_inputs_differentiable(model, self.batch_norm):
            for _ in range(self.steps):
                gradient = self.gradient(model, perturbed, labels_N)
                perturbed = torch.clamp(self.ascend(perturbed, gradient), lower, upper)
        return perturbed

    def gradient(self, model: nn.Module, perturbed_NCHW: Tensor, labels_N: Tensor) -> Tensor:
        """Gradient of the cross-entropy with respect to the images.

        The loss is summed: only the sign of the gradient counts, and a division by the batch size could only let it
        underflow. With batch norm in eval mode a sample's perturbation does not depend on the rest of its batch.
        """
        variable = perturbed_NCHW.detach().requires_grad_()
        with torch.enable_grad():
            loss = F.cross_entropy(model(variable), labels_N, reduction="sum")
        return torch.autograd.grad(loss, variable)[0]

    def ascend(self, perturbed_NCHW: Tensor, gradient_NCHW: Tensor) -> Tensor:
        """One attack step before the projection; may overwrite the gradient."""
        return gradient_NCHW.sign_().mul_(self.step_size).add_(perturbed_NCHW)


def make_attack(spec: AttackSpec) -> Attack:
    """The attack that `spec` describes; FGSM takes one attack step whatever `spec.steps` says."""
    if spec.name is AttackName.NONE:
        return Attack()
    return GradientSignAttack(
        epsilon=spec.epsilon,
        steps=1 if spec.name is AttackName.FGSM else spec.steps,
        step_size=spec.resolved_step_size,
        random_start=spec.random_start,
        batch_norm=spec.resolved_batch_norm,
    )


@contextmanager
def _only_inputs_differentiable(model: nn.Module, mode: BatchNormMode) -> Iterator[None]:
    """Freezes parameters and sets the mode; restores every module's flags and every parameter's on leaving.

    In train mode batch norm must use the batch's own statistics without recording them. It does so where
    `track_running_stats` is off: nothing is copied, and nothing has to be put back but the flag.
    """
    modules = [(module, module.training) for module in model.modules()]
    tracking = [module for module, _ in modules if isinstance(module, _BatchNorm) and module.track_running_stats]
    frozen = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in frozen:
            parameter.requires_grad_(False)
        model.train(mode is BatchNormMode.TRAIN)
        if mode is BatchNormMode.TRAIN:
            for batch_norm in tracking:
                batch_norm.track_running_stats = False
        yield
    finally:
        for batch_norm in tracking:
            batch_norm.track_running_stats = True
        for module, training in modules:
            module.training = training
        for parameter in frozen:
            parameter.requires_grad_(True)
