"""Codecs: `make_codec` builds the one that a job spec names.

`base.py` is the contract. There is a file per family, which defines its bytes; `cpu/` holds the kernels that make them.
"""

from __future__ import annotations

from collections.abc import Sequence

from common.codecs.base import SERVER, BlockScales, Bytes, Codec, Encoded, Float32, RandomKey
from common.codecs.blocks import Blocks, EdgedBlocks, FixedBlocks
from common.codecs.floats import Bf16Codec, Fp16Codec, NoneCodec
from common.codecs.paper import PaperCodec
from common.codecs.randomized import RandomizedCodec
from common.codecs.randomness import MAXIMAL_ELEMENTS
from common.config import BlockName, CodecName, CodecSpec
from common.errors import CodecError, refusal

__all__ = [
    "SERVER",
    "BlockScales",
    "Bytes",
    "Codec",
    "Encoded",
    "Float32",
    "RandomKey",
    "make_codec",
]


def make_codec(spec: CodecSpec, *, start: int, stop: int, layer_edges: Sequence[int]) -> Codec:
    """Builds the codec of one direction; encoder and decoder are built with the same arguments.

    Args:
        spec: which codec, and its parameters.
        start, stop: the range of the flat vector that ONE encoder sees whole: a worker [0, d), a server its shard.
        layer_edges: flat indices between which the layers lie, 0, ..., d; for `block: layer`.

    Raises:
        CodecError: no range within 2^32 elements.
    """
    if not 0 <= start <= stop <= MAXIMAL_ELEMENTS:
        raise CodecError(refusal("a range within [0, 2^32]", "range", f"[{start}, {stop})"))
    if spec.name is CodecName.NONE:
        return NoneCodec()
    if spec.name is CodecName.FP16:
        return Fp16Codec()
    if spec.name is CodecName.BF16:
        return Bf16Codec()
    if spec.name is CodecName.PAPER:
        return PaperCodec(start=start, stop=stop, bits=spec.bits, wire_name=f"{spec.name}/{spec.bits}")
    wire_name = f"{spec.name}/{spec.bits}/{spec.block}/{spec.scale}"
    blocks = _blocks(spec.block, start, stop, layer_edges)
    return RandomizedCodec(blocks=blocks, bits=spec.bits, norm=spec.scale, wire_name=wire_name)


def _blocks(block: int | BlockName, start: int, stop: int, layer_edges: Sequence[int]) -> Blocks:
    if isinstance(block, int):
        return FixedBlocks(start=start, stop=stop, length=block)
    return EdgedBlocks.of_layers(start, stop, layer_edges if block is BlockName.LAYER else ())
