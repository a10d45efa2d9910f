"""What the loop reads: the reader's steps, encoded beside the training step, and begun anew where the run goes back.

The encoding has a CUDA stream of its own on a GPU, and a thread where it computes on the CPU.
"""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from data.batch import Batch

from ..step import Encoded, MicroBatch

T = TypeVar("T")
# First data step -> (data step, this rank's micro-batches) from there on, endless.
Batches = Callable[[int], Iterator[tuple[int, list[Batch]]]]
MicroBatches = Callable[[int], Iterator[tuple[int, list[MicroBatch]]]]


class Background:
    """Does work in the order in which it is handed in, one piece at a time, and in the same order on all ranks.

    device: of the results. in_thread: the work computes on the host, so a thread does it.
    """

    def __init__(self, device: torch.device, in_thread: bool) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._thread = ThreadPoolExecutor(1, "background") if in_thread else None

    def begin(self, work: Callable[[], T]) -> Callable[[], T]:
        """Begin some work. The function that is returned waits for it and gives its result, whose tensors are ready
        for the CUDA stream that is current where it is called.

        On a GPU the work starts after everything that was launched before this call, and runs beside what is launched
        after it. The host waits for the GPU in neither function.
        """
        stream = self._stream
        launched_before = None if stream is None else torch.cuda.current_stream(stream.device).record_event()

        def on_own_stream() -> tuple[T, torch.Event | None]:
            if stream is None or launched_before is None:
                return work(), None
            with torch.cuda.stream(stream):
                stream.wait_event(launched_before)
                return work(), stream.record_event()

        if self._thread is not None:
            wait = self._thread.submit(on_own_stream).result
        else:
            begun = on_own_stream()

            def wait() -> tuple[T, torch.Event | None]:
                return begun

        def result() -> T:
            made, ready = wait()
            if ready is not None and stream is not None:
                current = torch.cuda.current_stream(stream.device)
                current.wait_event(ready)
                for leaf in tree_leaves(made):
                    # Its memory belongs to the other stream, which would use it again as soon as the last reference
                    # is gone, though this stream may not have read it yet.
                    if isinstance(leaf, Tensor) and leaf.is_cuda:
                        leaf.record_stream(current)
            return made

        return result


def prefetch(batches: Batches, begin: Callable[[Batch], Callable[[], Encoded]], ahead: int) -> MicroBatches:
    """The steps of `batches`, each micro-batch with its encoding. Before a step is handed out, the encoding of the
    `ahead` steps after it has begun.

    begin: starts to encode a micro-batch; the function that it returns waits for the result.
    """

    def prefetched(first_step: int) -> Iterator[tuple[int, list[MicroBatch]]]:
        begun: deque[tuple[int, list[MicroBatch]]] = deque()
        try:
            for step, micro_batches in batches(first_step):
                begun.append((step, [MicroBatch(batch, begin(batch)) for batch in micro_batches]))
                if len(begun) > ahead:
                    yield begun.popleft()
        finally:
            # Steps that nobody wants any more. They are waited for, because whoever closes this stream to read
            # elsewhere starts reader processes next, and a process must not be forked while a thread computes.
            for _, left_over in begun:
                for micro_batch in left_over:
                    with suppress(Exception):  # whatever failed, nobody asked for it
                        micro_batch.encoded()

    return prefetched


def follow(batches: Callable[[int], Iterator[tuple[int, T]]], wanted: Callable[[], int]) -> Iterator[T]:
    """What the reader gives for the data step that is wanted, endless; it seeks where that is not the next one.

    batches: first data step -> (data step, its micro-batches) from there on. wanted: asked for each step anew.
    """
    while True:
        for number, micro_batches in batches(wanted()):
            yield micro_batches
            if wanted() != number + 1:
                break
