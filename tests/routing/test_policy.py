"""Which policy a configuration gives, and which file it predicts with."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from nanopd.config import EngineConfig, load_config
from nanopd.config.files import config_dir
from nanopd.errors import ConfigError
from nanopd.messages import Route
from nanopd.metrics import SLO
from nanopd.routing.adaptive import AdaptivePolicy
from nanopd.routing.closed_form import ClosedFormPolicy
from nanopd.routing.factory import find_parameters, make_policy
from nanopd.routing.policy import FixedPolicy

PARAMS = config_dir() / "params"
WORKERS = [{"device": "cpu", "role": role} for role in ("prefill", "mixed")]


def config(policy: str, **keys) -> EngineConfig:
    return EngineConfig(model="m", workers=WORKERS, policy=policy, **keys)


def test_every_policy_is_made_from_its_configuration() -> None:
    parameters = find_parameters("8xh200")
    fixed = make_policy(config("disaggregated"))
    assert isinstance(fixed, FixedPolicy)
    assert (fixed.routes, fixed.costs) == ([Route(0, 1)], None)
    closed = make_policy(config("closed_form"), parameters)
    assert isinstance(closed, ClosedFormPolicy)
    assert closed.routes == [Route(0, 1), Route(1, 1)]
    levels = {"ttft_ms": 200, "tpot_ms": 10.0}
    adaptive = make_policy(config("adaptive", slo=levels, admission="reject", max_num_batched_tokens=512), parameters)
    assert isinstance(adaptive, AdaptivePolicy)
    assert adaptive.routes == closed.routes
    assert (adaptive.slo, adaptive.admission, adaptive.max_chunk) == (SLO(200, 10.0), "reject", 512)
    assert adaptive.costs.parameters is parameters


def test_a_path_goes_before_what_was_measured_and_that_before_what_is_shipped(tmp_path: Path) -> None:
    mine, measured = tmp_path / "mine.json", tmp_path / "measured.json"
    shutil.copy(PARAMS / "8xh20.json", mine)
    assert "4090" in find_parameters("8x4090", measured).machine  # nothing has been measured
    shutil.copy(PARAMS / "8xh200.json", measured)
    assert "H200" in find_parameters("8x4090", measured).machine
    assert "H200" in find_parameters(None, measured).machine
    assert "H20," in find_parameters(str(mine), measured).machine
    assert "4090" in find_parameters("8x4090").machine


@pytest.mark.parametrize("name", [None, "9x4090"])
def test_no_parameters_are_an_error_that_says_what_to_do(name: str | None, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"one of 8x4090, 8xh20, 8xh200.*launch\.py profile") as error:
        find_parameters(name, tmp_path / "measured.json")
    assert (error.value.field, error.value.value) == ("params", name)


@pytest.mark.parametrize("name", ["1xh200", "2xh200", "8x4090", "8xh20"])
def test_shipped_configurations_name_their_parameters(name: str) -> None:
    assert find_parameters(load_config(name).params).model == "Qwen3-8B"
