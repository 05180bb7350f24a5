"""The job `profile`: measure the configured workers, fit the cost model, keep its parameters in a file."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from nanopd.config import EngineConfig
from nanopd.lab.tables import format_table


def run(args: argparse.Namespace, config: EngineConfig) -> int:
    from nanopd.frontend.llm import load_settings
    from nanopd.lab import profiler

    settings, model, path = load_settings(config)
    parameters, fit = profiler.profile(settings, model, path, show_progress=sys.stderr.isatty())
    target = Path(args.params) if args.params else profiler.cache_file(settings, model)
    target.parent.mkdir(parents=True, exist_ok=True)
    parameters.save(target)
    print(format_table(profiler.COLUMNS, profiler.table(parameters, model)), "", sep="\n")
    errors = profiler.error_rows(fit.errors, parameters.errors)
    print(format_table(profiler.ERROR_COLUMNS, errors), "", f"kept in {target}", sep="\n")
    return 0
