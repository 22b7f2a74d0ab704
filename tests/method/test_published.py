"""Published checkpoints: networks written here anew, under the names of repositories, give our networks' logits."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.config import JobSpec, ModelSpec, ShortcutStart, TransferSpec
from common.errors import DataError
from tests.local.support import dataset_of
from worker.models import Normalize, build_model
from worker.models.preact import _preact
from worker.pretrained import initial_weights
from worker.published import published_names
from worker.transfer import Initialized, freeze

NARROW: dict[str, Any] = {"stem": 16, "stages": (20, 40, 80), "blocks": 4}
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)


def conv(inner: int, outer: int, size: int = 3, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inner, outer, size, stride, size // 2, bias=False)


class Unit(nn.Module):
    """y = shortcut + conv2(relu(bn2(conv1(a)))) with a = relu(bn1(x)), He et al. 2016b; what the shortcut is called."""

    def __init__(self, inner: int, outer: int, stride: int, shortcut: str, from_input: bool = False) -> None:
        super().__init__()
        self.from_input = from_input
        self.bn1, self.conv1 = nn.BatchNorm2d(inner), conv(inner, outer, stride=stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(outer), conv(outer, outer)
        self.projects = inner != outer
        if self.projects and shortcut == "convShortcut":
            self.convShortcut = conv(inner, outer, 1, stride)
        elif self.projects:
            self.shortcut = nn.Sequential(conv(inner, outer, 1, stride))

    def forward(self, x: Tensor) -> Tensor:
        a = self.bn1(x).relu()
        project = getattr(self, "convShortcut", None) or getattr(self, "shortcut", None)
        return (project(x if self.from_input else a) if project else x) + self.conv2(self.bn2(self.conv1(a)).relu())


class Stage(nn.Module):
    def __init__(self, *units: nn.Module) -> None:
        super().__init__()
        self.layer = nn.Sequential(*units)

    def forward(self, x: Tensor) -> Tensor:
        stepped: Tensor = self.layer(x)
        return stepped


class PreAct(nn.Module):
    """As the repositories of Wong et al. and Rice et al. name it; of older ones without the last batch norm."""

    def __init__(self, blocks: int = 2, classes: int = 10, last_norm: bool = True, from_input: bool = False) -> None:
        super().__init__()
        widths = (64, 64, 128, 256, 512)
        self.conv1 = conv(3, 64)
        for stage in range(1, 5):
            sizes = [widths[stage - 1], *[widths[stage]] * blocks]
            units = [Unit(i, o, 2 if i != o else 1, "shortcut", from_input) for i, o in itertools.pairwise(sizes)]
            setattr(self, f"layer{stage}", nn.Sequential(*units))
        if last_norm:
            self.bn = nn.BatchNorm2d(512)
        self.linear = nn.Linear(512, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer4(self.layer3(self.layer2(self.layer1(self.conv1(x)))))
        logits: Tensor = self.linear(self.bn(x).relu().mean(dim=(2, 3)))
        return logits


class Wide(nn.Module):
    """As the repository of TRADES names it, of any widths; it has a stage that it does not use."""

    def __init__(self, widths: tuple[int, ...], blocks: int = 4) -> None:
        super().__init__()
        self.conv1 = conv(3, 16)
        for stage, (inner, outer) in enumerate(zip((16, *widths), widths, strict=False), start=1):
            sizes = [inner, *[outer] * blocks]
            units = [Unit(i, o, 2 if i != o and stage > 1 else 1, "convShortcut") for i, o in itertools.pairwise(sizes)]
            setattr(self, f"block{stage}", Stage(*units))
        self.sub_block1 = Stage(Unit(16, widths[0], 1, "convShortcut"))
        self.bn1 = nn.BatchNorm2d(widths[-1])
        self.fc = nn.Linear(widths[-1], 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.block3(self.block2(self.block1(self.conv1(x))))).relu()
        logits: Tensor = self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))
        return logits


def worn(network: nn.Module) -> nn.Module:
    """Its statistics, scales and shifts are all different."""
    draw = torch.Generator().manual_seed(3)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight.data, module.bias.data, module.running_mean, module.running_var):
                assert tensor is not None
                tensor.uniform_(0.5, 1.5, generator=draw)
    return network.eval()


def ours(name: str, **keys: str) -> nn.Module:
    spec = ModelSpec.model_validate({"name": name, **keys})
    return build_model(spec, in_channels=3, image_size=32, classes=10, mean=MEAN, std=STD, seed=0).eval()


def take(model: nn.Module, file: Path) -> Initialized:
    """As `--init FILE` does."""
    spec = TransferSpec(init=True)
    weights = initial_weights(spec, file)
    assert weights is not None
    return weights.give(model, spec, dataset_of(JobSpec()), 0)


def saved(network: nn.Module, folder: Path, prefix: str = "") -> Path:
    torch.save({"state_dict": {prefix + name: t for name, t in network.state_dict().items()}}, folder / "theirs.pth")
    return folder / "theirs.pth"


def assert_same_logits(model: nn.Module, theirs: nn.Module) -> None:
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(5))
    shape = (1, 3, 1, 1)
    with torch.no_grad():
        expected = theirs((images - torch.tensor(MEAN).view(shape)) / torch.tensor(STD).view(shape))
        torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("prefix", "shortcut"), [("", "activation"), ("module.", "activation"), ("", "input")])
def test_a_published_preact_resnet18_has_the_same_logits_here(tmp_path: Path, prefix: str, shortcut: str) -> None:
    theirs, model = worn(PreAct(from_input=shortcut == "input")), ours("preact_resnet18", shortcut=shortcut)
    told = take(model, saved(theirs, tmp_path, prefix))
    assert_same_logits(model, theirs)
    said = "by published names (they do not tell model.shortcut: is it that of the file?)"
    assert str(told) == f"{told.taken} tensors taken; {said}"
    assert told.taken == len(theirs.state_dict()) == len(model.state_dict())


@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_published_wide_resnet_has_the_same_logits_here_and_its_unused_stage_is_told(
    tmp_path: Path, prefix: str
) -> None:
    theirs = worn(Wide((20, 40, 80)))
    model = nn.Sequential(
        Normalize(MEAN, STD), _preact(**NARROW, in_channels=3, classes=10, shortcut=ShortcutStart.ACTIVATION)
    ).eval()
    told = take(model, saved(theirs, tmp_path, prefix))
    assert_same_logits(model, theirs)
    assert told.taken == len(model.state_dict())
    assert told.unexpected
    assert all(name.startswith("sub_block1.") for name in told.unexpected)


def test_the_names_are_those_of_wide_resnet28_10_one_to_one() -> None:
    with torch.device("meta"):
        theirs = {n: t.shape for n, t in Wide((160, 320, 640)).state_dict().items() if not n.startswith("sub_")}
    own = ours("wide_resnet28_10")[1]
    names = published_names(own)
    assert {names[name]: tensor.shape for name, tensor in own.state_dict().items()} == theirs


def test_a_head_of_other_classes_is_drawn_anew(tmp_path: Path) -> None:
    told = take(ours("preact_resnet18"), saved(PreAct(classes=100), tmp_path))
    assert told.new == ("1.13.weight", "1.13.bias")


@pytest.mark.parametrize(
    ("theirs", "message"),
    [
        (
            lambda: PreAct(last_norm=False),
            r"got tensors=bn.weight \(9.weight here\) missing, bn.bias \(9.bias here\) mi",
        ),
        (lambda: PreAct(blocks=3), r"got tensors=layer1.2.bn1.weight has no place, layer1.2.bn1.bias has no place"),
    ],
    ids=["no last batch norm", "more blocks"],
)
def test_another_network_under_such_names_is_refused(tmp_path: Path, theirs: type[nn.Module], message: str) -> None:
    model = ours("preact_resnet18")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(DataError, match=message):
        take(model, saved(theirs(), tmp_path))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_networks_under_names_of_their_own_have_no_others() -> None:
    assert published_names(ours("small_cnn")[1]) == {}


@pytest.mark.parametrize(
    ("name", "pattern", "frozen"),
    [
        ("resnet50", "layer1.*", {"layer1"}),
        ("preact_resnet18", "0.*", {"0"}),
        ("preact_resnet18", "[0-2].*", {"0", "1", "2"}),
    ],
)
def test_the_patterns_in_the_help_of_freeze_match_what_it_says(name: str, pattern: str, frozen: set[str]) -> None:
    text = TransferSpec.model_fields["freeze"].description
    assert text is not None
    assert f"`{pattern}`" in text
    assert {found.split(".")[1] for found in freeze(ours(name), (pattern,))} == frozen
