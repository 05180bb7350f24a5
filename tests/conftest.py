"""Shared by all tests: how they run on two shared cores, tiers, hypothesis profiles; GPU tests only with a GPU.

Tiers: what a plain `pytest` runs; `process`, which starts worker processes or servers; `slow`. A marker expression
(`-m`) selects from all three, and a file or a test that is named on the command line runs whatever its tier.
"""

from __future__ import annotations

import os

# Before torch is imported, as worker processes do: OpenMP's default spins through whole time slices of shared cores.
os.environ.setdefault("GOMP_SPINCOUNT", "3000")

import pytest
from hypothesis import HealthCheck, settings

TIERS = ("process", "slow")

# Tests take multiples of these numbers (profiles.py). Without deadlines, as shared cores are slow at times.
_ANY_SPEED = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("dev", max_examples=50, **_ANY_SPEED)
settings.register_profile("nightly", max_examples=600, **_ANY_SPEED)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dev"))


def pytest_configure(config: pytest.Config) -> None:
    if getattr(config.option, "dist", "no") == "load":  # what `-n` takes by default: keep groups together instead
        config.option.dist = "loadgroup"


# First, as pytest-xdist's own hook reads the groups.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("process") and not item.get_closest_marker("xdist_group"):
            item.add_marker(pytest.mark.xdist_group(item.path.stem))  # a file's tests share its engines
    if not config.option.markexpr:
        _deselect_tiers(config, items)
    gpu_tests = [item for item in items if item.get_closest_marker("gpu")]
    if gpu_tests and not _has_gpu():
        for item in gpu_tests:
            item.add_marker(pytest.mark.skip(reason="no CUDA GPU"))


def _deselect_tiers(config: pytest.Config, items: list[pytest.Item]) -> None:
    named = {(config.invocation_params.dir / arg.partition("::")[0]).resolve() for arg in config.args}
    left_out = [item for item in items if item.path not in named and any(map(item.get_closest_marker, TIERS))]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in set(left_out)]


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()
