"""`python -m bench.run sweep`: policies x workloads x rates x seeds on the same devices, then figures and a page.

Every policy is given the same prompts, sampling and arrivals, and the same devices; an engine is started once for each
policy. After each run the report is written anew, with a line for it. What it holds already is not run again: a sweep
that was interrupted, or stopped by --budget-s, goes on where it was. `SWEEPS` says what is run under the name of a
configuration, and every part of it has an option.

--simulate makes the same rows by a simulation, with the parameters that the policy adaptive would use, and needs no
device: a prediction, to be made before the run (`python -m bench.report REAL --against SIMULATED`).
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from bench.lib import load
from bench.lib.report import Row, device_name, emit, make_report, save
from bench.lib.report import load as load_report
from bench.lib.rows import figures_of, limits_of, policy_of
from bench.report import write_page
from nanopd import EngineConfig
from nanopd.checkpoints.model_files import read_model_config, resolve
from nanopd.config import LEVELS, ModelConfig
from nanopd.errors import ConfigError
from nanopd.lab.planner import ORACLE, Arrangement
from nanopd.lab.profiler import cache_file
from nanopd.metrics import SLO
from nanopd.routing.cost_model import Parameters
from nanopd.routing.factory import find_parameters

TIMELINE_S = 1.5
PROGRESS = ("policy", "workload", "requests/s", "served", "TTFT", "TPOT", "attained")  # of each run, as it ends
REFERENCES = Path(__file__).parent / "results"  # the project's own, and others'
RESULTS = Path("results")
PEER = Arrangement("transformers", "one by one")

Machine = tuple[ModelConfig, Parameters]


@dataclass(frozen=True, slots=True)
class Sweep:
    policies: tuple[str, ...]
    points: tuple[str, ...]  # WORKLOAD@RATE,RATE,...
    slo: str  # milliseconds; the adaptive policy is told of it too
    window_s: float = 20.0
    warm_up_s: float = 3.0
    settings: tuple[str, ...] = ()  # as with --set
    beside: tuple[str, ...] = ()  # reports of others

    def quick(self) -> Sweep:
        """The first workload, in short windows."""
        return replace(self, points=self.points[:1], window_s=10.0, warm_up_s=1.0)


def many_h200(count: int, num_prefill: Sequence[int]) -> Sweep:
    """Up to near their limit; splits in the order of `num_prefill`, the likely ones first."""
    return Sweep(
        (f"adaptive:{count}M", f"{count}M", *(f"{p}P{count - p}D" for p in num_prefill)),
        (f"1024/128@{16 * count},{12 * count}",),
        "ttft=200,tpot=10,first_gap=50",
        window_s=10.0,
        warm_up_s=2.0,
        settings=("model=Qwen3-8B", "load_format=dummy"),
    )


PAIR = ("2M", "1P1D", "adaptive:2M")
SWEEPS = {
    "cpu-demo": Sweep(PAIR, ("64/32@0.5,1,2", "256/32@0.25,0.5,1"), "ttft=1000,tpot=100"),
    "2xh200": Sweep(
        PAIR,
        ("mixed@16,32", "long@16", "short@40"),
        "ttft=200,tpot=10",
        warm_up_s=2.0,
        settings=("model=Qwen3-8B", "load_format=dummy"),
        beside=("h200/vllm.json",),
    ),
    "4xh200": many_h200(4, (2, 3, 1)),
    "8xh200": many_h200(8, (4, 5, 3, 6, 2, 7, 1)),
}
OTHER = Sweep(("2M", "1P1D"), ("mixed@1,2,4",), "ttft=1000,tpot=100")


@dataclass(frozen=True, slots=True)
class Point:
    """One run of a policy."""

    workload: load.Workload
    slo: SLO
    window_s: float
    warm_up_s: float

    @property
    def end_s(self) -> float:
        return self.warm_up_s + self.window_s

    def key(self, arrangement: Arrangement) -> dict[str, Any]:
        """What tells its row from all others."""
        of = self.workload
        key = {"workload": of.label, "rate": of.rate, "seed": of.seed, "cv": of.cv}
        return {**key, **load.names_of(arrangement), "window_s": self.window_s}

    def title(self, arrangement: Arrangement) -> str:
        return f"{policy_of(load.names_of(arrangement))}, {self.workload.label} at {self.workload.rate:g} requests/s"


class Results:
    """The report on disk."""

    def __init__(self, path: Path, config: dict[str, Any], device: str | None) -> None:
        """Go on with what is there. Raises ConfigError if that was measured with other settings."""
        self.path, self.config, self.device = path, config, device
        self.rows: list[Row] = []
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            before = load_report(path)
            if any(before["config"].get(part) != config.get(part) for part in ("engine", "parameters")):
                raise ConfigError("out", str(path), "a new file, or one of the same model, devices and settings")
            self.rows = before["rows"]

    def missing(self, points: list[Point], arrangement: Arrangement) -> list[Point]:
        keys = [(point, point.key(arrangement)) for point in points]
        return [point for point, key in keys if not any(key.items() <= row.items() for row in self.rows)]

    def add(self, row: Row) -> None:
        self.rows.append(row)
        save(make_report("sweep", self.config, self.rows, self.device), self.path)


def points_of(sweep: Sweep, seeds: Sequence[int], cv: float) -> list[Point]:
    slo = SLO.parse(sweep.slo)
    return [
        Point(load.Workload(name, float(rate), seed, cv), slo, sweep.window_s, sweep.warm_up_s)
        for name, _, rates in (text.rpartition("@") for text in sweep.points)
        for rate in rates.split(",")
        for seed in seeds
    ]


# Who serves an arrangement: as long as the context lasts, by a function that plays a point.
Player = Callable[[Point], load.Run]
Server = Callable[[Arrangement], AbstractContextManager[Player]]


@contextmanager
def engine(base: EngineConfig, shown: Point, path: Path, arrangement: Arrangement) -> Iterator[Player]:
    """On the devices of `base`; a timeline of `shown` is kept beside the report at `path`."""
    with load.serving(arrangement.applied(base)) as llm:

        def run(point: Point) -> load.Run:
            title = point.title(arrangement)
            found = load.play(llm, point.workload.jobs(llm, point.end_s), title)
            if point is shown:
                beside = path.with_name(f"{path.stem}-timeline-{arrangement.policy}.json")
                middle_s = (point.warm_up_s + point.end_s) / 2
                load.save_timeline(found, llm.config, title, beside, (middle_s, middle_s + TIMELINE_S))
            return found

        yield run


@contextmanager
def transformers(base: EngineConfig, arrangement: Arrangement) -> Iterator[Player]:
    from bench.lib.peer import Peer  # imports torch, which those do without who only simulate

    peer = Peer(base)
    yield lambda point: peer.play(point.workload.requests(peer.max_len, point.end_s), point.title(arrangement))


@contextmanager
def simulation(base: EngineConfig, machine: Machine, arrangement: Arrangement) -> Iterator[Player]:
    simulated = load.Simulation(base, arrangement, *machine)
    yield lambda point: simulated.play(simulated.requests(point.workload, point.end_s))


def machine_of(base: EngineConfig) -> Machine:
    """What a simulation stands on. Raises ConfigError: there are no parameters of it."""
    on_cpu = base.workers[0].device == "cpu"
    model = read_model_config(resolve(base.model, load_format=base.load_format), base.dtype, on_cpu)
    return model, find_parameters(base.params, cache_file(base, model) if on_cpu else None)


def runs(served: Sequence[tuple[Arrangement, Server]], points: list[Point], results: Results) -> Generator[Row]:
    """Every run that there is no result of yet, arrangement by arrangement."""
    for arrangement, serve in served:
        if todo := results.missing(points, arrangement):
            with ExitStack() as stack:
                try:
                    run = stack.enter_context(serve(arrangement))
                except ConfigError as error:
                    if error.field != "params":
                        raise
                    print(f"{arrangement.text} is left out: {error}", file=sys.stderr)
                    continue
                for point in todo:
                    window_s = (point.warm_up_s, point.end_s)
                    yield load.result_row(run(point), point.key(arrangement), point.slo, window_s)


def carry_out(rows: Generator[Row], results: Results, budget_s: float, run_s: float) -> str:
    """All rows, until the end, Ctrl-C, or no time is left for a run of `run_s`; returns how it ended."""
    end_s = time.monotonic() + budget_s
    with closing(rows):
        for row in rows:
            shown = figures_of(row)
            if row["is_interrupted"]:
                print("of the run that was interrupted, which is not kept:")
                emit("sweep", {}, [row], table=[shown])
                return "interrupted"
            results.add(row)
            print(*(f"{name} {shown[name]}" for name in PROGRESS), sep=", ", file=sys.stderr, flush=True)
            if time.monotonic() + 1.2 * run_s > end_s:
                return "out of time"
    return "done"


def sweep_of(args: argparse.Namespace) -> Sweep:
    """The named sweep with what the command line says otherwise."""
    sweep = SWEEPS.get(args.config, OTHER)
    sweep = sweep.quick() if args.quick else sweep
    return replace(
        sweep,
        points=(*(args.points or sweep.points), *args.traces),
        policies=tuple(args.policies or sweep.policies),
        slo=args.slo or sweep.slo,
        window_s=args.window or sweep.window_s,
        warm_up_s=sweep.warm_up_s if args.warm_up is None else args.warm_up,
    )


def parser_of_sweep() -> argparse.ArgumentParser:
    form = argparse.RawDescriptionHelpFormatter
    parser = load.serving_arguments(
        argparse.ArgumentParser("python -m bench.run sweep", None, __doc__, formatter_class=form)
    )
    parser.add_argument("--quick", action="store_true", help="the first workload, in short windows")
    parser.add_argument("--simulate", action="store_true", help="predict the rows; needs parameters, and no device")
    parser.add_argument("--policies", nargs="+", metavar="POLICY", help="[policy:]split[/chunk budget]")
    parser.add_argument("--peer", choices=["transformers"], help="after the policies the same points by this one")
    parser.add_argument("--points", nargs="+", metavar="WORKLOAD@RATE,..", help="in place of the sweep's own")
    parser.add_argument("--traces", nargs="+", default=[], metavar="PATH@RATE,..", help="besides: *.csv, *.jsonl")
    parser.add_argument("--slo", help="limits in ms, as ttft=200,tpot=10")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--cv", type=float, default=1.0, help="of the gaps between arrivals; 1: Poisson")
    parser.add_argument("--window", type=float, help="seconds of a run that count")
    parser.add_argument("--warm-up", type=float, help="seconds before them")
    parser.add_argument("--budget-s", type=float, default=float("inf"), help="begin no run that would end later")
    parser.add_argument("--out", type=Path, help="the report; default: results/sweep-CONFIG.json")
    parser.add_argument("--figures", type=Path, help="their directory; default: that of the report")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    parser = parser_of_sweep()
    args = parser.parse_args(argv)
    if args.simulate and args.peer:
        parser.error("--peer is measured: it does not go with --simulate")
    sweep = sweep_of(args)
    slo = {name: limit for name, limit in limits_of(SLO.parse(sweep.slo)).items() if name in LEVELS}
    base = load.engine_config(args, sweep.settings).replace(slo=slo)
    kind = "-simulated" if args.simulate else "-quick" if args.quick else ""
    out = args.out or RESULTS / f"sweep-{Path(args.config).stem}{kind}.json"
    config = {"engine": load.settings_of(base), "warm_up_s": sweep.warm_up_s, "load_average": os.getloadavg()[0]}
    points = points_of(sweep, args.seeds, args.cv)
    if args.simulate:
        machine = machine_of(base)
        config["parameters"] = asdict(machine[1])
        results = Results(out, config, f"simulated: {machine[1].machine}")
        serve = partial(simulation, base, machine)
    else:
        results = Results(out, config, device_name(base))
        serve = partial(engine, base, points[min(1, len(points) - 1)], out)
    served = [(Arrangement.parse(policy), serve) for policy in sweep.policies]
    if not args.simulate and any(arrangement.policy == ORACLE for arrangement, _ in served):
        parser.error("oracle needs --simulate: it knows the lengths of answers")
    rows = runs([*served, (PEER, partial(transformers, base))] if args.peer else served, points, results)
    outcome = carry_out(rows, results, args.budget_s, 0.0 if args.simulate else sweep.warm_up_s + sweep.window_s)
    if results.rows:
        table = [figures_of(row) for row in results.rows]
        emit("sweep", results.config, results.rows, device=results.device, table=table)
        beside = [REFERENCES / name for name in sweep.beside]
        write_page(out, out.with_suffix(".md"), args.figures or out.parent, beside)
    print(f"{outcome}: {len(results.rows)} runs in {out}")
    return 130 if outcome == "interrupted" else 0


if __name__ == "__main__":
    raise SystemExit(main())
