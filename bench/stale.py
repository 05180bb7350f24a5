"""Which reports in bench/results still describe the code: `python -m bench.stale` writes bench/results/README.md anew.

A report is stale if a path that it measures has changed since the commit that it names, uncommitted changes included.
This module knows each report, what it says, which page shows it and which paths it measures; it needs git's history.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bench.lib.report import load

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
README = RESULTS / "README.md"

PARENT = ("nanopd/core", "nanopd/engine", "nanopd/frontend", "nanopd/ipc", "nanopd/wire.py")
WORKERS = (*PARENT, "nanopd/models", "nanopd/worker", "nanopd/workers")
ON_CPU, ON_GPU = (*WORKERS, "nanopd/cpu"), (*WORKERS, "nanopd/cuda")
SERVED_ON_CPU, SERVED_ON_GPU = (*ON_CPU, "nanopd/routing"), (*ON_GPU, "nanopd/routing")
SIMULATED = ("nanopd/core", "nanopd/engine", "nanopd/routing", "nanopd/lab")
INTRODUCTION = """\
# Results

The reports that the documents rest upon, as `bench/results/MACHINE/NAME.json`. `python -m bench.stale` writes this
page; bench/stale.py says what each report measures. *stale*: the measured code has changed since the commit of the
report, so its figures are those of that commit. Commands are those of that commit too.
"""


@dataclass(frozen=True, slots=True)
class Result:
    """What there is to say of a report beside its own words."""

    what: str
    page: str  # of docs/en
    measures: tuple[str, ...]  # paths from the root; none: other software


TRANSFERS = ("nanopd/worker", "nanopd/workers", "nanopd/ipc", "nanopd/cuda")
KERNELS = ("nanopd/cuda",)
RESULT_OF = {
    "2core-epyc/cpu": Result("generation on the CPU beside transformers", "performance", ON_CPU),
    "2core-epyc/ipc": Result("round trips of the ring and of pipes", "performance", ("nanopd/ipc",)),
    "2core-epyc/prefix_cache": Result("what the prefix cache finds in a trace", "performance", PARENT),
    "2core-epyc/scheduler": Result("the parent's time for a step", "performance", PARENT),
    "2core-epyc/speculation": Result("drafts of the demo model", "modules/generation", ON_CPU),
    "2core-epyc/sweep": Result("policies under load on the CPU", "performance", SERVED_ON_CPU),
    "2core-epyc/sweep-quick": Result("the quick sweep, with transformers", "performance", SERVED_ON_CPU),
    "2xh200/engine": Result("offline throughput of two collocated workers", "performance", ON_GPU),
    "2xh200/handover": Result("hand-overs, and loads beside vLLM's", "performance", SERVED_ON_GPU),
    "2xh200/sweep": Result("short, long and mixed prompts", "performance", SERVED_ON_GPU),
    "2xh200/sweep-azure": Result("Azure's conversations", "performance", SERVED_ON_GPU),
    "2xh200/sweep-azure-busy-host": Result(
        "the same with an earlier router, beside tests on other GPUs", "performance", SERVED_ON_GPU
    ),
    "2xh200/sweep-azure-first-fit": Result("the same with the first parameters", "performance", SERVED_ON_GPU),
    "2xh200/sweep-code": Result("Azure's code", "performance", SERVED_ON_GPU),
    "2xh200/transfer": Result("KV blocks between two GPUs", "performance", TRANSFERS),
    "4xh200/scaling": Result("four workers, a death among them", "performance", SERVED_ON_GPU),
    "4xh200/scaling-1-2-4": Result("one, two and four workers", "performance", SERVED_ON_GPU),
    "4xh200/sweep": Result("policies on four GPUs, an earlier router", "performance", SERVED_ON_GPU),
    "4xh200/sweep-adaptive": Result("policies on four GPUs", "performance", SERVED_ON_GPU),
    "h100/engine": Result("a whole engine on an H100", "performance", ON_GPU),
    "h200/engine": Result("a whole engine on an H200", "performance", ON_GPU),
    "h200/engine-sampled": Result("the same with sampled steps", "performance", ON_GPU),
    "h200/gpu_kernels": Result("single kernels", "performance", KERNELS),
    "h200/prefix_cache-16": Result("what the prefix cache saves, lengths divided by 16", "performance", ON_GPU),
    "h200/prefix_cache-32": Result("what the prefix cache saves, lengths divided by 32", "performance", ON_GPU),
    "h200/speculation": Result("drafts of an 8B model", "performance", ON_GPU),
    "h200/speculation-8k": Result("the same behind 8,192 more tokens", "performance", ON_GPU),
    "h200/vllm": Result("vLLM 0.26 under loads that others are measured with", "performance", ()),
    "simulated/routing_study": Result("the router beside every static arrangement", "planning", SIMULATED),
    "simulated/seed-rates": Result("eight RTX 4090 and eight H20", "planning", SIMULATED),
    "simulated/sweep-2xh200": Result("prediction of 2xh200/sweep", "performance", SIMULATED),
    "simulated/sweep-2xh200-azure": Result("prediction of 2xh200/sweep-azure", "performance", SIMULATED),
    "simulated/sweep-2xh200-code": Result("prediction of 2xh200/sweep-code", "performance", SIMULATED),
    "simulated/sweep-4xh200-adaptive": Result("prediction of 4xh200/sweep-adaptive", "performance", SIMULATED),
    "simulated/waits": Result("long prompts among short ones", "performance", SIMULATED),
    "xeon/router": Result("the router's time for a decision", "performance", SIMULATED),
}


def has_history() -> bool:
    """Whether git knows every commit before this one."""
    done = _git("rev-parse", "--is-shallow-repository")
    return done.returncode == 0 and done.stdout.strip() == "false"


def is_stale(name: str) -> bool:
    """Whether what the report measures has changed since its commit, or is of no commit that git knows."""
    paths, commit = RESULT_OF[name].measures, load(RESULTS / f"{name}.json")["config"]["commit"]
    if not paths:
        return False
    known = commit is not None and not _git("cat-file", "-e", f"{commit.removesuffix('-dirty')}^{{commit}}").returncode
    return not known or _git("diff", "--quiet", commit.removesuffix("-dirty"), "--", *paths).returncode != 0


def lines() -> Iterator[str]:
    """The table of the README, a line for each report."""
    yield "| report | what | command | commit | shown by | state |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for name, result in RESULT_OF.items():
        config = load(RESULTS / f"{name}.json")["config"]
        command, commit = config.get("command"), config["commit"] or "-"
        page = f"[{result.page}.md](../../docs/en/{result.page}.md)"
        cells = [f"[{name}]({name}.json)", result.what, f"`{command}`" if command else "-", commit, page]
        yield f"| {' | '.join(cells)} | {'stale' if is_stale(name) else 'current'} |"


def _git(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=False)


def main() -> None:
    if not has_history():
        raise SystemExit("git's history is not here: nothing can be said of commits")
    README.write_text("\n".join([INTRODUCTION, *lines()]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
