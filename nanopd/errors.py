"""The errors a caller of nanopd may meet. Every one of them is a NanopdError."""

from __future__ import annotations

from collections.abc import Iterable


class NanopdError(Exception):
    """Base of all errors that nanopd raises on purpose."""


class FieldError(NanopdError, ValueError):
    """A value that is not allowed, with the name of its field and what is allowed.

    `allowed` is a text, or the allowed values, which become a text.
    """

    def __init__(self, field: str, value: object, allowed: str | Iterable[object]) -> None:
        self.field = field
        self.value = value
        self.allowed = allowed if isinstance(allowed, str) else ", ".join(map(str, allowed))
        super().__init__(f"{field}={value!r} is not allowed; allowed: {self.allowed}")

    def __reduce__(self) -> tuple:
        return type(self), (self.field, self.value, self.allowed)


class ConfigError(FieldError):
    """A configuration that cannot be served; raised before any process is spawned."""


class RequestError(FieldError):
    """A request that cannot be served; raised at submission, before any work."""


class UnsupportedModelError(FieldError):
    """A checkpoint that nanopd cannot run; `allowed` says what it can run."""


class WorkerError(NanopdError):
    """A worker process that failed to start, or died; with its traceback if it could send one."""

    def __init__(self, worker: int, reason: str, traceback: str | None = None) -> None:
        self.worker = worker
        self.reason = reason
        self.traceback = traceback
        super().__init__(f"worker {worker}: {reason}" + (f"\n{traceback}" if traceback else ""))

    def __reduce__(self) -> tuple:
        return type(self), (self.worker, self.reason, self.traceback)
