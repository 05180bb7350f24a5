"""What one worker of an engine is to be, as its process is told. Knows no process."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nanopd.config.engine_config import EngineConfig
from nanopd.config.model_config import ModelConfig


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """Which worker of an engine, and what all of them serve."""

    index: int
    config: EngineConfig
    model: ModelConfig
    path: Path  # of the model's files
