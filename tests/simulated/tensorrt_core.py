"""Simulated TensorRT: what both its sides share, with the quirks of the real bindings (pybind11).

Enumerations are no integers, `Dims` are no tuples and compare with tuples and lists only, unknown attributes cannot be
set, and a class to be subclassed insists that its ``__init__`` was called.
"""

from __future__ import annotations

import ctypes
import sys
import weakref
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar

import numpy as np

from tests.simulated.books import Books, Life


class BoundEnum:
    """An enumeration as pybind11 makes them: `int()` works, arithmetic and comparison with integers do not."""

    __slots__ = ("name", "value")
    __members__: ClassVar[dict[str, Any]] = {}
    name: str
    value: int

    def __new__(cls, value: int) -> Any:
        for member in cls.__members__.values():
            if member.value == value:
                return member
        raise ValueError(f"{value} is no {cls.__name__}")

    def __int__(self) -> int:
        return self.value

    __index__ = __int__

    def __hash__(self) -> int:
        return self.value

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and other.value == self.value

    def __repr__(self) -> str:
        return f"<{type(self).__name__}.{self.name}: {self.value}>"

    def __str__(self) -> str:
        return f"{type(self).__name__}.{self.name}"


def bound_enum(name: str, members: Mapping[str, int]) -> Any:
    """Make an enumeration; two names of one value are equal members."""
    kind: Any = type(name, (BoundEnum,), {"__slots__": (), "__members__": {}})
    for label, value in members.items():
        member: Any = object.__new__(kind)
        member.name, member.value = label, value
        kind.__members__[label] = member
        setattr(kind, label, member)
    return kind


Severity = bound_enum("Severity", {"INTERNAL_ERROR": 0, "ERROR": 1, "WARNING": 2, "INFO": 3, "VERBOSE": 4})
TensorIOMode = bound_enum("TensorIOMode", {"NONE": 0, "INPUT": 1, "OUTPUT": 2})
TensorLocation = bound_enum("TensorLocation", {"DEVICE": 0, "HOST": 1})
TensorFormat = bound_enum("TensorFormat", {"LINEAR": 0, "CHW2": 1, "HWC8": 2, "CHW4": 3, "CHW16": 4, "CHW32": 5})
DataType = bound_enum(
    "DataType",
    {"FLOAT": 0, "HALF": 1, "INT8": 2, "INT32": 3, "BOOL": 4, "UINT8": 5, "FP8": 6, "BF16": 7, "INT64": 8, "INT4": 9}
    | {"FP4": 10, "E8M0": 11},
)
_NUMPY = {
    DataType.FLOAT: np.float32,
    DataType.HALF: np.float16,
    DataType.INT8: np.int8,
    DataType.INT32: np.int32,
    DataType.BOOL: np.bool_,
    DataType.UINT8: np.uint8,
    DataType.INT64: np.int64,
}
DataType.itemsize = property(lambda self: np.dtype(_NUMPY[self]).itemsize if self in _NUMPY else 1 + (self.value == 7))
ALIASES = {"float32": "FLOAT", "float16": "HALF", "int8": "INT8", "int32": "INT32", "int64": "INT64", "bool": "BOOL"}
ALIASES |= {"uint8": "UINT8", "fp8": "FP8", "bfloat16": "BF16", "int4": "INT4", "fp4": "FP4"}


def nptype(trt_type: Any) -> Any:
    """Return NumPy's type; there is none for bfloat16 and the narrow ones."""
    if trt_type not in _NUMPY:
        raise TypeError("Could not resolve TensorRT datatype to an equivalent numpy datatype.")
    return _NUMPY[trt_type]


def volume(iterable: Iterable[int]) -> int:
    product = 1
    for size in iterable:
        product *= size
    return product


class Dims:
    """A shape; a sequence of integers, but no tuple."""

    __slots__ = ("_sizes",)
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, shape: Iterable[int] = ()) -> None:
        self._sizes = tuple(int(size) for size in shape)

    def __len__(self) -> int:
        return len(self._sizes)

    def __getitem__(self, index: Any) -> Any:
        return self._sizes[index]

    def __iter__(self) -> Iterator[int]:
        return iter(self._sizes)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, tuple | list):
            raise TypeError(f"__eq__(): incompatible function arguments: Dims and {type(other).__name__} (simulated)")
        return self._sizes == tuple(other)

    def __repr__(self) -> str:
        return repr(self._sizes)


class Insistent(type):
    """Class of those that insist on their ``__init__``, as pybind11's do."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        made = super().__call__(*args, **kwargs)
        if not getattr(made, "_ready", False):
            raise TypeError(f"tensorrt.{cls.__mro__[-2].__name__}.__init__() must be called when overriding __init__")
        return made


class ILogger(metaclass=Insistent):
    """Base of the loggers that callers write."""

    __slots__ = ("__weakref__", "_ready")
    Severity = Severity
    INTERNAL_ERROR, ERROR, WARNING = Severity.INTERNAL_ERROR, Severity.ERROR, Severity.WARNING
    INFO, VERBOSE = Severity.INFO, Severity.VERBOSE

    def __init__(self) -> None:
        self._ready = True

    def log(self, severity: Any, msg: str) -> None:
        raise RuntimeError('Tried to call pure virtual function "ILogger::log"')


class Logger(ILogger):
    """TensorRT's own logger: to standard error."""

    __slots__ = ("min_severity",)

    def __init__(self, min_severity: Any = Severity.WARNING) -> None:
        super().__init__()
        self.min_severity = min_severity

    def log(self, severity: Any, msg: str) -> None:
        if severity.value <= self.min_severity.value:
            print(f"[TRT] [{severity.name[0]}] {msg}", file=sys.stderr)


class Voice:
    """How an object logs: through its parents' logger, which it does not keep alive."""

    __slots__ = ("_books", "_logger", "life")

    def __init__(self, books: Books, logger: Any) -> None:
        if not isinstance(logger, ILogger):
            raise TypeError(f"__init__(): incompatible constructor arguments: needed an ILogger, got {logger!r}")
        strict = books.config.strict_lifetimes
        self._books, self._logger = books, weakref.ref(logger) if strict else lambda: logger
        self.life: Life = books.life_of_logger(logger)

    @property
    def logger(self) -> Any:
        return self._logger()

    def say(self, severity: Any, text: str) -> None:
        """Log; what a logger raises is told, but never reaches the caller."""
        logger = self._logger()
        if logger is None:
            self._books.violation(f"the logger was gone when TensorRT had to say: {text}")
            return
        try:
            logger.log(severity, f"[simulated] {text}")
        except Exception as exc:
            self._books.violation(f"ILogger.log raised {exc!r}")

    def error(self, text: str) -> None:
        self.say(Severity.ERROR, text)

    def warn(self, text: str) -> None:
        self.say(Severity.WARNING, text)


class IHostMemory:
    """A buffer of TensorRT's own: the buffer protocol and ``nbytes``; no length, no slices."""

    __slots__ = ()
    __len__ = __getitem__ = __setitem__ = __iter__ = None

    @property
    def nbytes(self) -> int:
        return ctypes.sizeof(self)  # type: ignore[arg-type]

    @property
    def dtype(self) -> Any:
        return DataType.INT8


def host_memory(data: bytes) -> IHostMemory:
    """Make one. A ctypes array is the only way before Python 3.12 to offer a buffer."""
    kind: Any = type("IHostMemory", (IHostMemory, ctypes.c_ubyte * len(data)), {})
    made: IHostMemory = kind.from_buffer_copy(data)
    return made
