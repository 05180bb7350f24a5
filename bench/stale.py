"""Which reports in bench/results are of other code than today's: `python -m bench.stale` updates their README.

A report is stale if a path that it measures has changed since the commit that it names, uncommitted changes included.
The table of the README says of each report what it shows, where, and what it measures; the rest of a line follows from
the report and from git's history, which must be there.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

from bench.lib.report import load

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
README = RESULTS / "README.md"

_PARENT = ("nanopd/core", "nanopd/engine", "nanopd/frontend", "nanopd/ipc", "nanopd/wire.py")
_WORKER = (*_PARENT, "nanopd/models", "nanopd/worker", "nanopd/workers")
MEASURED = {  # what the README calls what is measured -> paths from the root
    "parent": _PARENT,
    "ring": ("nanopd/ipc",),
    "kernels": ("nanopd/cuda",),
    "transfers": ("nanopd/worker", "nanopd/workers", "nanopd/ipc", "nanopd/cuda"),
    "CPU engine": (*_WORKER, "nanopd/cpu"),
    "CPU serving": (*_WORKER, "nanopd/cpu", "nanopd/routing"),
    "GPU engine": (*_WORKER, "nanopd/cuda"),
    "GPU serving": (*_WORKER, "nanopd/cuda", "nanopd/routing"),
    "simulation": ("nanopd/core", "nanopd/engine", "nanopd/routing", "nanopd/lab"),
    "other software": (),
}


def table() -> dict[str, list[str]]:
    """Name of a report -> the cells of its line: link, what, page, what is measured, state, commit, command."""
    lines = [line for line in README.read_text(encoding="utf-8").splitlines() if line.startswith("| [")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {line[0].partition("]")[0].removeprefix("["): line for line in cells}


def current_line(name: str, cells: list[str]) -> list[str]:
    """The line as it should be."""
    config = load(RESULTS / f"{name}.json")["config"]
    state = "stale" if is_stale(config["commit"], MEASURED[cells[3]]) else "current"
    return [*cells[:4], state, config["commit"] or "-", f"`{config['command']}`" if "command" in config else "-"]


def is_stale(commit: str | None, paths: tuple[str, ...]) -> bool:
    """Whether one of `paths` has changed since; of a commit that git does not know, or none, that is to be feared."""
    if not paths:
        return False
    commit = (commit or "-").removesuffix("-dirty")  # changes that were not committed are in a later commit
    return _git("cat-file", "-e", f"{commit}^{{commit}}") != "" or _git("diff", "--stat", commit, "--", *paths) != ""


def has_history() -> bool:
    """Whether git knows every commit before this one."""
    return _git("rev-parse", "--is-shallow-repository") == "false\n"


def _git(*args: str) -> str:
    done = subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


def main() -> None:
    if not has_history():
        raise SystemExit("git's history is not here: nothing can be said of commits")
    text = README.read_text(encoding="utf-8")
    head = text[: text.index("| [")]
    lines = (f"| {' | '.join(current_line(*each))} |\n" for each in table().items())
    README.write_text(head + "".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
