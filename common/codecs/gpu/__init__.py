"""The GPU side of the codecs: Triton kernels that give the same bytes as the CPU, and transfers beside the main stream.

`randomized.py` holds the host side of the kernels in `kernels.py`, `transfer.py` the way of a bucket between a device
and the network, `queues.py` the streams beside the main one. Importing this package needs neither torch nor Triton; its
modules need both (`queues.py` only torch), so that servers, which have neither, must not import them.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def available(device: torch.device) -> bool:
    """True if the kernels run on this device: it is CUDA's, not ROCm's (whose rounding nobody checked), with Triton."""
    if device.type != "cuda" or find_spec("triton") is None:
        return False
    from torch import version

    return version.cuda is not None
