"""Inner maximization oracles of equation (A1): perturbations in a ball around the image by projected gradient ascent.

One loop (`GradientAttack.perturb`) with three small parts that a norm overrides: `start_in_ball`, `ascend` and
`project`; what is maximized is a function that it is given. The attack differentiates with respect to the images only:
parameters are frozen while it runs, so no parameter gradient is computed, stored or changed. What it does to the model
is undone, also on an exception.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from common.config import AttackLoss, AttackName, AttackNorm, AttackSpec, BatchNormMode

TRADES_START_STD = 0.001
"""In pixel units. At the image itself the divergence has its minimum, and no gradient: its ascent starts beside it."""
_SMALLEST = torch.finfo(torch.float32).tiny


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


class GradientAttack(Attack):
    """The loop of PGD, and with one step of FGSM: ascend and project.

    Source: Madry et al. 2018 (PGD), Wong et al. 2020 (FGSM with random start), as used by the paper, section 4; for
    the loss `kl` and its start TRADES (Zhang et al. 2019).
    Deviations from the paper's code: running batch-norm statistics never see the attack's forward passes (its FGSM runs
    in train mode and pollutes them), and parameter gradients are not computed (there `backward` fills them).
    """

    def __init__(
        self,
        *,
        epsilon: float,
        steps: int,
        step_size: float,
        random_start: bool,
        batch_norm: BatchNormMode,
        loss: AttackLoss = AttackLoss.CROSS_ENTROPY,
    ) -> None:
        """`epsilon` and `step_size` are in pixel units [0, 1], in the ball's norm."""
        self.epsilon = epsilon
        self.steps = steps
        self.step_size = step_size
        self.random_start = random_start
        self.batch_norm = batch_norm
        self.loss = loss

    def start(self, images_NCHW: Tensor, generator: torch.Generator | None) -> Tensor:
        """The images, or a uniform draw from the ball, clamped to [0, 1], if the start is random.

        `kl` starts at the images plus Gaussian noise of standard deviation 0.001, which may lie just outside of the
        ball and of [0, 1], as in TRADES; the first projection brings it inside.
        """
        images = images_NCHW.detach()
        if self.loss is AttackLoss.KL:
            noise = torch.empty_like(images).normal_(0.0, TRADES_START_STD, generator=generator)
            return noise.add_(images)
        if not self.random_start:
            return images
        return self.start_in_ball(images, generator).clamp_(0.0, 1.0)

    def perturb(self, model: nn.Module, images_NCHW: Tensor, labels_N: Tensor, start_NCHW: Tensor) -> Tensor:
        """`steps` times ascend and project, from `start_NCHW`; no host synchronization in the loop."""
        images, perturbed = images_NCHW.detach(), start_NCHW.detach()
        with _only_inputs_differentiable(model, self.batch_norm):
            loss = _LOSSES[self.loss](model, images, labels_N)
            for _ in range(self.steps):
                variable = perturbed.detach().requires_grad_()
                with torch.enable_grad():
                    value = loss(variable)
                gradient = torch.autograd.grad(value, variable)[0]
                perturbed = self.project(images, self.ascend(perturbed, gradient))
        return perturbed

    def start_in_ball(self, images_NCHW: Tensor, generator: torch.Generator | None) -> Tensor:
        """A uniform draw from the ball around each image, in new memory; not yet clamped to [0, 1]."""
        raise NotImplementedError

    def ascend(self, perturbed_NCHW: Tensor, gradient_NCHW: Tensor) -> Tensor:
        """One attack step before the projection, the steepest ascent in the ball's norm; may overwrite the gradient.

        Where a sample's gradient is zero it stays where it is.
        """
        raise NotImplementedError

    def project(self, images_NCHW: Tensor, perturbed_NCHW: Tensor) -> Tensor:
        """Back into the ball and [0, 1]; may overwrite what it is given."""
        raise NotImplementedError


class GradientSignAttack(GradientAttack):
    """The l-infinity ball: ascends along the sign of the gradient."""

    def start_in_ball(self, images_NCHW: Tensor, generator: torch.Generator | None) -> Tensor:
        """See `GradientAttack`."""
        noise = torch.empty_like(images_NCHW).uniform_(-self.epsilon, self.epsilon, generator=generator)
        return noise.add_(images_NCHW)

    def ascend(self, perturbed_NCHW: Tensor, gradient_NCHW: Tensor) -> Tensor:
        """See `GradientAttack`."""
        return gradient_NCHW.sign_().mul_(self.step_size).add_(perturbed_NCHW)

    def project(self, images_NCHW: Tensor, perturbed_NCHW: Tensor) -> Tensor:
        """See `GradientAttack`."""
        lower = (images_NCHW - self.epsilon).clamp_(min=0.0)
        upper = (images_NCHW + self.epsilon).clamp_(max=1.0)
        return torch.clamp(perturbed_NCHW, lower, upper)


class GradientDirectionAttack(GradientAttack):
    """The l2 ball: ascends along the gradient, whose norm is made 1 for each sample."""

    def start_in_ball(self, images_NCHW: Tensor, generator: torch.Generator | None) -> Tensor:
        """See `GradientAttack`: a Gaussian direction, and a radius whose d-th power is uniform, for d pixels."""
        direction = torch.empty_like(images_NCHW).normal_(generator=generator)
        radius = torch.empty_like(images_NCHW[:, :1, :1, :1]).uniform_(0.0, 1.0, generator=generator)
        radius.pow_(1.0 / images_NCHW[0].numel()).mul_(self.epsilon)
        return direction.mul_(radius / _norms(direction)).add_(images_NCHW)

    def ascend(self, perturbed_NCHW: Tensor, gradient_NCHW: Tensor) -> Tensor:
        """See `GradientAttack`: the gradient is divided by its largest element first, or its squares might underflow.

        Deviation: TRADES and SmoothAdv take a random direction where the gradient is zero; here nothing is drawn.
        """
        largest = gradient_NCHW.abs().amax(dim=(1, 2, 3), keepdim=True).clamp_(min=_SMALLEST)
        gradient = gradient_NCHW.div_(largest)
        lengths = _norms(gradient).clamp_(min=_SMALLEST)
        return gradient.div_(lengths).mul_(self.step_size).add_(perturbed_NCHW)

    def project(self, images_NCHW: Tensor, perturbed_NCHW: Tensor) -> Tensor:
        """See `GradientAttack`: first into [0, 1], then along the radius into the ball, which does not leave [0, 1]."""
        offset = perturbed_NCHW.clamp(0.0, 1.0).sub_(images_NCHW)
        factor: Tensor = self.epsilon / _norms(offset).clamp_(min=_SMALLEST)
        return offset.mul_(factor.clamp_(max=1.0)).add_(images_NCHW)


def make_attack(spec: AttackSpec) -> Attack:
    """The attack that `spec` describes; FGSM takes one attack step whatever `spec.steps` says."""
    if spec.name is AttackName.NONE:
        return Attack()
    kind = GradientSignAttack if spec.norm is AttackNorm.LINF else GradientDirectionAttack
    return kind(
        epsilon=spec.epsilon,
        steps=1 if spec.name is AttackName.FGSM else spec.steps,
        step_size=spec.resolved_step_size,
        random_start=spec.random_start,
        batch_norm=spec.resolved_batch_norm,
        loss=spec.loss,
    )


def _norms(images_NCHW: Tensor) -> Tensor:
    """The l2 norm of each sample, [N, 1, 1, 1]."""
    norms: Tensor = torch.linalg.vector_norm(images_NCHW, dim=(1, 2, 3), keepdim=True)
    return norms


Loss = Callable[[Tensor], Tensor]
"""Of perturbed images, summed over the batch: no step depends on a sample's share of it, and a division by the batch
size could only let the gradient underflow. In eval mode a sample's perturbation does not depend on its batch."""


def _cross_entropy(model: nn.Module, _images_NCHW: Tensor, labels_N: Tensor) -> Loss:
    return lambda perturbed_NCHW: F.cross_entropy(model(perturbed_NCHW), labels_N, reduction="sum")


def _divergence(model: nn.Module, images_NCHW: Tensor, _labels_N: Tensor) -> Loss:
    """KL(p(x) || p(x')); p(x) is computed once, without a graph: the model does not change while it is attacked."""
    with torch.no_grad():
        clean_NK = F.log_softmax(model(images_NCHW), dim=1)

    def loss(perturbed_NCHW: Tensor) -> Tensor:
        perturbed_NK = F.log_softmax(model(perturbed_NCHW), dim=1)
        return F.kl_div(perturbed_NK, clean_NK, reduction="sum", log_target=True)

    return loss


_LOSSES: dict[AttackLoss, Callable[[nn.Module, Tensor, Tensor], Loss]] = {
    AttackLoss.CROSS_ENTROPY: _cross_entropy,
    AttackLoss.KL: _divergence,
}


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
