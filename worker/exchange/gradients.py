"""Where a worker's gradient lies while it is exchanged: on the host, or on a GPU, with its buckets out and back.

    HostGradient    the exchange works in the gradient's own memory
    DeviceGradient  beside the stream that computes, bucket by bucket. Out: kernels encode it (codec `randomized` with
                    blocks of a number of elements), or it is copied to pinned memory for a codec of the CPU. Back:
                    kernels decode the average (if that is encoded so, too), or it is copied from pinned memory.

What has to be true of the order on a device, and who sees to it:

    a bucket is final before it is read              `final` takes the event that says when; `out` waits for it
    the host reads what has been copied to it        `fetch` and `encode` wait
    a bucket has been read before it is replaced     `back` waits for that event of `out`, and for nothing else: the
                                                     backward pass goes on meanwhile
    averages are there before they are used          `settle`: the stream that computes waits for `back`
    pinned memory has been copied from before it is  the next round's bucket is final after `settle`, and the host has
      written to again                               waited for its copy, or its bytes, when it gets the next average
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Iterable
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from common.codecs import BlockScales, Bytes, Codec, Encoded, Float32, RandomKey
from common.codecs.gpu import available
from common.codecs.gpu.queues import Event, Queue, SideStream
from common.config import CodecName, CodecSpec, JobSpec
from common.layout import Bucket, BucketKind, Layout

if TYPE_CHECKING:  # they need Triton, which is not everywhere
    from common.codecs.gpu.transfer import Bucket as EncodedBucket
    from common.codecs.gpu.transfer import DeviceDecoder, DeviceEncoder

WHOLE = slice(None)


class GradientMemory(Protocol):
    """A gradient that becomes the average of all workers', in place.

    In a round: `begin`; for each bucket `final`, then `encode` or `fetch`, then `decode` or `store`; at last `settle`.
    Buckets go their ways independently. `final` may come from any thread; one thread encodes and fetches, one decodes
    and stores.
    """

    def begin(self, key: RandomKey) -> None:
        """A round begins: no bucket is final.

        Args:
            key: of this round's encodings.
        """
        ...

    def final(self, numbers: Iterable[int]) -> None:
        """What the caller's current stream has been given makes the gradient buckets among these final.

        Returns at once.
        """
        ...

    def start(self) -> None:
        """Starts what can go on by itself with all buckets that are final; on the thread that encodes."""
        ...

    def fetch(self, bucket: Bucket) -> Float32:
        """Waits for the final values of a bucket: float32 of shape (n,), the memory of `room`."""
        ...

    def whole(self) -> Float32:
        """Waits for all buckets, which are final: float32 of shape (d,)."""
        ...

    def encode(self, codec: Codec, bucket: Bucket, measured: BlockScales | None, payload: Bytes) -> Encoded:
        """Waits for a bucket and encodes it; see `Codec.encode`.

        Raises:
            CodecError: as `Codec.encode`.
        """
        ...

    def decode(self, codec: Codec, bucket: Bucket, encoded: Encoded, key: RandomKey) -> None:
        """Replaces a bucket by an average that has been checked; see `Codec.decode`."""
        ...

    def room(self, bucket: Bucket) -> Float32:
        """Where the host puts the average of a bucket: float32 of shape (n,), followed by `store`."""
        ...

    def store(self, bucket: Bucket) -> None:
        """Replaces a bucket by the average in its `room`."""
        ...

    def settle(self) -> None:
        """What the caller's current stream is given next sees all averages."""
        ...


class HostGradient:
    """A gradient in the host's memory.

    Args:
        vector: float32 of shape (d,).
    """

    def __init__(self, vector: Float32) -> None:
        self._vector = vector
        self._key = RandomKey(seed=0, round=0, source=0)

    def begin(self, key: RandomKey) -> None:
        """See `GradientMemory`."""
        self._key = key

    def final(self, numbers: Iterable[int]) -> None:
        """See `GradientMemory`: who says so has computed them."""

    def start(self) -> None:
        """See `GradientMemory`."""

    def fetch(self, bucket: Bucket) -> Float32:
        """See `GradientMemory`."""
        return self._vector[bucket.start : bucket.stop]

    room = fetch

    def whole(self) -> Float32:
        """See `GradientMemory`."""
        return self._vector

    def encode(self, codec: Codec, bucket: Bucket, measured: BlockScales | None, payload: Bytes) -> Encoded:
        """See `GradientMemory`."""
        return codec.encode(self.fetch(bucket), bucket.start, self._key, measured, payload=payload)

    def decode(self, codec: Codec, bucket: Bucket, encoded: Encoded, key: RandomKey) -> None:
        """See `GradientMemory`."""
        codec.decode(encoded, bucket.start, self.fetch(bucket), add=False, key=key)

    def store(self, bucket: Bucket) -> None:
        """See `GradientMemory`."""

    def settle(self) -> None:
        """See `GradientMemory`."""


class DeviceGradient:
    """A gradient on a device.

    Args:
        gradient: float32 of shape (d,), there for as long as this is.
        layout: how it is cut.
        out, back: two queues of the device's own: what leaves must not hold up what comes back.
        part: of the vector that is exchanged, whole buckets; others are passed over.
        kernels: the codec of the job, if its kernels are to be used, as far as there are any.
    """

    def __init__(
        self,
        gradient: Tensor,
        layout: Layout,
        *,
        out: Queue,
        back: Queue,
        part: slice = WHOLE,
        kernels: CodecSpec | None = None,
    ) -> None:
        self._gradient = gradient
        self._out, self._back = out, back
        self._part = range(layout.d)[part]
        self._own = {b.number: b for b in layout.of_kind(BucketKind.GRADIENT) if b.start in self._part}
        self._key = RandomKey(seed=0, round=0, source=0)
        self._final: deque[tuple[Bucket, Event]] = deque()  # whose append and pop are atomic
        self._read: dict[int, Event] = {}  # by bucket: after which its values have left
        self._under_way: dict[int, EncodedBucket] = {}
        self._encoder: DeviceEncoder | None = None
        self._decoder: DeviceDecoder | None = None
        if kernels is not None and has_kernels(kernels):
            self._use_kernels(kernels, max((bucket.n for bucket in self._own.values()), default=0))
        self._pinned: Tensor | None = None
        if self._encoder is None or self._decoder is None:
            self._pinned = self._new_mirror()

    def _use_kernels(self, codec: CodecSpec, elements: int) -> None:
        from common.codecs.gpu.transfer import DeviceDecoder, DeviceEncoder

        assert isinstance(codec.block, int)
        device, form = self._gradient.device, {"elements": elements, "block": codec.block, "bits": codec.bits}
        self._encoder = DeviceEncoder(device, norm=codec.scale, queue=self._out, **form)
        if codec.two_sided:
            self._decoder = DeviceDecoder(device, queue=self._back, **form)

    def warm(self) -> None:
        """Has the kernels compiled, which takes seconds a first time, by one thread and before the first round."""
        for n in sorted({bucket.n for bucket in self._own.values()}):
            if self._encoder is not None:
                vector = torch.zeros(n, device=self._gradient.device)
                begun = self._encoder.encode(vector, 0, self._key.words())
                scales, payload = begun.result()
                if self._decoder is not None:
                    self._decoder.decode(scales, payload, 0, vector, add=False)
                begun.release()

    def begin(self, key: RandomKey) -> None:
        """See `GradientMemory`."""
        self._key = key
        self._final.clear()
        self._read.clear()

    def final(self, numbers: Iterable[int]) -> None:
        """See `GradientMemory`. It records an event and leaves the rest to `start`: backward is not held up."""
        own = [self._own[number] for number in numbers if number in self._own]
        if own:
            event = self._out.now()
            self._final.extend((bucket, event) for bucket in own)

    def start(self) -> None:
        """See `GradientMemory`."""
        while self._final:
            bucket, final = self._final.popleft()
            if self._encoder is None:
                self._copy_out(bucket, final)
            else:
                begun = self._encoder.encode(self._values(bucket), bucket.start, self._key.words(), final=final)
                self._under_way[bucket.number], self._read[bucket.number] = begun, begun.done

    def fetch(self, bucket: Bucket) -> Float32:
        """See `GradientMemory`."""
        self.start()
        if self._encoder is not None:  # which leaves no copy; somebody wants to know what is wrong with the values
            self._copy_out(bucket, self._read[bucket.number])
        self._read[bucket.number].synchronize()
        return self.room(bucket)

    def whole(self) -> Float32:
        """See `GradientMemory`."""
        self.start()
        for read in self._read.values():
            read.synchronize()
        return self._mirror.numpy()

    def encode(self, codec: Codec, bucket: Bucket, measured: BlockScales | None, payload: Bytes) -> Encoded:
        """See `GradientMemory`. Before it waits, all other buckets that are final are on their way."""
        if self._encoder is None:
            return codec.encode(self.fetch(bucket), bucket.start, self._key, measured, payload=payload)
        self.start()
        begun = self._under_way.pop(bucket.number)
        scales, packed = begun.result()
        payload[:] = packed
        encoded = Encoded(scales=scales.copy(), payload=payload)
        begun.release()
        return encoded

    def decode(self, codec: Codec, bucket: Bucket, encoded: Encoded, key: RandomKey) -> None:
        """See `GradientMemory`."""
        if self._decoder is None:
            codec.decode(encoded, bucket.start, self.room(bucket), add=False, key=key)
            self.store(bucket)
        else:
            values, read = self._values(bucket), self._read[bucket.number]
            self._decoder.decode(encoded.scales, encoded.payload, bucket.start, values, add=False, ready=read)

    def room(self, bucket: Bucket) -> Float32:
        """See `GradientMemory`."""
        return self._host(bucket).numpy()

    def store(self, bucket: Bucket) -> None:
        """See `GradientMemory`."""
        host, values = self._host(bucket), self._values(bucket)
        self._back.wait(self._read[bucket.number])
        self._back.run(lambda: values.copy_(host, non_blocking=True))
        self._back.keep(values)

    def settle(self) -> None:
        """See `GradientMemory`; the host does not wait."""
        self._back.join()

    def _copy_out(self, bucket: Bucket, after: Event) -> None:
        host, values = self._host(bucket), self._values(bucket)
        self._out.wait(after)
        self._out.run(lambda: host.copy_(values, non_blocking=True))
        self._out.keep(values)
        self._read[bucket.number] = self._out.mark()

    def _values(self, bucket: Bucket) -> Tensor:
        return self._gradient[bucket.start : bucket.stop]

    def _host(self, bucket: Bucket) -> Tensor:
        return self._mirror[bucket.start - self._part.start : bucket.stop - self._part.start]

    @property
    def _mirror(self) -> Tensor:
        """Pinned memory for the part, float32; made later only to say what is wrong with values that kernels refuse."""
        if self._pinned is None:
            self._pinned = self._new_mirror()
        return self._pinned

    def _new_mirror(self) -> Tensor:
        return self._out.on_host(4 * len(self._part)).view(torch.float32)


def has_kernels(codec: CodecSpec) -> bool:
    """Whether buckets of this codec are encoded and decoded on a GPU: scales must not span them."""
    return codec.name is CodecName.RANDOMIZED and isinstance(codec.block, int)


def gradient_memory(gradient: Tensor, layout: Layout, spec: JobSpec, part: slice = WHOLE) -> GradientMemory:
    """The memory of a gradient, wherever it lies, ready for the first round.

    Args:
        gradient: float32 of shape (d,).
        layout: how it is cut.
        spec: the job.
        part: of the vector that is exchanged.
    """
    device = gradient.device
    if device.type == "cpu":
        return HostGradient(gradient.numpy())
    out, back = SideStream(device), SideStream(device)
    if available(device):
        memory = DeviceGradient(gradient, layout, out=out, back=back, part=part, kernels=spec.codec)
        try:
            memory.warm()
            return memory
        except Exception as error:  # of any kind; most often there is no C compiler, which Triton needs
            reason = str(error).split("\n", maxsplit=1)[0]
            warnings.warn(f"buckets are encoded on the CPU: kernels do not work here: {reason}", stacklevel=2)
    return DeviceGradient(gradient, layout, out=out, back=back, part=part)
