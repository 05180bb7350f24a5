"""The settings of an engine and the shape of its model."""

# `X as X` tells type checkers that X is exported (PEP 484)
from nanopd.config.engine_config import DTYPES as DTYPES, LEVELS as LEVELS, MAX_STEPS_IN_FLIGHT as MAX_STEPS_IN_FLIGHT
from nanopd.config.engine_config import POLICIES as POLICIES, PREDICTING as PREDICTING
from nanopd.config.engine_config import EngineConfig as EngineConfig, WorkerConfig as WorkerConfig
from nanopd.config.engine_config import allowed_routes as allowed_routes, routes_for_policy as routes_for_policy
from nanopd.config.engine_config import check_devices as check_devices, load_config as load_config
from nanopd.config.kv_layout import KVLayout as KVLayout
from nanopd.config.model_config import ITEMSIZES as ITEMSIZES, ModelConfig as ModelConfig, RopeScaling as RopeScaling
from nanopd.config.worker_spec import WorkerSpec as WorkerSpec
