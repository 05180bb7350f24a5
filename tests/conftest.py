"""Shared by all tests: hypothesis without deadlines (shared CI cores are slow at times), GPU tests only with a GPU."""

from __future__ import annotations

import pytest
from hypothesis import settings

settings.register_profile("nanopd", deadline=None)
settings.load_profile("nanopd")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    gpu_tests = [item for item in items if item.get_closest_marker("gpu")]
    if gpu_tests and not _has_gpu():
        for item in gpu_tests:
            item.add_marker(pytest.mark.skip(reason="no CUDA GPU"))


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()
