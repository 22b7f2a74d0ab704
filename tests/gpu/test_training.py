"""Trainings whose gradients lie on a device give the parameters of those on the host."""

from __future__ import annotations

from functools import cache
from unittest.mock import patch

import pytest
import torch

from tests.gpu.conftest import SECONDS, Outcome
from tests.gpu.trainings import KERNEL_CODEC, ROUNDS, Checked, beside, checked, train
from tests.local import support as local
from tests.support import job

pytestmark = pytest.mark.timeout(SECONDS)

CPU = torch.device("cpu")
CODECS = [("codec.name=none",), KERNEL_CODEC, ("codec.block=layer", "codec.two_sided=true"), ("codec.name=topk",)]
every_codec = pytest.mark.parametrize("codec", CODECS, ids=" ".join)


@cache
def on_the_host(codec: tuple[str, ...]) -> list[list[str]]:
    return train(codec, CPU)


@every_codec
def test_buckets_pushed_from_hooks_out_of_a_devices_memory_train_the_same_parameters(codec: tuple[str, ...]) -> None:
    digests = train(codec, CPU, beside(kernels=False))
    assert digests == on_the_host(codec)
    assert digests[0] == digests[1]
    assert len(set(digests[0])) == ROUNDS


def test_kernels_train_the_same_parameters(interpreted: Outcome) -> None:
    assert interpreted("digests with kernels")["digests"].tolist() == on_the_host(KERNEL_CODEC)


@pytest.mark.parametrize("codec", [("codec.block=64",), ("codec.block=all", "codec.two_sided=true")], ids=" ".join)
def test_local_processes_exchange_their_slices_out_of_a_devices_memory(codec: tuple[str, ...]) -> None:
    spec = job("workers=1", *local.SMALL, *local.ATTACK, *codec)
    ((one, other),) = local.train(spec, [2], rounds=2)
    with patch("worker.trainer.gradient_memory", beside(kernels=False)):
        ((here, there),) = local.train(spec, [2], rounds=2)
    assert len({share.replica_digest for share in (one, other, here, there)}) == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here: nothing is trained on one")
@every_codec
def test_on_a_gpu_every_byte_of_a_training_is_that_of_the_cpus_codec(codec: tuple[str, ...]) -> None:
    made: list[Checked] = []
    digests = train(codec, torch.device("cuda"), checked(made))
    assert digests[0] == digests[1]
    assert len(set(digests[0])) == ROUNDS
    for memory in made:
        assert memory.decoded >= 2 * ROUNDS
        assert memory.encoded == (0 if codec == ("codec.name=topk",) else memory.decoded)  # whose residual encodes
