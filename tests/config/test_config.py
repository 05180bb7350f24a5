"""The configuration: what is refused and how, routes against the table of the design, YAML and overrides."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanopd.config import (
    POLICIES,
    EngineConfig,
    WorkerConfig,
    allowed_routes,
    check_devices,
    load_config,
    routes_for_policy,
)
from nanopd.errors import ConfigError
from nanopd.messages import Role, Route

P, D, M = Role.PREFILL, Role.DECODE, Role.MIXED
ROLES = st.lists(st.sampled_from([P, D, M]), min_size=1, max_size=6)


def workers(*roles: str) -> list[dict[str, str]]:
    return [{"device": "cpu", "role": role} for role in roles]


# overrides of a good configuration, the field that the error names, and a part of what it says is allowed
BAD_VALUES = [
    ({"model": None}, "model", "directory"),
    ({"model": ""}, "model", "directory"),
    ({"model": 7}, "model", "directory"),
    ({"tokenizer": ""}, "tokenizer", "null"),
    ({"tokenizer": ["t"]}, "tokenizer", "null"),
    ({"dtype": "float64"}, "dtype", "bfloat16"),
    ({"dtype": None}, "dtype", "auto"),
    ({"load_format": "gguf"}, "load_format", "safetensors"),
    ({"policy": "fastest"}, "policy", "round_robin"),
    ({"policy": ["collocated"]}, "policy", "round_robin"),
    ({"policy": "collocated", "workers": workers("prefill", "decode")}, "policy", "disaggregated"),
    ({"policy": "disaggregated", "workers": workers("mixed")}, "policy", "collocated"),
    ({"policy": "disaggregated", "workers": workers("prefill", "prefill")}, "policy", "none"),
    ({"policy": "disaggregated", "workers": workers("decode")}, "policy", "none"),
    ({"policy": "round_robin", "workers": workers("decode", "decode")}, "policy", "none"),
    ({"workers": []}, "workers", "non-empty"),
    ({"workers": None}, "workers", "non-empty"),
    ({"workers": "cpu"}, "workers", "non-empty"),
    ({"workers": {"device": "cpu"}}, "workers", "non-empty"),
    ({"workers": ["cpu"]}, "workers.0", "mapping"),
    ({"workers": [*workers("mixed"), {"device": "cpu", "roll": "mixed"}]}, "workers.1 key", "did you mean role?"),
    ({"workers": [{"device": "cuda"}]}, "workers.0.device", "cuda:N"),
    ({"workers": [{"device": "cuda:-1"}]}, "workers.0.device", "cuda:N"),
    ({"workers": [{"device": "cuda:0 "}]}, "workers.0.device", "cuda:N"),
    ({"workers": [{"device": "gpu:0"}]}, "workers.0.device", "cpu"),
    ({"workers": [{"device": 0}]}, "workers.0.device", "cpu"),
    ({"workers": [{"device": "cpu", "role": "both"}]}, "workers.0.role", "prefill, decode, mixed"),
    ({"workers": [{"device": "cpu", "role": None}]}, "workers.0.role", "mixed"),
    ({"workers": [{"device": "cpu", "count": 0}]}, "workers.0.count", ">= 1"),
    ({"workers": [{"device": "cpu", "count": "two"}]}, "workers.0.count", ">= 1"),
    ({"block_size": 0}, "block_size", ">= 1"),
    ({"block_size": 16.0}, "block_size", "integer"),
    ({"block_size": True}, "block_size", "integer"),
    ({"num_blocks": 1}, "num_blocks", ">= 2, or null"),
    ({"num_blocks": "all"}, "num_blocks", "integer"),
    ({"max_num_seqs": 0}, "max_num_seqs", ">= 1"),
    ({"max_num_seqs": None}, "max_num_seqs", "integer"),
    ({"max_model_len": 1}, "max_model_len", ">= 2, or null"),
    ({"max_model_len": "4k"}, "max_model_len", "integer"),
    ({"max_num_batched_tokens": 0}, "max_num_batched_tokens", ">= 1"),
    ({"max_num_batched_tokens": -5}, "max_num_batched_tokens", ">= 1"),
    ({"gpu_memory_utilization": 0}, "gpu_memory_utilization", "> 0"),
    ({"gpu_memory_utilization": 1.01}, "gpu_memory_utilization", "<= 1"),
    ({"gpu_memory_utilization": "90%"}, "gpu_memory_utilization", "number"),
    ({"gpu_memory_utilization": float("nan")}, "gpu_memory_utilization", "finite"),
    ({"transfer": "nixl"}, "transfer", "shm"),
    ({"transfer": "shm", "workers": [{"device": "cuda:0"}]}, "transfer", "auto, ipc or relay"),
    ({"transfer": "ipc"}, "transfer", "auto, relay or shm"),
    ({"transfer": "ipc", "workers": [{"device": "cuda:0"}, {}]}, "transfer", "on the CPU"),
    ({"params": 3}, "params", "shipped"),
    ({"slo": "ttft=200"}, "slo", "tpot_ms"),
    ({"slo": {"ttft": 200}}, "slo key", "did you mean ttft_ms?"),
    ({"slo": {"ttft_ms": 0}}, "slo.ttft_ms", "above 0"),
    ({"slo": {"tpot_ms": "10"}}, "slo.tpot_ms", "milliseconds"),
    ({"admission": "maybe"}, "admission", "reject"),
    ({"admission": "reject", "slo": {"ttft_ms": 200}}, "admission", "adaptive"),
    ({"admission": "reject", "policy": "adaptive"}, "admission", "slo"),
    ({"policy": "adaptive", "workers": workers("decode")}, "policy", "none"),
    ({"verify_transfers": 1}, "verify_transfers", "true or false"),
    ({"steps_in_flight": 0}, "steps_in_flight", "from 1 to 4"),
    ({"steps_in_flight": 5}, "steps_in_flight", "from 1 to 4"),
    ({"handover_timeout_s": 0}, "handover_timeout_s", "> 0"),
    ({"enable_prefix_caching": 1}, "enable_prefix_caching", "true or false"),
    ({"handover_timeout_s": float("inf")}, "handover_timeout_s", "finite"),
    ({"start_timeout_s": "600s"}, "start_timeout_s", "number"),
    ({"seed": -1}, "seed", "from 0"),
    ({"seed": 2**64}, "seed", "from 0"),
    ({"seed": None}, "seed", "integer"),
    ({"polciy": "collocated"}, "config key", "did you mean policy?"),
    ({"max_batched_tokens": 1}, "config key", "did you mean max_num_batched_tokens?"),
    ({3: 1}, "config key", "model"),
]


@pytest.mark.parametrize(("overrides", "field", "allowed"), BAD_VALUES, ids=[str(row[0])[:60] for row in BAD_VALUES])
def test_bad_value_names_field_value_and_allowed(overrides: dict, field: str, allowed: str) -> None:
    with pytest.raises(ConfigError) as caught:
        EngineConfig.from_dict({"model": "m", **overrides})
    assert caught.value.field == field
    assert allowed in caught.value.allowed
    assert repr(caught.value.value) in str(caught.value)
    assert pickle.loads(pickle.dumps(caught.value)).field == field


def test_defaults_are_one_mixed_cpu_worker_collocated() -> None:
    config = EngineConfig(model="m")
    assert (config.policy, config.workers) == ("collocated", (WorkerConfig("cpu", M),))


def test_workers_from_mappings() -> None:
    entries = [{"device": "cuda:1", "role": "prefill"}, {"device": "cpu", "role": "decode", "count": 2}, {}]
    config = EngineConfig.from_dict({"model": "m", "policy": "round_robin", "workers": entries})
    cpu_decode = WorkerConfig("cpu", D)
    assert config.workers == (WorkerConfig("cuda:1", P), cpu_decode, cpu_decode, WorkerConfig("cpu", M))
    assert [worker.cuda_index for worker in config.workers] == [1, None, None, None]
    assert config.roles == [P, D, D, M]


def test_paths_are_taken_as_models(tmp_path: Path) -> None:
    assert EngineConfig.from_dict({"model": tmp_path, "tokenizer": tmp_path}).model == str(tmp_path)


def test_replace_validates_the_whole() -> None:
    config = EngineConfig(model="m")
    assert config.replace(seed=3, workers=workers("mixed", "mixed")).roles == [M, M]
    assert config.seed == 0
    with pytest.raises(ConfigError, match="policy"):
        config.replace(workers=workers("prefill", "decode"))
    with pytest.raises(ConfigError, match="did you mean seed"):
        config.replace(sead=3)


def test_config_crosses_processes() -> None:
    config = EngineConfig(model="m", workers=(WorkerConfig("cpu", P), WorkerConfig("cpu", D)), policy="disaggregated")
    assert pickle.loads(pickle.dumps(config)) == config


def test_missing_devices() -> None:
    config = EngineConfig.from_dict({"model": "m", "workers": [{"device": "cpu"}, {"device": "cuda:1"}]})
    check_devices(config, num_gpus=2)
    with pytest.raises(ConfigError, match=r"workers\.1\.device='cuda:1' .* allowed: cpu, cuda:0$"):
        check_devices(config, num_gpus=1)
    check_devices(config.replace(policy="disaggregated"), num_gpus=2)


# ------------------------------------------------------------------------------------------------------ routes

# the table of design page: may be p of (p, d), may be d of (p, d), may be w of (w, w)
TABLE = {P: (True, False, False), D: (False, True, False), M: (True, True, True)}


def by_table(roles: list[Role]) -> list[Route]:
    routes = []
    for p, role_p in enumerate(roles):
        for d, role_d in enumerate(roles):
            if TABLE[role_p][2] if p == d else TABLE[role_p][0] and TABLE[role_d][1]:
                routes.append(Route(p, d))
    return routes


@given(ROLES)
def test_allowed_routes_are_those_of_the_table(roles: list[Role]) -> None:
    assert allowed_routes(roles) == by_table(roles)


@given(ROLES, st.sampled_from(POLICIES))
def test_a_policy_is_refused_exactly_where_it_has_no_route(roles: list[Role], policy: str) -> None:
    wanted = {"collocated": [True], "disaggregated": [False]}.get(policy, [True, False])
    routes = [route for route in by_table(roles) if (route.prefill_worker == route.decode_worker) in wanted]
    assert routes_for_policy(policy, roles) == routes
    values = {"model": "m", "policy": policy, "workers": workers(*(role.value for role in roles))}
    if routes:
        assert EngineConfig.from_dict(values).roles == roles
    else:
        with pytest.raises(ConfigError, match="policy"):
            EngineConfig.from_dict(values)


# -------------------------------------------------------------------------------------------- YAML and overrides

YAML = """
model: m
policy: round_robin
workers:
  - {device: cpu, role: mixed}
  - {device: cuda:0, role: prefill}
"""


@pytest.fixture
def yaml_file(tmp_path: Path) -> Path:
    path = tmp_path / "test.yaml"
    path.write_text(YAML, encoding="utf-8")
    return path


def test_load_with_overrides(yaml_file: Path) -> None:
    overrides = ["seed=3", "num_blocks=null", "model=a=b", "workers.0.role=decode", "gpu_memory_utilization=0.5"]
    config = load_config(yaml_file, overrides)
    assert config.workers == (WorkerConfig("cpu", D), WorkerConfig("cuda:0", P))
    assert (config.seed, config.num_blocks, config.model, config.gpu_memory_utilization) == (3, None, "a=b", 0.5)
    assert load_config(yaml_file, ["workers=[{device: cpu, count: 3}]"]).roles == [M, M, M]
    assert load_config(yaml_file, ["seed=3"], seed=4, model="other").seed == 4


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed", "allowed: key=value"),
        ("=3", "allowed: key=value"),
        ("seed=", "seed=None .* integer"),
        ("seed=[", "valid YAML"),
        ("sead=3", "did you mean seed"),
        ("workers.2.role=decode", "--set"),
        ("workers.first.role=decode", "--set"),
        ("workers.0.roll=decode", "did you mean role"),
        ("model.name=x", "--set"),
        ("nowhere.role=x", "--set"),
    ],
)
def test_bad_override(yaml_file: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(yaml_file, [override])


def test_repeated_override_is_refused(yaml_file: Path) -> None:
    with pytest.raises(ConfigError, match="seed only once"):
        load_config(yaml_file, ["seed=1", "seed=2"])


@pytest.mark.parametrize(("text", "message"), [("- a", "mapping"), ("", "mapping"), ("a: [", "valid YAML")])
def test_bad_file(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        load_config(path)


def test_shipped_configs_are_found_by_name_and_valid() -> None:
    config = load_config("cpu-demo")
    assert load_config("cpu-demo.yaml") == config
    assert [str(route) for route in routes_for_policy(config.policy, config.roles)] == ["0->0", "0->1", "1->0", "1->1"]
    for path in (Path(__file__).parents[2] / "configs").glob("*.yaml"):
        load_config(path)


def test_unknown_name_lists_the_shipped_configs() -> None:
    with pytest.raises(ConfigError, match=r"'cpu-dem' .*cpu-demo"):
        load_config("cpu-dem")
