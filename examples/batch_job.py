"""A batch job that embeds nanopd: rows of JSONL in, answers out in the same order, and on again after an interruption.

    python examples/batch_job.py prompts.jsonl answers.jsonl --config cpu-demo --max-tokens 16

A row is {"prompt": ...}, {"prompt_token_ids": [...]} or {"messages": [...]}, with sampling parameters if it wants. The
answers that are there already are kept: the same command after Ctrl-C, or a kill, goes on with the first row that has
none. Without an input file of that name, one of 10,000 rows is made.
"""

from __future__ import annotations

import argparse
import json
from itertools import islice
from pathlib import Path
from typing import Any

from nanopd import LLM
from nanopd.frontend.jsonl import serve_rows


class Answers:
    """The output file, opened behind its last whole line."""

    def __init__(self, path: Path) -> None:
        path.touch()
        whole = path.read_bytes().rpartition(b"\n")[0]
        self.num_done = whole.count(b"\n") + bool(whole)
        self._file = path.open("r+", encoding="utf-8")
        self._file.truncate(len(whole) + bool(whole))
        self._file.seek(0, 2)
        self._offset = self.num_done
        self._is_cut = False

    def write(self, row: dict[str, Any]) -> None:
        """Add an answer, unless it, or one before it, was cut short by an interruption."""
        self._is_cut |= row.get("finish_reason") == "abort"
        if not self._is_cut:
            line = json.dumps({**row, "line": row["line"] + self._offset}, ensure_ascii=False)
            self._file.write(f"{line}\n")
            self._file.flush()
            self.num_done += 1


def make_rows(path: Path, count: int = 10_000) -> None:
    rows = ({"prompt": f"Question {i}: what is {i % 97} + {i % 89}? Answer:"} for i in range(count))
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--config", default="cpu-demo")
    parser.add_argument("--model", help="another one than the configuration's")
    parser.add_argument("--max-tokens", type=int, default=16)
    args = parser.parse_args()
    if not args.input.exists():
        make_rows(args.input)
    answers = Answers(args.output)
    overrides = {"model": args.model, "max_model_len": None} if args.model else {}
    with args.input.open(encoding="utf-8") as lines, LLM(config=args.config, **overrides) as llm:
        print(f"{answers.num_done} answers are there")
        window = 4 * llm.config.max_num_seqs * len(llm.config.workers)
        rest = islice((line for line in lines if line.strip()), answers.num_done, None)
        try:
            num_failed = serve_rows(llm, rest, {"temperature": 0, "max_tokens": args.max_tokens}, answers.write, window)
        except KeyboardInterrupt:
            print(f"interrupted with {answers.num_done} answers; the same command goes on")
            return 130
    print(f"{answers.num_done} answers, {num_failed} of the new ones with an error")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
