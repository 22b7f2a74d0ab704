"""The codecs once more, in NumPy: the reference of all kernels, byte for byte. `make_reference` is its `make_codec`.

Slower than the kernels and faster than the scalar reference in `tests/codecs/reference.py`, against which it is tested.
It checks nothing: it is for values that the kernels accept.
"""

from __future__ import annotations

from collections.abc import Sequence

from common.codecs import Codec
from common.codecs.blocks import Blocks, EdgedBlocks, FixedBlocks
from common.config import CodecName, CodecSpec
from tests.codecs.numpy_reference.codecs import NumpyBf16, NumpyFp16, NumpyNone, NumpyPaper, NumpyRandomized


def make_reference(spec: CodecSpec, *, start: int, stop: int, layer_edges: Sequence[int]) -> Codec:
    """`common.codecs.make_codec` in NumPy."""
    if spec.name is CodecName.PAPER:
        return NumpyPaper(start=start, stop=stop, bits=spec.bits, wire_name=f"paper/{spec.bits}")
    if spec.name is not CodecName.RANDOMIZED:
        return {CodecName.NONE: NumpyNone, CodecName.FP16: NumpyFp16, CodecName.BF16: NumpyBf16}[spec.name]()
    blocks: Blocks
    if isinstance(spec.block, int):
        blocks = FixedBlocks(start=start, stop=stop, length=spec.block)
    else:
        blocks = EdgedBlocks.of_layers(start, stop, layer_edges if spec.block == "layer" else ())
    wire_name = f"randomized/{spec.bits}/{spec.block}/{spec.scale}"
    return NumpyRandomized(blocks=blocks, bits=spec.bits, norm=spec.scale, wire_name=wire_name)
