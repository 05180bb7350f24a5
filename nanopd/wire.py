"""The codec of the wire messages of messages.py: flat arrays to bytes, and views of the bytes back.

Reads the layout from the annotations of the classes: int fields, then annotated arrays. Knows neither what they mean
nor where the bytes go. Both ends are of one machine and one program: no versions, native byte order.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import cache
from operator import attrgetter
from typing import TypeAlias, get_args, get_type_hints

import numpy as np

from nanopd.errors import NanopdError
from nanopd.messages import FromWorker, ToWorker

Message: TypeAlias = ToWorker | FromWorker

KINDS: dict[type, int] = {cls: kind for kind, cls in enumerate(get_args(Message), 1)}

ALIGNMENT = 8  # bytes; what the largest item, SLOT_INIT's seed, needs
PADDING = [bytes(-nbytes % ALIGNMENT) for nbytes in range(ALIGNMENT)]  # by bytes beyond the last full item


class WireError(NanopdError, ValueError):
    """Bytes that are no message, or arrays that do not fit their section."""


def encode(message: Message) -> bytes:
    """The bytes of `message`. Raises WireError for an array of another dtype than its section's."""
    layout = _layout(KINDS[type(message)])
    values = layout.get_fields(message)
    arrays = values[layout.num_header :]
    parts = [layout.prefix.pack(layout.kind, *values[: layout.num_header], *[array.size for array in arrays])]
    for array, dtype in zip(arrays, layout.dtypes):
        if array.dtype != dtype:
            raise WireError(f"{layout.cls.__name__}: an array of {array.dtype} in a section of {dtype}")
        if array.size:
            parts += array.tobytes(), PADDING[array.nbytes % ALIGNMENT]
    return b"".join(parts)


def decode(data: memoryview | bytes) -> Message:
    """The message that `data` is. Its arrays, all 1-D, are views into `data`, which has to stay as it is.

    Raises WireError if the kind is unknown or the lengths do not add up.
    """
    view = memoryview(data)
    layout = _layout(struct.unpack_from("=q", view)[0] if view.nbytes >= 8 else None)
    if view.nbytes < layout.prefix.size:
        raise WireError(f"{layout.cls.__name__}: {view.nbytes} bytes, its header alone has {layout.prefix.size}")
    _, *words = layout.prefix.unpack_from(view)
    counts = words[layout.num_header :]
    _check_size(layout, counts, view.nbytes)
    arrays = []
    offset = layout.prefix.size
    for count, dtype in zip(counts, layout.dtypes):
        arrays.append(np.frombuffer(view, dtype, count, offset))
        offset = _padded(offset + count * dtype.itemsize)
    return layout.cls(*words[: layout.num_header], *arrays)


@dataclass(frozen=True, slots=True)
class _Layout:
    """What the codec needs of one class, worked out once."""

    cls: type
    kind: int
    num_header: int
    prefix: struct.Struct  # kind, header, one count per section
    dtypes: tuple[np.dtype, ...]
    get_fields: attrgetter  # the values of the header, then the arrays of the sections


def sections(cls: type) -> dict[str, np.dtype]:
    """The arrays of a class of messages, in the order of the wire."""
    return {
        name: hint.__metadata__[0] for name, hint in get_type_hints(cls, include_extras=True).items() if hint is not int
    }


@cache
def _layout(kind: int | None) -> _Layout:
    for cls, number in KINDS.items():
        if kind == number:
            names, arrays = list(get_type_hints(cls)), sections(cls)
            num_header = len(names) - len(arrays)
            assert names[num_header:] == list(arrays), f"{cls.__name__}: the arrays do not stand last"
            prefix = struct.Struct(f"={1 + len(names)}q")
            return _Layout(cls, number, num_header, prefix, tuple(arrays.values()), attrgetter(*names))
    known = ", ".join(f"{number} ({cls.__name__})" for cls, number in KINDS.items())
    raise WireError(f"message kind {kind!r} is unknown; known: {known}")


def _check_size(layout: _Layout, counts: list[int], nbytes: int) -> None:
    expected = layout.prefix.size
    for count, dtype in zip(counts, layout.dtypes):
        expected += _padded(count * dtype.itemsize)
    if expected != nbytes or (counts and min(counts) < 0):
        raise WireError(f"{layout.cls.__name__}: {nbytes} bytes, but section lengths {counts} make {expected}")


def _padded(nbytes: int) -> int:
    return (nbytes + ALIGNMENT - 1) & -ALIGNMENT
