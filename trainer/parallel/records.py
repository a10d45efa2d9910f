"""A pickle read as data: records of what it names and with which arguments. Nothing is imported, made or called."""

import io
import pickle
from collections.abc import Callable, Collection
from typing import Any, ClassVar

# What torch.distributed.checkpoint and torch.save write of tensors (protocols 4 and 2). Without sets, and with keys of
# one kind alone: the hash of tuples that hold one another many times over takes for ever.
_OPCODES = (
    "PROTO FRAME STOP MARK MEMOIZE BINGET LONG_BINGET BINPUT NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 "
    "BINUNICODE SHORT_BINUNICODE EMPTY_TUPLE TUPLE1 TUPLE2 TUPLE3 TUPLE EMPTY_LIST APPEND APPENDS EMPTY_DICT SETITEM "
    "SETITEMS STACK_GLOBAL GLOBAL NEWOBJ REDUCE BUILD BINPERSID"
)


class Record:
    """One object of the pickle. kind: the full name of its class, or of the function that would have made it. args:
    what it would have been made of; state: what it would have been given afterwards.

    Where a pickle names a class alone, as it does torch.float32, there is a subclass of Record with that kind.
    """

    kind = ""
    args: tuple[Any, ...]
    state: Any

    def __new__(cls, *args: Any) -> "Record":
        record = super().__new__(cls)
        record.args, record.state = args, {}
        return record

    def __setstate__(self, state: Any) -> None:
        self.state = state


# Python's own unpickler and not C's: there an opcode of five bytes takes 64 GiB (the index of a memo).
class _Unpickler(pickle._Unpickler):  # pyright: ignore[reportPrivateUsage]
    dispatch: ClassVar[dict[int, Any]] = {
        getattr(pickle, name)[0]: pickle._Unpickler.dispatch[getattr(pickle, name)[0]]  # pyright: ignore[reportPrivateUsage]
        for name in _OPCODES.split()
    }

    def __init__(self, data: bytes, allowed: Callable[[str], bool]) -> None:
        super().__init__(io.BytesIO(data))
        self._allowed = allowed
        self._kinds: dict[str, type[Record]] = {}

    def find_class(self, module: str, name: str) -> type[Record]:
        kind = f"{module}.{name}"
        if kind not in self._kinds:
            if not self._allowed(kind):
                raise pickle.UnpicklingError(f"{kind} has no place in it")
            self._kinds[kind] = type(name, (Record,), {"kind": kind})
        return self._kinds[kind]

    def persistent_load(self, pid: Any) -> Any:
        return pid

    def load_setitem(self) -> None:
        self._check_keys(self.stack[-2:-1])  # pyright: ignore[reportAttributeAccessIssue]
        super().load_setitem()  # pyright: ignore[reportAttributeAccessIssue]

    def load_setitems(self) -> None:
        self._check_keys(self.stack[::2])  # pyright: ignore[reportAttributeAccessIssue]
        super().load_setitems()  # pyright: ignore[reportAttributeAccessIssue]

    def _check_keys(self, keys: Collection[Any]) -> None:
        if not all(isinstance(key, str | Record) for key in keys):
            raise pickle.UnpicklingError("a key is neither text nor an object")

    dispatch[pickle.SETITEM[0]] = load_setitem
    dispatch[pickle.SETITEMS[0]] = load_setitems


def read_records(data: bytes, allowed: Callable[[str], bool]) -> Any:
    """The root of a pickle: dicts, lists, tuples, text, numbers, and Records for all else. allowed: whether a full name
    such as "os.system" may occur. Raises pickle.UnpicklingError."""
    try:
        return _Unpickler(data, allowed).load()
    except pickle.UnpicklingError:
        raise
    except Exception as error:  # Python's unpickler trusts its input: any error of a damaged one
        raise pickle.UnpicklingError(f"it is damaged ({type(error).__name__}: {error})") from None
