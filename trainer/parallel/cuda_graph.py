"""CUDA graphs: the kernels of a function are recorded once for each shape of its inputs, and then launched all at once.

That pays where a model is so small that the GPU waits for the host.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

from ..errors import RunError

Call = Callable[[], Tensor]


class Recorder(Protocol):
    """What makes a graph of a call."""

    def warm_up(self, call: Call) -> Tensor:
        """Make the call itself, under the circumstances in which it will be recorded."""
        ...

    def record(self, call: Call) -> Call:
        """Note the kernels that the call launches, without running one. The function that is returned runs them all, on
        the memory that they had, and returns the tensor that the call returned, with new values."""
        ...


class CUDARecorder:
    """Records on a stream of its own, and graphs that are replayed one at a time, on one stream, share their memory."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def warm_up(self, call: Call) -> Tensor:
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            result = call()
        current.wait_stream(self._stream)
        return result

    def record(self, call: Call) -> Call:
        graph = torch.cuda.CUDAGraph()
        # Only this thread's calls may not wait meanwhile: others write a checkpoint or encode the next step.
        try:
            with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
                result = call()
        except RuntimeError as error:  # that of ending the record may hide the one before it
            first = error.__context__ if isinstance(error.__context__, RuntimeError) else error
            if isinstance(first, torch.OutOfMemoryError):
                raise first from None
            why = str(first).strip().partition("\n")[0]
            raise RunError(f"parallel.cuda_graph: the passes cannot be recorded ({why}); set it to false") from error

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay


class CUDAGraphs:
    """Calls `function` with nested tuples of tensors, whose shapes tell which graph is replayed.

    The first call of each shape is made as it is: it compiles, allocates and fills caches, which no graph could. The
    second one is recorded, with inputs of its own, into which those of every later call are copied. Whatever else
    `function` reads or writes must stay where it is, and what it computes on the host is computed no more. A result
    holds until the next call.
    """

    def __init__(self, function: Callable[..., Tensor], recorder: Recorder) -> None:
        self._function = function
        self._recorder = recorder
        self._graphs: dict[Any, tuple[list[Tensor], Call] | None] = {}
        """By shape; None where the first call was made and nothing is recorded yet."""

    def __call__(self, *inputs: Any) -> Tensor:
        tensors, structure = tree_flatten(inputs)
        shape = str(structure), *((each.shape, each.dtype) for each in tensors)
        if shape not in self._graphs:
            self._graphs[shape] = None
            return self._recorder.warm_up(lambda: self._function(*inputs))
        if self._graphs[shape] is None:
            own = tree_map(torch.clone, inputs)
            self._graphs[shape] = tree_flatten(own)[0], self._recorder.record(lambda: self._function(*own))
        graph = self._graphs[shape]
        assert graph is not None
        own_tensors, replay = graph
        for own_tensor, tensor in zip(own_tensors, tensors, strict=True):
            own_tensor.copy_(tensor)
        return replay()
