"""What brings a number to the host, refused."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# Their results' sizes, or values, are known to the host only when the device has come to them.
_WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal")


class NoWait(TorchDispatchMode):
    """Within it every operation fails for which a host would wait for a GPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._overloadpacket.__name__
        assert not any(name == each or name.startswith(("unique", "_unique")) for each in _WAITING), name
        if name in ("index", "index_put", "index_put_"):
            assert all(index is None or index.dtype != torch.bool for index in args[1]), f"{name} by a mask"
        return func(*args, **(kwargs or {}))
