"""A CPU's stand-in for the recorder of CUDA graphs: it notes operations with the tensors that they have, undoes them,
and makes them again on the same memory, with nothing that the host computes."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from tests.helpers.host_sync import NoWait


class TapeRecorder:
    """See trainer.parallel.cuda_graph.Recorder. replays: how often each graph ran."""

    def __init__(self) -> None:
        self.warm_ups = 0
        self.replays: list[int] = []

    def warm_up(self, call: Callable[[], Tensor]) -> Tensor:
        self.warm_ups += 1
        return call()

    def record(self, call: Callable[[], Tensor]) -> Callable[[], Tensor]:
        tape, number = _Tape(), len(self.replays)
        self.replays.append(0)
        with tape:
            result = call()
        tape.undo()

        def replay() -> Tensor:
            self.replays[number] += 1
            tape.replay()
            return result

        return replay


class _Tape(NoWait):
    """Refuses what would bring a number to the host: no graph can hold it."""

    def __init__(self) -> None:
        super().__init__()
        self._operations: list[tuple[Any, Any, Any, list[Tensor]]] = []
        self._made: set[int] = set()  # memory of results
        self._before: dict[int, tuple[Tensor, Tensor]] = {}  # tensors from outside that were written to, and copies

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for number, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                for tensor in tree_leaves(args[number] if number < len(args) else kwargs[argument.name]):
                    self._keep(tensor)
        out = super().__torch_dispatch__(func, types, args, kwargs)
        made = [each.detach() for each in tree_leaves(out) if isinstance(each, Tensor)]
        self._operations.append((func, args, kwargs, made))
        if not func.is_view:
            self._made |= {_memory(each) for each in made}
        return out

    def _keep(self, tensor: Tensor) -> None:
        if _memory(tensor) not in self._made and _memory(tensor) not in self._before:
            self._before[_memory(tensor)] = tensor.detach(), tensor.detach().clone()

    def undo(self) -> None:
        """Recording runs nothing on a GPU."""
        for tensor, before in self._before.values():
            tensor.copy_(before)

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, made in self._operations:
            if func.is_view:
                continue  # of memory that is written anew
            out = [each for each in tree_leaves(func(*args, **kwargs)) if isinstance(each, Tensor)]
            for old, new in zip(made, out, strict=True):
                if _memory(old) != _memory(new):
                    old.copy_(new)


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
