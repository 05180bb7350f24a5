"""The command `nanopd` (in a checkout: `python launch.py`): serve prompts, print answers, report; or serve HTTP.

Prompts come as JSONL, from --prompt, from a chat at the terminal, or from a built-in demo. Runs in the main thread of
its process and is the only place with signal handlers. Uses the public face of the library, imported when it is
needed, so that --help and bad arguments answer at once; knows nothing of workers and engines.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import signal
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from tqdm import tqdm

import nanopd
from nanopd.config import PREDICTING, EngineConfig, load_config
from nanopd.errors import ConfigError, FieldError, NanopdError, RequestError
from nanopd.frontend.jsonl import PREDICTED_KEYS, SAMPLING_KEYS, Row, serve_rows
from nanopd.lab.tables import format_table
from nanopd.lab.workload import read_trace
from nanopd.metrics import SLO, Summary, by_route, summarize
from nanopd.request import SamplingParams

if TYPE_CHECKING:
    from nanopd.frontend.llm import LLM

DEMO_PROMPTS = (
    "What is the capital of France?",
    "Name three primary colours.",
    "Why is the sky blue?",
    "Write one sentence about the sea.",
    "What does a compiler do?",
    "Give me a word that rhymes with 'light'.",
    "How many days are in a week?",
    "Say hello in Spanish.",
)
ROUTE_COLUMNS = ("route", "completed", "TTFT ms p50 / p99", "first gap", "TPOT", "E2E", "output tokens/s")
EXPLAINED_COLUMNS = (
    "request",
    "route",
    "TTFT ms predicted / actual",
    "first gap",
    "TPOT",
    "best other",
    *PREDICTED_KEYS,
)
WORKER_COLUMNS = ("worker", "device", "role", "peak blocks", "still used", "of blocks")
API_KEY_HELP = "what clients must send; by default the environment's NANOPD_API_KEY, and nothing without it"
MAX_EXPLAINED = 1000  # requests, the latest
COMMAND_HELP = "profile: measure the workers, fit the cost model; plan: find the best split in simulation"
ROW_FAILED = 1
BAD_USAGE = 2  # as argparse has it
KILLED = 128  # plus the number of the signal


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; its exit status is 0, 1 if something failed, 2 for bad arguments, 130 after Ctrl-C."""
    args = parse_args(argv)
    logging.basicConfig(level=args.log_level.upper(), format="%(levelname)s %(name)s: %(message)s")
    try:
        with _exit_on_sigterm():
            return _run(args)
    except KeyboardInterrupt:
        return KILLED + signal.SIGINT
    except BrokenPipeError:  # who read our output has left; Python would flush to it once more at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ROW_FAILED
    except (NanopdError, OSError) as error:
        print(f"nanopd: {error}", file=sys.stderr)
        return BAD_USAGE if isinstance(error, (FieldError, OSError)) else ROW_FAILED


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="nanopd",
        description="Serve prompts of a file, of the command line or over HTTP; else chat at a terminal or run a demo.",
    )
    parser.add_argument("command", nargs="?", choices=["profile", "plan"], help=COMMAND_HELP)
    parser.add_argument("--params", metavar="JSON", help="what `profile` writes (default: the cache) and `plan` reads")
    parser.add_argument("--config", required=True, metavar="NAME_OR_PATH", help="a shipped one, or a YAML file")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a key; repeatable")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--input", metavar="JSONL", help="rows to serve; - for standard input")
    source.add_argument("--prompt", action="append", metavar="TEXT", help="text to continue as it is; repeatable")
    source.add_argument("--serve", action="store_true", help="an OpenAI-compatible server, until a signal comes")
    parser.add_argument("--output", metavar="JSONL", help="where answers go; - (and the default) is standard output")
    parser.add_argument("--explain", action="store_true", help="a table of what the policy predicted, and what came")
    parser.add_argument("--log-level", default="warning", choices=["debug", "info", "warning", "error"])
    sampling = parser.add_argument_group("sampling, where a row does not say otherwise")
    sampling.add_argument("--max-tokens", type=int, default=128)
    sampling.add_argument("--temperature", type=float, default=0.0, help="0 (the default) is greedy")
    sampling.add_argument("--top-p", type=float, default=1.0)
    sampling.add_argument("--top-k", type=int, default=0)
    sampling.add_argument("--min-p", type=float, default=0.0)
    sampling.add_argument("--presence-penalty", type=float, default=0.0)
    sampling.add_argument("--frequency-penalty", type=float, default=0.0)
    sampling.add_argument("--repetition-penalty", type=float, default=1.0)
    sampling.add_argument("--seed", type=int)
    plan = parser.add_argument_group("plan, for the machine of the configuration's params")
    plan.add_argument("--trace", metavar="FILE", help="requests: an Azure (.csv) or Mooncake (.jsonl) trace")
    plan.add_argument("--slo", metavar="LIMITS", help="like ttft=200,tpot=10; default: from params and trace")
    plan.add_argument("--max-requests", type=int, default=1000, help="of the trace (1000); more: steadier, slower")
    plan.add_argument("--figure", metavar="PNG", help="draw the plan too; needs nanopd[plot]")
    server = parser.add_argument_group("server, with --serve")
    server.add_argument("--host", default="127.0.0.1", help="address to listen at (127.0.0.1, this machine only)")
    server.add_argument("--port", type=int, default=8000, help="0: any free one")
    server.add_argument("--api-key", metavar="KEY", default=os.environ.get("NANOPD_API_KEY"), help=API_KEY_HELP)
    args = parser.parse_args(argv)
    if (args.command == "plan") != bool(args.trace):
        parser.error("argument --trace: needed by plan, and by nothing else")
    if args.serve and args.output:
        parser.error("argument --output: not allowed with argument --serve")
    return args


def _run(args: argparse.Namespace) -> int:
    config = load_config(args.config, args.set)
    if args.command == "profile":
        return _profile(config, args.params and Path(args.params))
    if args.command == "plan":
        return _plan(args, config)
    if args.serve:
        return _serve(args, config)
    sampling = {key: value for key, value in vars(args).items() if key in SAMPLING_KEYS}
    params = SamplingParams(**sampling)
    is_chat = not (args.input or args.prompt or args.output) and sys.stdin.isatty() and sys.stdout.isatty()
    if args.explain and config.policy not in PREDICTING:
        raise ConfigError("--explain", config.policy, f"a policy that predicts: {', '.join(PREDICTING)}")
    explained: deque[Row] = deque(maxlen=MAX_EXPLAINED if args.explain else 0)
    with contextlib.ExitStack() as stack:
        source = stack.enter_context(_open(args.input, "rb", sys.stdin.buffer)) if args.input else None
        target = stack.enter_context(_open(args.output, "w", sys.stdout))
        llm = stack.enter_context(nanopd.LLM(config=config, show_progress=sys.stderr.isatty()))
        stack.callback(_report, llm, explained)
        if is_chat:
            chat(llm, params)
            return 0
        write = partial(write_json if args.input or args.output else write_text, target)
        window = 4 * config.max_num_seqs * len(config.workers)

        def answer(row: Row) -> None:
            explained.append(row)
            write(row)

        num_failed = serve_rows(llm, source or _own_rows(args, llm), sampling, answer, window)
        return ROW_FAILED if num_failed else 0


def _profile(config: EngineConfig, target: Path | None) -> int:
    from nanopd.frontend.llm import load_settings
    from nanopd.lab import profiler

    settings, model, path = load_settings(config)
    found = profiler.profile(settings, model, path, show_progress=sys.stderr.isatty())
    parameters = found.parameters(settings, model)
    target = target or profiler.cache_file(settings, model)
    target.parent.mkdir(parents=True, exist_ok=True)
    parameters.save(target)
    print(format_table(profiler.COLUMNS, profiler.table(parameters, model)), "", sep="\n")
    print(format_table(profiler.ERROR_COLUMNS, found.error_rows()), "", f"kept in {target}", sep="\n")
    return 0


def _plan(args: argparse.Namespace, config: EngineConfig) -> int:
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


def _serve(args: argparse.Namespace, config: EngineConfig) -> int:
    try:
        from nanopd.serve import app
    except ImportError as error:
        raise NanopdError(f"--serve needs more packages: pip install nanopd[serve] ({error})") from error
    with app.bind(args.host, args.port) as listener:  # before a model is loaded for nothing
        llm = nanopd.AsyncLLM(config=config, show_progress=sys.stderr.isatty())
        with llm.llm:
            host, port, *_ = listener.getsockname()
            address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
            print(f"nanopd: serving {config.model} at http://{address}/v1", file=sys.stderr, flush=True)
            app.run(llm, listener, args.api_key)
    return 0


def _open(path: str | None, mode: str, standard: IO[Any]) -> contextlib.AbstractContextManager[IO[Any]]:
    if path is None or path == "-":
        return contextlib.nullcontext(standard)
    return Path(path).open(mode, encoding=None if "b" in mode else "utf-8")


@contextlib.contextmanager
def _exit_on_sigterm() -> Iterator[None]:
    """Make SIGTERM unwind as Ctrl-C does."""
    previous = signal.signal(signal.SIGTERM, lambda signum, _frame: sys.exit(KILLED + signum))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _own_rows(args: argparse.Namespace, llm: LLM) -> list[str]:
    """Rows of --prompt, or of the demo: chats, if the model knows chats; token ids, if it has no tokenizer."""
    rows: list[Row]
    if args.prompt:
        rows = [{"prompt": text} for text in args.prompt]
    elif llm.tokenizer is None:
        rows = [{"prompt_token_ids": list(range(1, 8 + n))} for n in range(len(DEMO_PROMPTS))]
    elif llm.tokenizer.chat_template is None:
        rows = [{"prompt": text} for text in DEMO_PROMPTS]
    else:
        rows = [{"messages": [{"role": "user", "content": text}]} for text in DEMO_PROMPTS]
    return [json.dumps(row) for row in rows]


def write_json(target: IO[str], row: Row) -> None:
    """An answer as a line of JSON."""
    tqdm.write(json.dumps(row, ensure_ascii=False), file=target)
    target.flush()


def write_text(target: IO[str], row: Row) -> None:
    """An answer for people: its route, the question and what came out."""
    asked = row["messages"][-1]["content"] if "messages" in row else row.get("prompt") or row["prompt_token_ids"]
    answer = row.get("error") or row["text"] or row["token_ids"]
    tqdm.write(f"[{row.get('route') or 'no route'}] {asked}\n{answer}\n", file=target)
    target.flush()


def chat(llm: LLM, params: SamplingParams) -> None:
    """Talk with the model at the terminal until /exit or the end of input."""
    print("/reset starts over, /exit leaves, Ctrl-C stops an answer.")
    messages: list[dict[str, str]] = []
    while (text := _ask()) != "/exit":
        if text == "/reset":
            messages = []
        elif text:
            asked = [*messages, {"role": "user", "content": text}]
            try:
                messages = [*asked, {"role": "assistant", "content": _print_answer(llm, asked, params)}]
            except RequestError as error:
                print(f"nanopd: {error}")


def _ask() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        return "/exit"


def _print_answer(llm: LLM, messages: list[dict[str, str]], params: SamplingParams) -> str:
    handle = llm.submit(llm.encode_chat(messages), params, stream=True)
    pieces = []
    try:
        for delta in handle:
            pieces.append(delta.text)
            print(delta.text, end="", flush=True)
    except KeyboardInterrupt:
        handle.abort()
    print()
    return "".join(pieces)


def _report(llm: LLM, explained: Iterable[Row] = ()) -> None:
    """Tables of what was served, by route, and of the KV blocks that it took, on standard error.

    Before them what was predicted of `explained` answers; after them what the cost model had to be corrected by.
    """
    stats, tables = llm.stats(), []
    if decisions := [_explained_cells(row) for row in explained if "decision" in row]:
        tables.append(format_table(EXPLAINED_COLUMNS, decisions))
    routes = [_route_cells(str(route or "no route"), summary) for route, summary in by_route(stats.logs).items()]
    whole = summarize(stats.logs)
    if len(routes) > 1:
        routes.append(_route_cells("all", whole))
    workers = [
        (number, worker.device, role.value, blocks.peak, blocks.used, blocks.total)
        for number, (worker, role, blocks) in enumerate(zip(llm.config.workers, stats.roles, stats.blocks))
    ]
    if routes:
        tables += [format_table(ROUTE_COLUMNS, routes), format_table(WORKER_COLUMNS, workers)]
    if whole.num_draft_tokens:
        tables.append(f"drafts: {whole.num_accepted_tokens} of {whole.num_draft_tokens} accepted")
    if routes and stats.drift:
        tables.append(format_table(("cost model of", "measured / predicted"), stats.drift.items()))
    if tables:
        print(*tables, sep="\n\n", file=sys.stderr)


def _explained_cells(row: Row) -> list[object]:
    taken, other = row["decision"]["taken"], row["decision"]["best_other"] or {}
    cells = [row["request_id"], row["route"] or "turned away"]
    for key in PREDICTED_KEYS:
        actual = row["metrics"][key]
        cells.append(f"{taken[key]:.1f} / " + ("-" if actual is None else f"{actual:.1f}"))
    return [*cells, *(other.get(key) for key in ("route", *PREDICTED_KEYS))]


def _route_cells(name: str, summary: Summary) -> list[object]:
    cells: list[object] = [name, f"{summary.num_completed}/{summary.num_requests}"]
    for latency in (summary.ttft_ms, summary.first_gap_ms, summary.tpot_ms, summary.e2e_ms):
        cells.append(f"{latency.p50:.1f} / {latency.p99:.1f}" if latency else None)
    return [*cells, summary.output_tokens_per_s]
