"""The command `nanopd` (in a checkout: `python launch.py`): its options, which job they ask for, its exit status.

Runs in the main thread of its process and is the only place with signal handlers. What the jobs do is for the modules
of commands/; --help and bad arguments answer at once, as nothing large is imported before a job runs.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import signal
import sys
from collections.abc import Iterator, Sequence

from nanopd.commands import BAD_USAGE, FAILED, plan, profile, run, serve
from nanopd.config import load_config
from nanopd.errors import FieldError, NanopdError

COMMAND_HELP = "profile: measure the workers, fit the cost model; plan: find the best split in simulation"
JOBS = {"run": run.run, "serve": serve.run, "profile": profile.run, "plan": plan.run}
KILLED = 128  # plus the number of the signal


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; its exit status is 0, 1 if something failed, 2 for bad arguments, 130 after Ctrl-C."""
    args = parse_args(argv)
    logging.basicConfig(level=args.log_level.upper(), format="%(levelname)s %(name)s: %(message)s")
    try:
        with _exit_on_sigterm():
            return JOBS[args.job](args, load_config(args.config, args.set))
    except KeyboardInterrupt:
        return KILLED + signal.SIGINT
    except BrokenPipeError:  # the reader of standard output has left; Python would flush to it once more at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except (NanopdError, OSError) as error:
        print(f"nanopd: {error}", file=sys.stderr)
        return BAD_USAGE if isinstance(error, (FieldError, OSError)) else FAILED


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options, and as `job` the one of JOBS that they ask for."""
    about = "Serve prompts of a file, of the command line or over HTTP; else chat at a terminal or run a demo."
    parser = argparse.ArgumentParser("nanopd", description=about)
    parser.add_argument("command", nargs="?", choices=["profile", "plan"], help=COMMAND_HELP)
    parser.add_argument("--params", metavar="JSON", help="what `profile` writes (default: the cache) and `plan` reads")
    parser.add_argument("--config", required=True, metavar="NAME_OR_PATH", help="a shipped one, or a YAML file")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key; repeatable")
    parser.add_argument("--log-level", default="warning", choices=["debug", "info", "warning", "error"])
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--serve", action="store_true", help="an OpenAI-compatible server, until a signal comes")
    run.add_options(parser, source)
    plan.add_options(parser.add_argument_group("plan, for the machine of the configuration's params"))
    serve.add_options(parser.add_argument_group("server, with --serve"))
    args = parser.parse_args(argv)
    if (args.command == "plan") != bool(args.trace):
        parser.error("argument --trace: needed by plan, and by nothing else")
    if args.serve and args.output:
        parser.error("argument --output: not allowed with argument --serve")
    args.job = args.command or ("serve" if args.serve else "run")
    return args


@contextlib.contextmanager
def _exit_on_sigterm() -> Iterator[None]:
    """Make SIGTERM unwind as Ctrl-C does."""
    previous = signal.signal(signal.SIGTERM, lambda signum, _frame: sys.exit(KILLED + signum))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
