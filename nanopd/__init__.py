"""nanopd: a prefill/decode disaggregated LLM inference engine for one machine.

The public names, imported on first use (PEP 562): `import nanopd` alone loads neither torch nor transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nanopd.config import EngineConfig, WorkerConfig
    from nanopd.errors import (
        ConfigError,
        FieldError,
        NanopdError,
        RequestError,
        UnsupportedModelError,
        WorkerError,
    )
    from nanopd.frontend.async_llm import AsyncLLM, AsyncRequest
    from nanopd.frontend.llm import LLM, RequestHandle
    from nanopd.frontend.outputs import CompletionOutput, RequestOutput, RequestOutputDelta
    from nanopd.messages import Role, Route
    from nanopd.request import BeamSearchParams, SamplingParams

__version__ = "0.1.0"

_HOMES = {
    "nanopd.frontend.async_llm": ("AsyncLLM", "AsyncRequest"),
    "nanopd.config": ("EngineConfig", "WorkerConfig"),
    "nanopd.errors": (
        "ConfigError",
        "FieldError",
        "NanopdError",
        "RequestError",
        "UnsupportedModelError",
        "WorkerError",
    ),
    "nanopd.frontend.llm": ("LLM", "RequestHandle"),
    "nanopd.messages": ("Role", "Route"),
    "nanopd.request": ("BeamSearchParams", "SamplingParams"),
    "nanopd.frontend.outputs": ("CompletionOutput", "RequestOutput", "RequestOutputDelta"),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "LLM",
    "AsyncLLM",
    "AsyncRequest",
    "BeamSearchParams",
    "CompletionOutput",
    "ConfigError",
    "EngineConfig",
    "FieldError",
    "NanopdError",
    "RequestError",
    "RequestHandle",
    "RequestOutput",
    "RequestOutputDelta",
    "Role",
    "Route",
    "SamplingParams",
    "UnsupportedModelError",
    "WorkerConfig",
    "WorkerError",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'nanopd' has no attribute {name!r}")
    return getattr(import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
