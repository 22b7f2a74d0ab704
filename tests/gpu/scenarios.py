"""What transfers have to withstand, run on a machine of `queues.py`; each scenario returns arrays to be compared."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.codecs.gpu.transfer import Bucket, DeviceDecoder, DeviceEncoder
from common.config import ScaleNorm
from common.errors import CodecError
from tests.gpu.programs import Arrays, Program, other_values
from tests.gpu.queues import HostQueue, Machine, machines
from tests.gpu.table import KEY, gaussian

D = 64 * 40 + 13
BLOCK, BITS, BUCKET = 64, 5, 448
EDGES = (*range(0, D, BUCKET), D)
SPANS = tuple(pairwise(EDGES))
"""Buckets, the last one cut short by the end of the vector."""


def gradient_values() -> np.ndarray:
    return gaussian(D, seed=1)


def encoder_of(machine: Machine, norm: str = "linf") -> DeviceEncoder:
    form = {"elements": BUCKET, "block": BLOCK, "bits": BITS, "norm": ScaleNorm(norm)}
    return DeviceEncoder(machine.device, queue=machine.side, **form)


def decoder_of(machine: Machine) -> DeviceDecoder:
    return DeviceDecoder(machine.device, elements=BUCKET, block=BLOCK, bits=BITS, depth=2, queue=machine.side)


def computed(machine: Machine, gradient: Tensor, values: np.ndarray, a: int, b: int) -> Any:
    """Has the current stream compute a part of the gradient; the event after it."""
    source = torch.from_numpy(values.copy()).to(machine.device)
    machine.current.run(lambda: gradient[a:b].copy_(source[a:b]))
    return machine.current.mark()


def encoded_buckets(machine: Machine, *, with_events: bool) -> list[Bucket]:
    """Encodes a gradient bucket by bucket while it is computed."""
    encoder = encoder_of(machine)
    gradient = torch.zeros(D, device=machine.device)
    buckets = []
    for a, b in SPANS:
        final = computed(machine, gradient, gradient_values(), a, b)
        buckets.append(encoder.encode(gradient[a:b], a, KEY.words(), final=final if with_events else None))
    return buckets


def encode_as_computed(machine: Machine) -> Arrays:
    """Every bucket is begun before the first one is fetched; they are fetched in another order."""
    arrays = {}
    for with_events in (True, False):
        buckets = encoded_buckets(machine, with_events=with_events)
        for number in (*range(1, len(SPANS), 2), *range(0, len(SPANS), 2)):
            scales, payload = buckets[number].result()
            arrays[f"{with_events} scales {number}"] = scales.copy()
            arrays[f"{with_events} payload {number}"] = payload.copy()
    if isinstance(machine.side, HostQueue):
        arrays["kept"] = np.array([len(tensor) for tensor in machine.side.kept])
    return arrays


def decode_in_a_ring(machine: Machine) -> Arrays:
    """More buckets than staging buffers, whose host memory is overwritten as soon as `decode` returns."""
    received = [tuple(part.copy() for part in b.result()) for b in encoded_buckets(machine, with_events=True)]
    arrays = {}
    for name, add in (("added", True), ("set", False)):
        decoder = decoder_of(machine)
        gradient = torch.zeros(D, device=machine.device)
        seen = torch.zeros(D, device=machine.device)
        computed(machine, gradient, other_values(D), 0, D)
        for (scales, payload), (a, b) in zip(received, SPANS, strict=True):
            passed_scales, passed_payload = scales.copy(), bytearray(payload)
            ready = machine.current.mark() if a else None
            decoder.decode(passed_scales, passed_payload, a, gradient[a:b], add=add, ready=ready)
            passed_scales[:], passed_payload[:] = np.nan, bytes(len(passed_payload))
        decoder.finish()
        machine.current.run(lambda seen=seen, gradient=gradient: seen.copy_(gradient))
        machine.current.mark().synchronize()
        arrays[name] = seen.cpu().numpy()
    if isinstance(machine.side, HostQueue):
        arrays["kept"] = np.array([len(tensor) for tensor in machine.side.kept])
    return arrays


def reuse_memory(machine: Machine) -> Arrays:
    """A bucket's views stay as they are until its release; then their memory serves the next bucket."""
    encoder = encoder_of(machine)
    gradient = torch.from_numpy(gradient_values()).to(machine.device)
    begun = [encoder.encode(gradient[a:b], a, KEY.words()) for a, b in SPANS[:1]]
    kept_scales, kept_payload = begun[0].result()
    before = kept_payload.copy()
    begun += [encoder.encode(gradient[a:b], a, KEY.words()) for a, b in SPANS[1:3]]
    addresses = [bucket.result()[1].ctypes.data for bucket in begun]
    arrays = {"before": before, "after": kept_payload.copy(), "scales": kept_scales.copy()}
    begun[0].release()
    begun[0].release()
    begun += [encoder.encode(gradient[a:b], a, KEY.words()) for a, b in SPANS[3:5]]
    addresses += [bucket.result()[1].ctypes.data for bucket in begun[3:]]
    try:
        begun[0].result()
    except RuntimeError as error:
        arrays["released"] = np.array(str(error))
    return arrays | {"addresses": np.array(addresses)}


def refuse_values(machine: Machine) -> Arrays:
    """NaN, infinity, and an l2 norm beyond float32; the encoder goes on afterwards."""
    arrays = {}
    for name, norm, bad in (("nan", "linf", np.nan), ("infinity", "l2", -np.inf), ("overflow", "l2", 3e38)):
        encoder = encoder_of(machine, norm)
        values = gradient_values()
        values[[BUCKET + 70, BUCKET + 71]] = bad
        gradient = torch.from_numpy(values).to(machine.device)
        refused = encoder.encode(gradient[BUCKET : 2 * BUCKET], BUCKET, KEY.words())
        try:
            refused.result()
        except CodecError as error:
            arrays[name] = np.array(str(error))
        scales, payload = encoder.encode(gradient[:BUCKET], 0, KEY.words()).result()
        arrays |= {f"{name} scales": scales.copy(), f"{name} payload": payload.copy()}
    if isinstance(machine.side, HostQueue):
        arrays["pinned"] = np.array(machine.side.pinned)
    return arrays


def _on(name: str, scenario: Callable[[Machine], Arrays]) -> Program:
    return lambda device: scenario(machines(device)[name])


SCENARIOS = (encode_as_computed, decode_in_a_ring, reuse_memory, refuse_values)
HOST_MACHINES = ("late", "at once")
SCENARIO_PROGRAMS = {
    f"{scenario.__name__} {name}": _on(name, scenario) for scenario in SCENARIOS for name in (*HOST_MACHINES, "streams")
}
