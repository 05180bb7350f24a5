"""Work that a worker has begun, whose loop asks whether it is done."""

from __future__ import annotations

from typing import Protocol

from nanopd.messages import FromWorker


class Pending(Protocol):
    """Work under way."""

    def is_done(self) -> bool:
        """Asked again and again until it is true. The work may use each call to go on."""

    def result(self) -> FromWorker | None:
        """To be called once, when the work is done; None: the parent need not be told."""


class Done:
    """Work that was done at once."""

    def __init__(self, result: FromWorker | None) -> None:
        self._result = result

    def is_done(self) -> bool:
        return True

    def result(self) -> FromWorker | None:
        return self._result
