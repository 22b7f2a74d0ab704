"""What a resumed run may change: nothing that touches the parameters."""

from __future__ import annotations

import pytest
import torch

from common.errors import EXIT_CHECKPOINT, CheckpointError
from tests.support import checkpoint_of, job
from worker.datasets import load_dataset
from worker.workplace import Workplace

CPU = torch.device("cpu")
ALL = ("codec.block=all", "codec.two_sided=true")
COLLECTIVE, NONE = "exchange.topology=collective", "codec.name=none"


def resume(before: tuple[str, ...], now: tuple[str, ...]) -> Workplace:
    """What a job builds from another job's checkpoint."""
    saved, spec = (job("workers=2", "model.width=4", *settings) for settings in (before, now))
    dataset = load_dataset(spec.data, root=None)
    state = Workplace.build(saved, dataset, CPU, None, None).replica.state_tensors()
    checkpoint = checkpoint_of(saved, dataset, state, 5)
    return Workplace.build(spec, dataset, CPU, checkpoint, None)


@pytest.mark.parametrize(
    ("before", "now"),
    [
        ((), ("servers=3", "exchange.bucket_bytes=2048")),
        ((), ("exchange.topology=colocated",)),
        ((), (COLLECTIVE,)),
        (("codec.block=all",), ("codec.block=all", "servers=2")),
        ((*ALL, "servers=2"), (*ALL, "exchange.topology=colocated", "exchange.bucket_bytes=2048")),
        ((COLLECTIVE, NONE), (COLLECTIVE, NONE, "exchange.window_bytes=4096")),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_servers_and_the_exchange_may_change_where_they_change_no_sum_and_no_scale(
    before: tuple[str, ...], now: tuple[str, ...]
) -> None:
    assert resume(before, now).round == 5


@pytest.mark.parametrize(
    ("before", "now", "refused"),
    [
        ((NONE,), (COLLECTIVE, NONE), "exchange.topology=collective"),
        ((COLLECTIVE, NONE), (NONE,), "exchange.topology=dedicated"),
        ((COLLECTIVE, NONE), (COLLECTIVE, NONE, "exchange.bucket_bytes=2048"), "exchange.bucket_bytes=2048"),
        (ALL, (*ALL, "servers=2"), "servers=2"),
        (ALL, (*ALL, "exchange.topology=colocated"), "exchange.topology=colocated"),
        (("codec.block=layer", "codec.two_sided=true"), ("codec.block=layer", *ALL[1:], "servers=2"), "servers=2"),
        (("codec.name=paper", *ALL), ("codec.name=paper", *ALL, "servers=2"), "servers=2"),
        ((), ("seed=1",), "seed=1"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_a_change_of_how_gradients_are_added_or_of_what_shares_a_scale_is_another_job(
    before: tuple[str, ...], now: tuple[str, ...], refused: str
) -> None:
    with pytest.raises(CheckpointError) as caught:
        resume(before, now)
    assert f"got {refused} (a resumed run keeps its job)" in str(caught.value)
    assert caught.value.exit_code == EXIT_CHECKPOINT
