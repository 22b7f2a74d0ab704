"""Starting from other parameters: which are taken, what is drawn anew, what stays frozen; and enlarged images."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from common.config import Head, JobSpec, ModelSpec, OptimizerSpec, TransferSpec
from common.errors import DataError, SpecError
from tests.local.support import dataset_of
from worker.local_files import sha256_of
from worker.models import averaged_buffers, build_model
from worker.models.enlarge import Enlarge
from worker.models.fixed_norm import FixedBatchNorm
from worker.objectives import correct
from worker.pretrained import Weights, initial_weights, read_weights, weights_file
from worker.readiness import backward_order
from worker.replica import Replica
from worker.transfer import freeze, head_of, initialize

IMAGES = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2, 3, 0, 1])


def model(classes: int = 4, seed: int = 0, **spec: Any) -> nn.Module:
    keys = {"name": "resnet8", "width": 4, **spec}
    return build_model(
        ModelSpec.model_validate(keys), in_channels=1, image_size=8, classes=classes, mean=(0.4,), std=(0.3,), seed=seed
    )


def worn(classes: int = 4, seed: int = 1) -> nn.Module:
    """A model whose batch-norm statistics have seen images."""
    trained = model(classes, seed).train()
    for _ in range(3):
        trained(IMAGES)
    return trained


def state(of: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in of.state_dict().items()}


def take(to: nn.Module, weights: Mapping[str, Tensor], head: Head = Head.AUTO, other_classes: bool = False) -> str:
    return str(initialize(to, weights, head, other_classes=other_classes, source="theirs.pth"))


HEAD = ("1.8.weight", "1.8.bias")


# What is taken


@pytest.mark.parametrize("prefix", ["", "1."], ids=["of the model", "of its network"])
def test_a_state_dict_of_a_model_or_of_its_network_is_taken_whole(prefix: str) -> None:
    theirs, ours = worn(), model()
    weights = {name.removeprefix(prefix): tensor for name, tensor in state(theirs).items()}

    assert take(ours, weights) == f"{len(weights)} tensors taken"
    assert all(torch.equal(tensor, ours.state_dict()[name]) for name, tensor in state(theirs).items())
    assert torch.equal(ours.eval()(IMAGES), theirs.eval()(IMAGES))


@pytest.mark.parametrize(
    ("classes", "head", "other_classes", "drawn"),
    [
        (4, Head.AUTO, False, False),
        (4, Head.AUTO, True, True),
        (7, Head.AUTO, False, True),
        (4, Head.SAME, True, False),
        (4, Head.NEW, False, True),
    ],
)
def test_the_head_is_drawn_anew_where_it_must_be_or_is_asked_for(
    classes: int, head: Head, other_classes: bool, drawn: bool
) -> None:
    theirs, ours = state(worn(4)), model(classes)
    before = state(ours)
    text = take(ours, theirs, head, other_classes)
    assert ("head drawn anew: 8.weight, 8.bias" in text) is drawn
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, before[name] if drawn and name in HEAD else theirs[name])


def new_head(seed: int, sha256: str) -> Tensor:
    ours, weights = model(seed=seed), state(worn(seed=seed))
    given = Weights(source=Path("theirs.pth"), sha256=sha256, tensors=weights, classes=None)
    told = given.give(ours, TransferSpec(init=True, head=Head.NEW), dataset_of(JobSpec()), seed)
    assert told.new == HEAD
    return ours.get_parameter(HEAD[0]).detach()


def test_a_new_head_is_a_stream_of_the_seed_and_the_file_and_not_the_head_that_their_training_began_with() -> None:
    before = torch.get_rng_state()
    first = new_head(5, "ab" * 32)
    assert torch.equal(first, new_head(5, "ab" * 32))
    for other in (new_head(6, "ab" * 32), new_head(5, "cd" * 32), model(seed=5).get_parameter(HEAD[0])):
        assert abs(torch.corrcoef(torch.stack([first.flatten(), other.detach().flatten()]))[0, 1]) < 0.4
    bound = first.shape[1] ** -0.5
    assert 0.8 * bound < first.abs().max() <= bound  # uniform, as torch draws it
    assert torch.equal(torch.get_rng_state(), before)


def test_a_head_that_the_file_lacks_is_drawn_anew_and_what_has_no_place_is_told() -> None:
    weights = {name: tensor for name, tensor in state(worn()).items() if name not in HEAD}
    weights |= {"1.classifier.weight": torch.zeros(2)}
    ours = model()
    assert "head drawn anew: 8.weight, 8.bias; not used: classifier.weight" in take(ours, weights)


def test_counters_that_old_files_lack_start_at_zero() -> None:
    weights = {name: tensor for name, tensor in state(worn()).items() if "num_batches" not in name}
    ours = model()
    assert "missing, counted from 0: 1.num_batches_tracked" in take(ours, weights)
    assert ours.state_dict()["1.1.num_batches_tracked"] == 0


def damaged(**changes: Any) -> dict[str, Tensor]:
    weights = state(worn())
    for name, tensor in changes.items():
        name = name.replace("__", ".")
        if tensor is None:
            del weights[f"1.{name}"]
        else:
            weights[f"1.{name}"] = tensor
    return weights


@pytest.mark.parametrize(
    ("weights", "head", "text"),
    [
        (
            damaged(**{"0__weight": None, "1__bias": None}),
            Head.NEW,
            "but its head, got tensors=0.weight missing, 1.bias",
        ),
        (damaged(**{"1__bias": torch.zeros(3)}), Head.AUTO, "1.bias of shape [3] instead of [4]"),
        (damaged(**{"1__bias": torch.full((4,), torch.nan)}), Head.AUTO, "1.bias not finite"),
        (damaged(**{"1__bias": torch.zeros(4, dtype=torch.int64)}), Head.AUTO, "1.bias of torch.int64"),
        (
            damaged(**{"8__weight": torch.zeros(7, 16)}),
            Head.SAME,
            "(transfer.head=new draws the head anew), got tensors=",
        ),
        ({"x": torch.zeros(1)}, Head.AUTO, "0.weight missing, 1.weight missing"),
    ],
    ids=["missing", "shape", "not finite", "integers", "head of another shape", "another model"],
)
def test_anything_else_that_does_not_fit_is_refused_by_name_and_nothing_is_taken(
    weights: dict[str, Tensor], head: Head, text: str
) -> None:
    ours = model()
    before = state(ours)
    with pytest.raises(DataError) as caught:
        take(ours, weights, head)
    assert text in str(caught.value)
    assert str(caught.value).endswith("(theirs.pth)")
    assert all(torch.equal(tensor, before[name]) for name, tensor in ours.state_dict().items())


def test_half_precision_is_widened() -> None:
    weights = {name: t.half() if t.is_floating_point() else t for name, t in state(worn()).items()}
    ours = model()
    take(ours, weights)
    assert ours.state_dict()["1.0.weight"].dtype is torch.float32
    assert torch.equal(ours.state_dict()["1.0.weight"], weights["1.0.weight"].float())


# Where it comes from


def test_torchvisions_weights_of_resnet50_fit_ours(tmp_path: Path) -> None:
    from torchvision.models import resnet50

    with torch.random.fork_rng():
        torch.manual_seed(3)
        theirs = resnet50(weights=None).eval()
    torch.save({f"module.{name}": tensor for name, tensor in theirs.state_dict().items()}, tmp_path / "resnet50.pth")
    ours = build_model(
        ModelSpec.model_validate({"name": "resnet50"}),
        in_channels=3,
        image_size=32,
        classes=10,
        mean=(0.5, 0.4, 0.3),
        std=(0.2, 0.2, 0.2),
        seed=0,
    ).eval()

    text = take(ours, read_weights(tmp_path / "resnet50.pth").tensors)

    assert text == "318 tensors taken; head drawn anew: fc.weight, fc.bias"
    images = torch.rand(1, 3, 32, 32)
    theirs.fc = ours[1].fc
    normalized = (images - torch.tensor([0.5, 0.4, 0.3]).view(-1, 1, 1)) / 0.2
    with torch.no_grad():
        assert torch.allclose(ours(images), theirs(normalized), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "nest",
    [
        lambda weights: weights,
        lambda weights: {"state_dict": weights, "epoch": 3},
        lambda weights: {"model": weights, "optimizer": {"lr": 0.1}},
        lambda weights: {"net": {f"module.{name}": tensor for name, tensor in weights.items()}, "acc": 93.1},
        lambda weights: {f"module.module.{name}": tensor for name, tensor in weights.items()},
    ],
    ids=["alone", "state_dict", "model", "net of DataParallel", "wrapped twice"],
)
@pytest.mark.parametrize("suffix", [".pt", ".pth", ".tar"])
def test_a_state_dict_is_found_where_repositories_keep_it(tmp_path: Path, nest: Any, suffix: str) -> None:
    weights = {name.removeprefix("1."): tensor for name, tensor in state(worn()).items()}
    file = tmp_path / f"theirs{suffix}"
    torch.save(nest(weights), file)
    found = read_weights(file)
    assert found.tensors.keys() == weights.keys()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in found.tensors.items())
    assert (found.sha256, found.classes) == (sha256_of(file), None)


def test_safetensors_are_read(tmp_path: Path) -> None:
    save_file(state(worn()), tmp_path / "theirs.safetensors")
    assert read_weights(tmp_path / "theirs.safetensors").tensors.keys() == state(model()).keys()


class Runs:
    """Pickles as a call of a shell."""

    def __init__(self, marker: Path) -> None:
        self._marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self._marker}",)


def not_torch(path: Path, _marker: Path) -> None:
    path.write_bytes(b"no zip file")


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda path, marker: torch.save({"state_dict": {}, "x": Runs(marker)}, path), "got content=posix.system"),
        (
            lambda path, marker: torch.save([Runs(marker)], path, _use_new_zipfile_serialization=False),
            "got content=posix.system",
        ),
        (lambda path, _: torch.save({"args": argparse.Namespace(lr=1)}, path), "got content=argparse.Namespace"),
        (lambda path, _: torch.save(nn.Linear(2, 2), path), "got content=torch.nn.modules.linear.Linear"),
        (not_torch, "tensors and plain values only"),
        (lambda path, _: torch.save({"epoch": 3, "lr": 0.1}, path), "expected a state_dict, alone or under state_dict"),
        (lambda path, _: torch.save(torch.zeros(3), path), "got content=Tensor"),
        (lambda path, _: torch.save({}, path), "expected a state_dict"),
    ],
    ids=["hostile", "hostile, old format", "namespace", "module", "no file of torch", "numbers", "tensor", "nothing"],
)
def test_a_file_with_anything_but_tensors_is_refused_and_nothing_runs(tmp_path: Path, make: Any, text: str) -> None:
    marker = tmp_path / "marker"
    make(tmp_path / "theirs.pt", marker)
    with pytest.raises(DataError) as caught:
        read_weights(tmp_path / "theirs.pt")
    assert text in str(caught.value)
    assert "weights_only" not in str(caught.value)  # torch's advice to load it without care is not passed on
    assert not marker.exists()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("theirs.pkl", "expected a run folder, a checkpoint, or a file .pt, .pth, .safetensors, .tar, got init="),
        ("nowhere.pt", "expected a file or folder that exists, got init="),
        (".", "expected a checkpoint, or a run folder with checkpoints, got path="),
    ],
)
def test_what_is_no_file_of_weights_is_refused(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / "theirs.pkl").write_bytes(b"")
    with pytest.raises(SpecError) as caught:
        weights_file(tmp_path / name)
    assert text in str(caught.value)


def test_a_broken_safetensors_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "theirs.safetensors").write_bytes(b"no tensors")
    with pytest.raises(DataError, match="expected a safetensors file, got init="):
        read_weights(tmp_path / "theirs.safetensors")


def test_the_job_says_whether_there_is_a_file_and_may_say_which(tmp_path: Path) -> None:
    file = tmp_path / "theirs.safetensors"
    save_file(state(worn()), file)
    required = TransferSpec(init=True)

    assert initial_weights(TransferSpec(), None) is None
    assert initial_weights(required, file) is not None
    assert initial_weights(TransferSpec(init=True, sha256=sha256_of(file)), file) is not None
    with pytest.raises(SpecError, match=r"\(--init FILE\), got init=None \(transfer.init=true\)"):
        initial_weights(required, None)
    with pytest.raises(SpecError, match=r"transfer.init=true with --init, got transfer.init=False"):
        initial_weights(TransferSpec(), file)
    with pytest.raises(SpecError, match=f"sha256 {'0' * 64} .*, got sha256={sha256_of(file)}"):
        initial_weights(TransferSpec(init=True, sha256="0" * 64), file)


# Frozen


def trained(patterns: tuple[str, ...], spec: OptimizerSpec, rounds: int = 5) -> tuple[nn.Module, Replica]:
    """A model after a few rounds of training in train mode."""
    network = worn()
    frozen = freeze(network, patterns)
    replica = Replica(network, spec, backward_order(network, IMAGES), frozen=frozen)
    network.train()
    for _ in range(rounds):
        replica.parameters.zero_gradient()
        F.cross_entropy(network(IMAGES), LABELS).backward()
        replica.optimizer.update(replica.parameters.theta, replica.parameters.gradient, 0.1)
        replica.take_state(replica.state_vector(torch.zeros(7).numpy()))
    return network, replica


@pytest.mark.parametrize("optimizer", ["lamb", "sgd"])
def test_all_but_the_head_stays_bit_for_bit_in_spite_of_weight_decay(optimizer: str) -> None:
    spec = OptimizerSpec.model_validate({"name": optimizer, "weight_decay": 0.1})
    network, replica = trained(("all-but-head",), spec)
    before = worn().state_dict()
    changed = [name for name, tensor in network.state_dict().items() if not torch.equal(tensor, before[name])]
    assert changed == list(HEAD)
    assert [tensor.name for tensor in replica.tensors] == [*reversed(HEAD), "@metrics"]  # what travels
    assert replica.parameters.theta.numel() == 4 * 16 + 4
    assert all(p.grad is None for name, p in network.named_parameters() if name not in HEAD)


def test_training_the_head_alone_is_what_torch_does_with_its_parameters_alone() -> None:
    spec = OptimizerSpec.model_validate({"name": "sgd", "momentum": 0.9, "weight_decay": 0.01})
    ours, _ = trained(("all-but-head",), spec)

    theirs = worn().eval()  # every batch norm is frozen, so none of them is in train mode
    head = theirs[1][8]
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    for _ in range(5):
        optimizer.zero_grad()
        F.cross_entropy(theirs(IMAGES), LABELS).backward()
        optimizer.step()
    assert all(torch.equal(ours.state_dict()[name], tensor) for name, tensor in theirs.state_dict().items())


def test_patterns_freeze_names_within_the_network_and_what_is_not_frozen_moves() -> None:
    network, replica = trained(("0.weight", "3.*"), OptimizerSpec())
    before = worn().state_dict()
    changed = {name for name, tensor in network.state_dict().items() if not torch.equal(tensor, before[name])}
    parameters = {name for name, _ in network.named_parameters()}
    frozen = {name for name in before if name == "1.0.weight" or name.startswith("1.3.")}
    assert changed & frozen == set()
    assert parameters - changed == frozen & parameters
    assert "1.1.running_mean" in changed  # its batch norm is not frozen
    averaged = {tensor.name for tensor in replica.tensors if tensor.buffer}
    assert averaged & frozen == set()
    assert {"1.1.running_mean", "1.4.bn1.running_var"} <= averaged


def test_a_batch_norm_of_which_a_part_is_frozen_goes_on_with_its_statistics() -> None:
    network = worn()
    freeze(network, ("1.weight",))
    assert isinstance(network[1][1], nn.BatchNorm2d)
    assert "1.1.running_mean" in averaged_buffers(network)
    freeze(network, ("1.bias", "1.weight"))
    assert isinstance(network[1][1], FixedBatchNorm)
    assert "1.1.running_mean" not in averaged_buffers(network)


def test_a_frozen_batch_norm_is_one_in_eval_mode_under_the_same_names() -> None:
    network, original = worn(), worn().eval()
    freeze(network, ("all-but-head",))
    assert list(network.state_dict()) == list(original.state_dict())
    network.train()
    assert torch.equal(network(IMAGES), original(IMAGES))
    assert int(correct(network(IMAGES), LABELS)) == int(correct(original(IMAGES), LABELS))


def test_digests_cover_frozen_parameters() -> None:
    replicas = []
    for bias in (0.0, 1.0):
        network = worn()
        with torch.no_grad():
            network[1][1].bias.fill_(bias)
        replicas.append(Replica(network, OptimizerSpec(), frozen=freeze(network, ("all-but-head",))))
    assert torch.equal(replicas[0].parameters.theta, replicas[1].parameters.theta)
    assert replicas[0].parameter_digest() != replicas[1].parameter_digest()
    assert replicas[0].replica_digest() != replicas[1].replica_digest()


def test_a_state_with_frozen_parameters_is_saved_and_taken_over() -> None:
    _, saved = trained(("all-but-head",), OptimizerSpec())
    other = model(seed=5)
    frozen = freeze(other, ("all-but-head",))
    resumed = Replica(other, OptimizerSpec(), backward_order(other, IMAGES), frozen=frozen)
    resumed.load_state(saved.state_tensors())
    assert resumed.replica_digest() == saved.replica_digest()


def test_patterns_without_a_parameter_and_patterns_that_leave_none_are_refused() -> None:
    with pytest.raises(
        SpecError, match=r"all-but-head or a pattern .*\(0.weight, 1.weight, .* and 17 more\), got .*=x"
    ):
        freeze(model(), ("x",))
    with pytest.raises(SpecError, match=r"at least one parameter to train, got transfer.freeze=all-but-head, 8.\*"):
        freeze(model(), ("all-but-head", "8.*"))
    assert head_of(model()) == "1.8"


# Enlarged


@pytest.mark.parametrize(("size", "enlarged"), [(8, 16), (8, 21), (5, 224), (32, 33)])
def test_enlarging_is_bilinear_interpolation_and_so_is_its_gradient(size: int, enlarged: int) -> None:
    ours = torch.rand(3, 2, size, size, generator=torch.Generator().manual_seed(1), requires_grad=True)
    theirs = ours.detach().clone().requires_grad_()
    weights = torch.rand(3, 2, enlarged, enlarged, generator=torch.Generator().manual_seed(2))
    large = Enlarge(size, enlarged)(ours)
    expected = F.interpolate(theirs, size=(enlarged, enlarged), mode="bilinear", align_corners=False)
    assert torch.allclose(large, expected, atol=1e-6)
    (large * weights).sum().backward()
    (expected * weights).sum().backward()
    assert ours.grad is not None
    assert theirs.grad is not None
    assert torch.allclose(ours.grad, theirs.grad, rtol=1e-5, atol=1e-5 * enlarged**2 / size**2)
    assert 0 <= float(large.detach().min()) <= float(large.detach().max()) <= 1 + 1e-6


def test_a_model_enlarges_before_it_normalizes_and_keeps_its_names() -> None:
    plain, enlarging = model(name="preact_resnet18", width=None, input_size=16), model(input_size=12)
    assert plain[1][0].weight.shape[1] == 1  # preact_resnet18 takes no images of 8 pixels, but enlarged ones
    assert list(enlarging.state_dict()) == list(model().state_dict())
    large = F.interpolate(IMAGES, size=(12, 12), mode="bilinear", align_corners=False)
    expected = enlarging[1].eval()((large - 0.4) / 0.3)
    assert torch.allclose(enlarging.eval()(IMAGES), expected, atol=1e-5)


def test_a_model_does_not_shrink_images() -> None:
    with pytest.raises(SpecError, match=r"expected at least 16, the images' own size, got model.input_size=8"):
        build_model(ModelSpec(input_size=8), in_channels=1, image_size=16, classes=4, mean=(0.4,), std=(0.3,), seed=0)


def test_an_enlarging_model_has_the_layers_of_its_input_size() -> None:
    """Its linear layer fits the enlarged images: of 16 pixels as a model of images of 16 pixels has it."""
    at_16, enlarged = (
        build_model(
            ModelSpec(width=4, input_size=16),
            in_channels=1,
            image_size=size,
            classes=10,
            mean=(0.4,),
            std=(0.3,),
            seed=0,
        )
        for size in (16, 8)
    )
    assert all(torch.equal(tensor, enlarged.state_dict()[name]) for name, tensor in at_16.state_dict().items())
