"""The settings of an engine and the shape of its model."""

from nanopd.config.engine_config import (
    DTYPES,
    LEVELS,
    MAX_STEPS_IN_FLIGHT,
    POLICIES,
    PREDICTING,
    EngineConfig,
    WorkerConfig,
    allowed_routes,
    check_devices,
    load_config,
    routes_for_policy,
)
from nanopd.config.model_config import ModelConfig, RopeScaling

__all__ = [
    "DTYPES",
    "LEVELS",
    "MAX_STEPS_IN_FLIGHT",
    "POLICIES",
    "PREDICTING",
    "EngineConfig",
    "ModelConfig",
    "RopeScaling",
    "WorkerConfig",
    "allowed_routes",
    "check_devices",
    "load_config",
    "routes_for_policy",
]
