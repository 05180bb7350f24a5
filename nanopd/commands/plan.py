"""The job `plan`: find by simulation which roles of the workers serve a trace best."""

from __future__ import annotations

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path

from tqdm import tqdm

from nanopd.config import EngineConfig
from nanopd.errors import NanopdError
from nanopd.lab.tables import format_table
from nanopd.lab.workload import read_trace
from nanopd.metrics import SLO


def add_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--trace", metavar="FILE", help="requests: an Azure (.csv) or Mooncake (.jsonl) trace")
    group.add_argument("--slo", metavar="LIMITS", help="like ttft=200,tpot=10; default: from params and trace")
    group.add_argument("--max-requests", type=int, default=1000, help="of the trace (1000); more: steadier, slower")
    group.add_argument("--figure", metavar="PNG", help="draw the plan too; needs nanopd[plot]")


def run(args: argparse.Namespace, config: EngineConfig) -> int:
    from nanopd.lab import planner
    from nanopd.routing.factory import find_parameters

    if args.figure and find_spec("matplotlib") is None:
        raise NanopdError("--figure needs more packages: pip install nanopd[plot]")
    parameters = find_parameters(args.params or config.params)
    requests = read_trace(args.trace, max_requests=args.max_requests).requests
    slo = SLO.parse(args.slo) if args.slo else planner.default_slo(parameters, requests)
    scenario = planner.Scenario.of(config, parameters, requests, slo)
    arrangements = planner.candidates(len(config.workers))
    progress = tqdm(planner.search(scenario, arrangements), total=len(arrangements), disable=not sys.stderr.isatty())
    found = sorted(progress, key=lambda pair: -pair[1].rate)
    print(format_table(planner.COLUMNS, planner.table(found)))
    print(f"\nrecommended: {found[0][0].text}, for {slo}")
    if args.figure:
        planner.draw(found, f"{parameters.machine}, {Path(args.trace).name}", Path(args.figure))
    return 0
