"""The codec `shared` in NumPy: a worker's integers; the definition is that of `common.codecs.shared`."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from common.codecs import BlockScales, Float32, RandomKey
from common.codecs.blocks import Blocks
from common.codecs.scales import bucket_scales
from tests.codecs.numpy_reference.codecs import draw_levels


def fields(
    values: Float32, start: int, key: RandomKey, blocks: Blocks, bits: int, shared: BlockScales | None
) -> NDArray[np.int32]:
    """Levels under the shared scales, with the signs of the values."""
    scales = bucket_scales(blocks.numbers(start, len(values)), start, shared)
    levels = draw_levels(values, start, key, blocks, scales, 2 ** (bits - 1) - 1)
    return np.where(values < 0, -levels, levels)
