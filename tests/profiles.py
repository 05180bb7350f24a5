"""How many examples a property gets: a multiple of what the hypothesis profile says (conftest.py)."""

from __future__ import annotations

from typing import Any

from hypothesis import settings


def examples(factor: float, **more: Any) -> settings:
    return settings(max_examples=max(1, round(factor * settings.default.max_examples)), **more)
