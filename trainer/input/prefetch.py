"""Work beside the training step: on a stream of its own on a GPU, in a thread for a module on the CPU."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

T = TypeVar("T")


class Prefetcher:
    """Begins work in the order in which it is handed in, one piece at a time, and on all ranks alike.

    device: of the results. in_thread: the host computes, so a thread does.
    """

    def __init__(self, device: torch.device, in_thread: bool) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._thread = ThreadPoolExecutor(1, "ahead") if in_thread else None

    def begin(self, work: Callable[[], T]) -> Callable[[], T]:
        """Begin; the function that comes back gives the result, tensors ready for the stream that asks for them.

        The GPU waits for what was launched before, not for what is launched from now on; the host waits for no GPU.
        """
        stream = self._stream
        before = None if stream is None else torch.cuda.current_stream(stream.device).record_event()

        def beside() -> tuple[T, torch.Event | None]:
            if stream is None or before is None:
                return work(), None
            with torch.cuda.stream(stream):
                stream.wait_event(before)
                return work(), stream.record_event()

        if self._thread is not None:
            wait = self._thread.submit(beside).result
        else:
            begun = beside()

            def wait() -> tuple[T, torch.Event | None]:
                return begun

        def take() -> T:
            result, ready = wait()
            if ready is not None and stream is not None:
                current = torch.cuda.current_stream(stream.device)
                current.wait_event(ready)
                for leaf in tree_leaves(result):
                    if isinstance(leaf, Tensor) and leaf.is_cuda:
                        leaf.record_stream(current)  # else its memory is used again as soon as it is let go of
            return result

        return take
