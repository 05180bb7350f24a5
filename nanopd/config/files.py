"""Where configuration files lie: configs/ of the checkout, or the package data `nanopd.configs` once installed.

Owns names and paths only. The contents are read by engine_config.py (engines), checkpoints/ (shapes of models) and
routing/ (parameters of cost models).
"""

from __future__ import annotations

from pathlib import Path

from nanopd.errors import ConfigError


def config_dir() -> Path:
    """The directory of the shipped configurations."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def find_config(name_or_path: str | Path) -> Path:
    """The YAML file of that path, or of that name (with or without .yaml) among the shipped configurations.

    Raises:
        ConfigError: there is no such file; names the shipped ones.
    """
    path = Path(name_or_path)
    shipped = config_dir()
    for candidate in (path, shipped / path, shipped / f"{path}.yaml"):
        if candidate.is_file():
            return candidate
    names = sorted(file.stem for file in shipped.glob("*.yaml"))
    raise ConfigError("config", str(name_or_path), f"the path of a YAML file, or one of {', '.join(names)}")
