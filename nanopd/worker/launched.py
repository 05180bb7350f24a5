"""What a worker has begun and its loop asks after."""

from __future__ import annotations

from typing import Protocol

from nanopd.messages import StepResult, TransferAck


class Launched(Protocol):
    """Something under way. Asked again and again, it may use that to go on."""

    def is_done(self) -> bool: ...

    def result(self) -> StepResult | TransferAck | None:
        """To be called once, when it is done; None: nothing to tell."""


class Done:
    """Something that was done at once."""

    def __init__(self, result: StepResult | TransferAck | None) -> None:
        self._result = result

    def is_done(self) -> bool:
        return True

    def result(self) -> StepResult | TransferAck | None:
        return self._result
