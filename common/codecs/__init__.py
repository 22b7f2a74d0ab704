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
from common.codecs.rotated import RotatedCodec
from common.codecs.shared import SharedCodec, SumCodec
from common.codecs.sign import SignCodec
from common.codecs.topk import TopkCodec, density_of
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
    "SharedCodec",
    "SumCodec",
    "make_codec",
    "make_sum_codec",
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
    if spec.name in (CodecName.ROTATED, CodecName.SHARED, CodecName.SIGN, CodecName.TOPK):
        return _of_fixed_blocks(spec, start, stop)
    wire_name = f"{spec.name}/{spec.bits}/{spec.block}/{spec.scale}"
    blocks = _blocks(spec.block, start, stop, layer_edges)
    return RandomizedCodec(blocks=blocks, bits=spec.bits, norm=spec.scale, wire_name=wire_name)


def make_sum_codec(spec: CodecSpec, workers: int) -> SumCodec:
    """Builds the codec of the sums that the servers of codec `shared` send."""
    return SumCodec(largest=workers * ((1 << (spec.bits - 1)) - 1))


def _of_fixed_blocks(spec: CodecSpec, start: int, stop: int) -> Codec:
    """Codecs whose blocks always have one length."""
    block = spec.block
    assert isinstance(block, int)  # says CodecSpec
    if spec.name is CodecName.SIGN:
        return SignCodec(start=start, stop=stop, block=block, wire_name=f"{spec.name}/{block}")
    if spec.name is CodecName.TOPK:
        density = density_of(spec.density)
        wire_name = f"{spec.name}/{density.numerator}:{density.denominator}/{block}"
        return TopkCodec(start=start, stop=stop, block=block, density=density, wire_name=wire_name)
    make = RotatedCodec if spec.name is CodecName.ROTATED else SharedCodec
    return make(start=start, stop=stop, block=block, bits=spec.bits, wire_name=f"{spec.name}/{spec.bits}/{block}")


def _blocks(block: int | BlockName, start: int, stop: int, layer_edges: Sequence[int]) -> Blocks:
    if isinstance(block, int):
        return FixedBlocks(start=start, stop=stop, length=block)
    return EdgedBlocks.of_layers(start, stop, layer_edges if block is BlockName.LAYER else ())
