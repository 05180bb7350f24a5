"""What can be configured of an engine, validated before anything else happens.

`EngineConfig` is the whole configuration (one YAML file, or keywords of `LLM`). It is frozen, and workers get it
pickled. Knows no tensors and no processes; a YAML file is the only file that is read here.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from nanopd.config.files import find_config
from nanopd.config.kv_layout import KVLayout
from nanopd.config.model_config import ITEMSIZES, ModelConfig
from nanopd.errors import ConfigError
from nanopd.messages import Role, Route, TransferPath
from nanopd.rules import BOOLEAN, SEED, Rule, check, integer, number, one_of, optional, positive, ruled, text

PREDICTING = ("closed_form", "adaptive")  # the policies that need the parameters of a cost model
POLICIES = ("collocated", "disaggregated", "round_robin", *PREDICTING)
DTYPES = tuple(ITEMSIZES)
LEVELS = ("ttft_ms", "tpot_ms", "first_gap_ms")
MAX_STEPS_IN_FLIGHT = 4


def allowed_routes(roles: Sequence[Role]) -> list[Route]:
    """Every route that workers of these roles may serve, ordered by prefill worker, then by decode worker."""
    workers = range(len(roles))
    return [Route(p, d) for p in workers for d in workers if roles[p].may_prefill and roles[d].may_decode]


def routes_for_policy(policy: str, roles: Sequence[Role]) -> list[Route]:
    """The allowed routes that `policy` chooses from; none if the roles cannot serve it."""
    kinds = {"collocated": [True], "disaggregated": [False]}.get(policy, [True, False])
    return [route for route in allowed_routes(roles) if route.is_collocated in kinds]


DEVICE = Rule(
    lambda device: isinstance(device, str) and re.fullmatch(r"cpu|cuda:\d+", device) is not None,
    "cpu, or cuda:N with the GPU's number N",
)
WORKERS = Rule(
    lambda workers: isinstance(workers, tuple) and len(workers) > 0,
    "a non-empty list of {device: cpu or cuda:N, role: ..., count: ...}",
)
DRAFTS = integer(0, 15)
LIMITS = Rule(lambda limits: isinstance(limits, Mapping), f"a mapping of {', '.join(LEVELS)} to milliseconds")
LIMIT = Rule(positive().allows, "milliseconds, a number above 0")
WORKER = Rule(lambda entry: isinstance(entry, Mapping), "a mapping {device: cpu or cuda:N, role: ..., count: ...}")


@dataclass(frozen=True, slots=True)
class WorkerConfig:
    """One worker process: where it runs and which routes it may serve.

    Raises:
        ConfigError: an impossible device or role.
    """

    device: str = ruled("cpu", DEVICE, "where it runs")
    role: Role = ruled(Role.MIXED, one_of(*Role), "which routes it may serve")

    def __post_init__(self) -> None:
        check(self, ConfigError)
        object.__setattr__(self, "role", Role(self.role))

    @property
    def cuda_index(self) -> int | None:
        """The number of the GPU; None on the CPU."""
        return None if self.device == "cpu" else int(self.device.removeprefix("cuda:"))


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """All settings of an engine. docs/en/configuration.md says more of each key.

    `workers` may also be a list of mappings `{device, role, count}`, where `count` workers are alike.

    Raises:
        ConfigError: names the field, its value and what is allowed.
    """

    model: str = ruled(MISSING, text("a local directory, a hub id or a built-in name"), "whose weights are served")
    tokenizer: str | None = ruled(None, optional(text("a local directory or a hub id")), "null: the model's own")
    dtype: str = ruled("auto", one_of("auto", *DTYPES), "auto: the checkpoint's on a GPU, float32 on a CPU")
    load_format: str = ruled("auto", one_of("auto", "safetensors", "dummy"), "dummy: random weights")
    policy: str = ruled("collocated", one_of(*POLICIES), "how a request's route is chosen")
    params: str | None = ruled(None, optional(text("a shipped file's name, a path")), "parameters of the cost model")
    answer_lengths: str | None = ruled(None, optional(text("a path")), "file that keeps their lengths between runs")
    slo: Mapping[str, float] | None = ruled(None, optional(LIMITS), "limits that the policy adaptive tries to keep")
    admission: str = ruled("queue", one_of("queue", "reject"), "of requests that no route serves within slo")
    workers: tuple[WorkerConfig, ...] = ruled((WorkerConfig(),), WORKERS, "one process each")
    block_size: int = ruled(16, integer(1), "tokens per KV block")
    num_blocks: int | None = ruled(None, optional(integer(2)), "KV blocks per worker; null: derived from memory")
    swap_space_gb: float = ruled(0.0, number(0), "host memory per worker for blocks of preempted sequences; 0: none")
    enable_prefix_caching: bool = ruled(True, BOOLEAN, "requests with the same beginning share its KV blocks")
    max_num_seqs: int = ruled(256, integer(1), "sequences that a worker may have started")
    max_model_len: int | None = ruled(None, optional(integer(2)), "tokens, prompt and answer; null: the model's limit")
    max_num_batched_tokens: int = ruled(2048, integer(1), "tokens that a worker computes in a step, decode rows first")
    gpu_memory_utilization: float = ruled(0.9, positive(1), "share of a GPU that its workers may fill together")
    transfer: str = ruled("auto", one_of("auto", *TransferPath), "how KV blocks get from worker to worker")
    verify_transfers: bool = ruled(False, BOOLEAN, "digests of moved blocks are compared")
    steps_in_flight: int = ruled(2, integer(1, MAX_STEPS_IN_FLIGHT), "steps of a worker that are in flight at once")
    num_speculative_tokens: int = ruled(0, DRAFTS, "drafts of a sequence that a step may verify; 0: none")
    handover_timeout_s: float = ruled(
        1.0, positive(), "how long a prefilled sequence waits for room on its decode worker"
    )
    start_timeout_s: float = ruled(600.0, positive(), "how long workers may take to load")
    step_timeout_s: float = ruled(
        300.0, positive(), "how long a step or a transfer may take before its worker counts as hung"
    )
    max_restarts: int = ruled(3, integer(0), "how often each worker is replaced after it has died; 0: never")
    seed: int = ruled(0, SEED, "what the seeds of requests without one are derived from")

    def __post_init__(self) -> None:
        for name in ("model", "tokenizer", "params", "answer_lengths"):
            if isinstance(path := getattr(self, name), os.PathLike):
                object.__setattr__(self, name, os.fspath(path))
        if isinstance(self.workers, (list, tuple)):
            workers = (w for i, entry in enumerate(self.workers) for w in _parse_worker(f"workers.{i}", entry))
            object.__setattr__(self, "workers", tuple(workers))
        check(self, ConfigError)
        self._check_transfer()
        self._check_levels()
        self._check_policy()

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> EngineConfig:
        """The configuration with these keys, and defaults for the others; an unknown key is a ConfigError."""
        _check_keys("config key", values, [f.name for f in fields(cls)])
        return cls(**{"model": None, **values})

    def replace(self, **overrides: Any) -> EngineConfig:
        """A copy with these keys changed, validated as a whole."""
        return self.from_dict({f.name: getattr(self, f.name) for f in fields(self)} | overrides)

    @property
    def roles(self) -> list[Role]:
        return [worker.role for worker in self.workers]

    @property
    def may_relay(self) -> bool:
        """Whether blocks may go through the relay; where there are GPUs, only the workers find out whether they do."""
        return self.transfer == TransferPath.RELAY or any(worker.device != "cpu" for worker in self.workers)

    def max_len_of(self, model: ModelConfig) -> int:
        """The most tokens of a sequence, prompt and output: the configured limit, or else the model's own."""
        return self.max_model_len or model.max_position_embeddings

    def kv_layout(self, model: ModelConfig) -> KVLayout:
        """Of the caches of all workers, and of what is swapped out of them."""
        return KVLayout.of(model, self.block_size)

    def num_host_blocks(self, model: ModelConfig) -> int:
        """KV blocks in a worker's host memory: as many as `swap_space_gb` holds, and a null block."""
        return 1 + int(self.swap_space_gb * 1e9 // self.kv_layout(model).bytes_per_block)

    @property
    def num_slots(self) -> int:
        """Slots of a worker: one for each running sequence, and as many again for each step in flight.

        A step in flight may still name the slots of sequences that have ended.
        """
        return (1 + self.steps_in_flight) * self.max_num_seqs

    @property
    def max_decode_rows(self) -> int:
        """Decode rows of a worker's step; drafts take rows that no sequence needs, and those of one always fit."""
        return self.max_num_seqs + self.num_speculative_tokens

    def _check_transfer(self) -> None:
        on_cpu = [worker.device == "cpu" for worker in self.workers]
        if self.transfer == TransferPath.SHM and not all(on_cpu):
            raise ConfigError("transfer", self.transfer, "auto, ipc or relay, where a worker is on a GPU")
        if self.transfer == TransferPath.IPC and any(on_cpu):
            raise ConfigError("transfer", self.transfer, "auto, relay or shm, where a worker is on the CPU")

    def _check_policy(self) -> None:
        if not routes_for_policy(self.policy, self.roles):
            possible = [policy for policy in POLICIES if routes_for_policy(policy, self.roles)]
            roles = " + ".join(role.value for role in self.roles)
            raise ConfigError("policy", self.policy, f"{', '.join(possible) or 'none'} (with workers {roles})")

    def _check_levels(self) -> None:
        _check_keys("slo key", self.slo or {}, LEVELS)
        for name, limit in (self.slo or {}).items():
            LIMIT.check(f"slo.{name}", limit, ConfigError)
        if self.admission == "reject" and not (self.policy == "adaptive" and self.slo):
            raise ConfigError("admission", self.admission, "queue, where there is no policy adaptive with an slo")


def load_config(name_or_path: str | Path, overrides: Iterable[str] = (), **keys: Any) -> EngineConfig:
    """Read a YAML configuration, then apply `key=value` overrides, whose values are YAML too, then `keys`.

    The key of an override may be a path into the workers: `workers.0.role=decode`.

    Raises:
        ConfigError: no such file, not a mapping, a bad override or a bad value.
    """
    path = find_config(name_or_path)
    values = _parse_yaml("config", path.read_text(encoding="utf-8"), str(path))
    if not isinstance(values, dict):
        raise ConfigError("config", str(path), "a YAML file that holds a mapping")
    seen: set[str] = set()
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key:
            raise ConfigError("--set", override, "key=value")
        if key in seen:
            raise ConfigError("--set", override, f"{key} only once")
        seen.add(key)
        _assign(values, key, _parse_yaml(key, text, text))
    return EngineConfig.from_dict({**values, **keys})


def check_devices(config: EngineConfig, num_gpus: int) -> None:
    """Raise ConfigError for a worker whose GPU is not there."""
    for i, worker in enumerate(config.workers):
        if worker.cuda_index is not None and worker.cuda_index >= num_gpus:
            raise ConfigError(f"workers.{i}.device", worker.device, ["cpu", *(f"cuda:{n}" for n in range(num_gpus))])


def _check_keys(what: str, values: Mapping[str, Any], known: Sequence[str]) -> None:
    for key in values:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            hint = f" (did you mean {close[0]}?)" if close else ""
            raise ConfigError(what, key, ", ".join(known) + hint)


def _parse_worker(where: str, entry: Any) -> list[WorkerConfig]:
    """The workers that an entry of `workers` stands for; errors name its place, such as workers.0.role."""
    if isinstance(entry, WorkerConfig):
        return [entry]
    WORKER.check(where, entry, ConfigError)
    _check_keys(f"{where} key", entry, ["device", "role", "count"])
    keys = dict(entry)
    count = keys.pop("count", 1)
    integer(1).check(f"{where}.count", count, ConfigError)
    try:
        return [WorkerConfig(**keys)] * count
    except ConfigError as error:
        raise ConfigError(f"{where}.{error.field}", error.value, error.allowed) from None


def _parse_yaml(field_name: str, text: str, shown: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(field_name, shown, f"valid YAML ({' '.join(str(error).split())})") from None


def _assign(values: dict[str, Any], key: str, value: Any) -> None:
    """Set `values[a][b]...` for the dotted key a.b..., where numbers index lists."""
    *parents, last = key.split(".")
    node: Any = values
    try:
        for name in parents:
            node = node[int(name)] if isinstance(node, list) else node[name]
        node[int(last) if isinstance(node, list) else last] = value
    except (KeyError, IndexError, ValueError, TypeError):
        raise ConfigError("--set", f"{key}={value}", "a key, or a path into what the configuration has") from None
