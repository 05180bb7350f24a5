"""Imports go one way: which room of nanopd may import which, and what importing a part must not load."""

from __future__ import annotations

import ast
import configparser
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "nanopd"

# room (a package, or a module of the top level) -> rooms that it may import; all but the last three also `errors`
ALLOWED = {
    "__init__": {"config", "frontend", "messages", "request"},
    "cli": {"commands", "config"},
    "commands": {"__init__", "config", "frontend", "lab", "metrics", "request", "routing", "serve"},
    "serve": {"frontend", "messages", "metrics", "request"},
    "frontend": {
        "checkpoints",
        "config",
        "core",
        "engine",
        "ipc",
        "lab",
        "messages",
        "metrics",
        "request",
        "routing",
        "workers",
    },
    "lab": {
        "checkpoints",
        "config",
        "core",
        "engine",
        "ipc",
        "messages",
        "metrics",
        "request",
        "routing",
        "workers",
    },
    "engine": {"config", "core", "messages", "request", "routing", "workers"},
    "workers": {"config", "ipc", "messages", "wire"},
    "routing": {"config", "core", "messages", "metrics", "rules"},
    "core": {"config", "messages", "request"},
    "worker": {"config", "cpu", "cuda", "ipc", "messages", "models", "wire"},
    "cpu": {"models"},
    "cuda": {"config", "models"},
    "models": {"config"},
    "checkpoints": {"config"},
    "metrics": {"messages"},
    "wire": {"messages"},
    "config": {"messages", "rules"},
    "request": {"messages", "rules"},
    "messages": set(),
    "rules": set(),
    "errors": set(),
    "ipc": set(),
}
WITHOUT_ERRORS = {"cpu", "cuda", "ipc"}
# rooms that may import nothing else of other people's
THIRD_PARTY = {
    "core": {"numpy"},
    "routing": {"numpy", "scipy"},
    "ipc": {"numpy"},
    "messages": {"numpy"},
    "wire": {"numpy"},
    "errors": set(),
    "rules": set(),
    "config": {"yaml"},
    "request": set(),
    "metrics": {"numpy"},
}
MODULES = sorted(PACKAGE.rglob("*.py"))


def room_of(parts: tuple[str, ...]) -> str:
    """The room of a dotted name below nanopd; nothing below it is the package itself."""
    return parts[0] if parts else "__init__"


def imported_names(path: Path) -> Iterator[tuple[str, ...]]:
    """Every module that the file imports, anywhere in it; relative imports made absolute."""
    package = ("nanopd", *path.relative_to(PACKAGE).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield tuple(alias.name.split("."))
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = (*base, *(node.module.split(".") if node.module else ()))
            is_top = module == ("nanopd",)
            for alias in node.names:
                is_module = is_top and ((PACKAGE / alias.name).is_dir() or (PACKAGE / f"{alias.name}.py").is_file())
                yield (*module, alias.name) if is_module else module


@pytest.mark.parametrize("path", MODULES, ids=[str(path.relative_to(PACKAGE)) for path in MODULES])
def test_imports_go_one_way(path: Path) -> None:
    room = room_of(path.relative_to(PACKAGE).with_suffix("").parts)
    assert room in ALLOWED, f"{room} is a new room: say above what it may import"
    allowed = ALLOWED[room] | {room} | (set() if room in WITHOUT_ERRORS else {"errors"})
    for name in imported_names(path):
        if name[0] == "nanopd":
            assert room_of(name[1:]) in allowed, f"{path.name} of {room} must not import {'.'.join(name)}"
        elif room in THIRD_PARTY:
            known = sys.stdlib_module_names | THIRD_PARTY[room]
            assert name[0] in known, f"{path.name} of {room} must not import {name[0]}"


def test_directions_have_no_cycle() -> None:
    order: list[str] = []
    left = dict(ALLOWED)
    while left:
        free = [room for room, below in left.items() if below <= set(order)]
        assert free, f"these rooms import each other: {sorted(left)}"
        order += free
        left = {room: below for room, below in left.items() if room not in free}


def loaded_after(statement: str) -> set[str]:
    code = f"{statement}; import sys; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "statement",
    [
        "import nanopd",
        "from nanopd import EngineConfig, WorkerConfig, Role, Route, SamplingParams, RequestError; import nanopd.cli",
        "import " + ", ".join(f"nanopd.core.{path.stem}" for path in sorted((PACKAGE / "core").glob("[a-z]*.py"))),
    ],
)
def test_no_torch_is_loaded(statement: str) -> None:
    assert not loaded_after(statement) & {"torch", "transformers", "numba"}


def test_every_package_is_installed() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    listed = set(setup["options"]["packages"].split())
    found = {".".join(path.parent.relative_to(ROOT).parts) for path in MODULES}
    assert listed == found | {"nanopd.configs"}
