"""The codecs once more, in NumPy: the reference of all kernels, byte for byte. `make_reference` is its `make_codec`.

Slower than the kernels and faster than the scalar reference in `tests/codecs/reference.py`, against which it is tested.
It checks nothing: it is for values that the kernels accept.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from common.codecs import Codec
from common.codecs.blocks import Blocks, EdgedBlocks, FixedBlocks
from common.config import CodecName, CodecSpec
from tests.codecs.numpy_reference.codecs import NumpyBf16, NumpyFp16, NumpyNone, NumpyPaper, NumpyRandomized
from tests.codecs.numpy_reference.fixed import NumpyRotated, NumpyShared, NumpySign, NumpyTopk


def make_reference(spec: CodecSpec, *, start: int, stop: int, layer_edges: Sequence[int]) -> Codec:
    """`common.codecs.make_codec` in NumPy."""
    if spec.name is CodecName.PAPER:
        return NumpyPaper(start=start, stop=stop, bits=spec.bits, wire_name=f"paper/{spec.bits}")
    if spec.name in (CodecName.ROTATED, CodecName.SHARED, CodecName.SIGN, CodecName.TOPK):
        return _of_fixed_blocks(spec, start, stop)
    if spec.name is not CodecName.RANDOMIZED:
        return {CodecName.NONE: NumpyNone, CodecName.FP16: NumpyFp16, CodecName.BF16: NumpyBf16}[spec.name]()
    blocks: Blocks
    if isinstance(spec.block, int):
        blocks = FixedBlocks(start=start, stop=stop, length=spec.block)
    else:
        blocks = EdgedBlocks.of_layers(start, stop, layer_edges if spec.block == "layer" else ())
    wire_name = f"randomized/{spec.bits}/{spec.block}/{spec.scale}"
    return NumpyRandomized(blocks=blocks, bits=spec.bits, norm=spec.scale, wire_name=wire_name)


def _of_fixed_blocks(spec: CodecSpec, start: int, stop: int) -> Codec:
    block = spec.block
    assert isinstance(block, int)
    if spec.name is CodecName.SIGN:
        return NumpySign(start=start, stop=stop, block=block, wire_name=f"sign/{block}")
    if spec.name is CodecName.TOPK:
        density = Fraction(spec.density).limit_denominator(1 << 16)
        wire_name = f"topk/{density.numerator}:{density.denominator}/{block}"
        return NumpyTopk(start=start, stop=stop, block=block, density=density, wire_name=wire_name)
    make = NumpyRotated if spec.name is CodecName.ROTATED else NumpyShared
    return make(start=start, stop=stop, block=block, bits=spec.bits, wire_name=f"{spec.name}/{spec.bits}/{block}")
