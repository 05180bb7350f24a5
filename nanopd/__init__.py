"""nanopd: a prefill/decode disaggregated LLM inference engine for one machine.

The public names are imported on first use (PEP 562): `import nanopd` alone loads neither torch nor transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # `X as X` tells type checkers that X is exported (PEP 484), where `__all__` is not a literal
    from nanopd.config import EngineConfig as EngineConfig, WorkerConfig as WorkerConfig
    from nanopd.errors import ConfigError as ConfigError, FieldError as FieldError, NanopdError as NanopdError
    from nanopd.errors import RequestError as RequestError, UnsupportedModelError as UnsupportedModelError
    from nanopd.errors import WorkerError as WorkerError
    from nanopd.frontend.async_llm import AsyncLLM as AsyncLLM, AsyncRequest as AsyncRequest
    from nanopd.frontend.llm import LLM as LLM, RequestHandle as RequestHandle
    from nanopd.frontend.outputs import CompletionOutput as CompletionOutput, RequestOutput as RequestOutput
    from nanopd.frontend.outputs import RequestOutputDelta as RequestOutputDelta
    from nanopd.messages import Role as Role, Route as Route
    from nanopd.request import BeamSearchParams as BeamSearchParams, SamplingParams as SamplingParams

__version__ = "0.1.0"

_NAMES = {  # the module of each public name
    "nanopd.config": "EngineConfig WorkerConfig",
    "nanopd.errors": "ConfigError FieldError NanopdError RequestError UnsupportedModelError WorkerError",
    "nanopd.frontend.async_llm": "AsyncLLM AsyncRequest",
    "nanopd.frontend.llm": "LLM RequestHandle",
    "nanopd.frontend.outputs": "CompletionOutput RequestOutput RequestOutputDelta",
    "nanopd.messages": "Role Route",
    "nanopd.request": "BeamSearchParams SamplingParams",
}
_HOME_OF = {name: module for module, names in _NAMES.items() for name in names.split()}

__all__ = list(_HOME_OF)


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'nanopd' has no attribute {name!r}")
    return getattr(import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
