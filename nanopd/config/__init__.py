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
from nanopd.config.kv_layout import KVLayout
from nanopd.config.model_config import ITEMSIZES, ModelConfig, RopeScaling

__all__ = [
    "DTYPES",
    "ITEMSIZES",
    "LEVELS",
    "MAX_STEPS_IN_FLIGHT",
    "POLICIES",
    "PREDICTING",
    "EngineConfig",
    "KVLayout",
    "ModelConfig",
    "RopeScaling",
    "WorkerConfig",
    "allowed_routes",
    "check_devices",
    "load_config",
    "routes_for_policy",
]
