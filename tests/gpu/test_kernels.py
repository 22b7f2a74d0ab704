"""The Triton kernels give the bytes and bits of the CPU's codec: one table of cases, interpreted and on a GPU."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from common.codecs import Encoded, make_codec
from common.codecs.gpu import available
from common.config import CodecSpec, ScaleNorm
from common.errors import CodecError
from tests.gpu.conftest import ROOT, SECONDS, Outcome
from tests.gpu.programs import BAD_BLOCK, BAD_ELEMENTS, noise, other_values
from tests.gpu.table import CASES, Case

pytestmark = pytest.mark.timeout(SECONDS)

every_case = pytest.mark.parametrize("case", CASES.values(), ids=str)


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype == np.float32 and np.array_equal(a.view(np.int32), b.view(np.int32))


@every_case
def test_encoding_has_the_bytes_of_the_cpu(case: Case, outcome: Outcome) -> None:
    expected, got = case.encoded(), outcome(str(case))
    assert same_bits(got["scales"], expected.scales)
    assert got["payload"].tobytes() == bytes(expected.payload)


@every_case
def test_decoding_has_the_bits_of_the_cpu(case: Case, outcome: Outcome) -> None:
    for name, add in (("added", True), ("set", False)):
        if add or case.is_set:
            expected = case.decoded(case.encoded(), other_values(case.n), add=add)
            assert same_bits(outcome(str(case))[name], expected), name


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8, 16])
def test_every_received_field_is_decoded_as_on_the_cpu(bits: int, outcome: Outcome) -> None:
    scales, payload = noise(bits)
    expected = np.zeros(8 * payload.size // bits, np.float32)
    codec = make_codec(CodecSpec(bits=bits, block=64), start=0, stop=len(expected), layer_edges=(0, len(expected)))
    codec.decode(Encoded(scales=scales, payload=payload.tobytes()), 0, expected, add=False)
    assert same_bits(outcome("decoded noise")[str(bits)], expected)


@pytest.mark.parametrize(("block", "norm"), [(BAD_BLOCK, "linf"), (BAD_BLOCK, "l2"), (8192, "linf"), (8192, "l2")])
def test_scales_say_which_blocks_are_not_finite(block: int, norm: str, outcome: Outcome) -> None:
    scales = outcome("not finite")[f"{block}-{norm}"]
    assert set(np.flatnonzero(~np.isfinite(scales))) == {index // block for index in BAD_ELEMENTS}


def test_what_does_not_fit_together_is_refused() -> None:
    from common.codecs.gpu.randomized import decode, encode

    values, scales, payload = torch.zeros(128), torch.zeros(2), torch.zeros(128, dtype=torch.uint8)
    form = {"block": 64, "bits": 8, "norm": ScaleNorm.LINF, "scales": scales, "payload": payload}
    with pytest.raises(CodecError, match=r"expected a start at a multiple of the block.*got start=8 \(block=64\)"):
        encode(values, 8, (1, 2), **form)
    with pytest.raises(CodecError, match="expected 2 to 8, or 16, got bits=9"):
        encode(values, 0, (1, 2), **form | {"bits": 9})
    with pytest.raises(CodecError, match=r"expected .*float32 of shape \(2,\), got scales=torch.float32\[1\]"):
        encode(values, 0, (1, 2), **form | {"scales": scales[:1]})
    with pytest.raises(CodecError, match=r"expected .*uint8 of shape \(64,\), got payload=torch.uint8\[128\]"):
        decode(scales, payload, 0, values, block=64, bits=4, add=True)
    with pytest.raises(CodecError, match=r"expected .*float32 of shape \(128,\), got values=torch.float64"):
        decode(scales, payload, 0, values.double(), block=64, bits=8, add=True)
    with pytest.raises(CodecError, match=r"expected contiguous .*, got values=torch.float32\[128\]"):
        encode(torch.zeros(256)[::2], 0, (1, 2), **form)


def test_kernels_are_not_available_on_the_cpu() -> None:
    assert not available(torch.device("cpu"))


def test_codecs_can_be_imported_without_torch_and_triton() -> None:
    code = "import sys; sys.modules['torch'] = sys.modules['triton'] = None; import common.codecs, common.codecs.gpu"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)
