"""The job `run`: prompts from JSONL, from --prompt or from a built-in demo, their answers, and a report; or a chat."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections import deque
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

import nanopd
from nanopd.commands import FAILED
from nanopd.commands.chat import chat
from nanopd.commands.report import report
from nanopd.config import PREDICTING, EngineConfig
from nanopd.errors import ConfigError
from nanopd.frontend.jsonl import Row, serve_rows
from nanopd.request import PLAIN_FIELDS, SamplingParams

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
MAX_EXPLAINED = 1000  # of the latest requests
PENALTIES = ("presence_penalty", "frequency_penalty", "repetition_penalty")
SAMPLING_OPTIONS = ("max_tokens", "temperature", "top_p", "top_k", "min_p", *PENALTIES, "seed")
SAMPLING_DEFAULTS = {"max_tokens": 128, "temperature": 0.0}  # where the command's default is not SamplingParams' own


def add_options(parser: argparse.ArgumentParser, source: argparse._MutuallyExclusiveGroup) -> None:
    source.add_argument("--input", metavar="JSONL", help="rows to serve; - for standard input")
    source.add_argument("--prompt", action="append", metavar="TEXT", help="text to continue as it is; repeatable")
    parser.add_argument("--output", metavar="JSONL", help="where answers go; - (and the default) is standard output")
    parser.add_argument("--explain", action="store_true", help="a table of what the policy predicted, and what came")
    sampling = parser.add_argument_group("sampling, where a row does not say otherwise")
    for name in SAMPLING_OPTIONS:
        field = PLAIN_FIELDS[name]
        kind, default = float if field.type == "float" else int, SAMPLING_DEFAULTS.get(name, field.default)
        text = f"{field.metadata['meaning']} (default: %(default)s)"
        sampling.add_argument(f"--{name.replace('_', '-')}", type=kind, default=default, help=text)


def run(args: argparse.Namespace, config: EngineConfig) -> int:
    sampling = {name: getattr(args, name) for name in SAMPLING_OPTIONS}
    params = SamplingParams(**sampling)
    is_chat = not (args.input or args.prompt or args.output) and sys.stdin.isatty() and sys.stdout.isatty()
    if args.explain and config.policy not in PREDICTING:
        raise ConfigError("--explain", config.policy, f"a policy that predicts: {', '.join(PREDICTING)}")
    explained: deque[Row] = deque(maxlen=MAX_EXPLAINED if args.explain else 0)
    with contextlib.ExitStack() as stack:
        source = stack.enter_context(_open(args.input, "rb", sys.stdin.buffer)) if args.input else None
        target = stack.enter_context(_open(args.output, "w", sys.stdout))
        llm = stack.enter_context(nanopd.LLM(config=config, show_progress=sys.stderr.isatty()))
        stack.callback(report, llm, explained)
        if is_chat:
            chat(llm, params)
            return 0
        window = 4 * config.max_num_seqs * len(config.workers)

        def answer(row: Row) -> None:
            explained.append(row)
            line = json.dumps(row, ensure_ascii=False) if args.input or args.output else _as_text(row)
            tqdm.write(line, file=target)
            target.flush()

        num_failed = serve_rows(llm, source or _own_rows(args, llm), sampling, answer, window)
        return FAILED if num_failed else 0


def _open(path: str | None, mode: str, standard: IO[Any]) -> contextlib.AbstractContextManager[IO[Any]]:
    if path is None or path == "-":
        return contextlib.nullcontext(standard)
    return Path(path).open(mode, encoding=None if "b" in mode else "utf-8")


def _own_rows(args: argparse.Namespace, llm: nanopd.LLM) -> list[str]:
    """Rows of --prompt, or of the demo: chats if the model knows chats, token ids if it has no tokenizer."""
    rows: list[Row]
    if args.prompt or (llm.tokenizer is not None and llm.tokenizer.chat_template is None):
        rows = [{"prompt": text} for text in args.prompt or DEMO_PROMPTS]
    elif llm.tokenizer is None:
        rows = [{"prompt_token_ids": list(range(1, 8 + n))} for n in range(len(DEMO_PROMPTS))]
    else:
        rows = [{"messages": [{"role": "user", "content": text}]} for text in DEMO_PROMPTS]
    return [json.dumps(row) for row in rows]


def _as_text(row: Row) -> str:
    """An answer for people: its route, the question and the text."""
    asked = row["messages"][-1]["content"] if "messages" in row else row.get("prompt") or row["prompt_token_ids"]
    answer = row.get("error") or row["text"] or row["token_ids"]
    return f"[{row.get('route') or 'no route'}] {asked}\n{answer}\n"
