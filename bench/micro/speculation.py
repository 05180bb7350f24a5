"""What drafts are worth: tokens per second of one request at a time, with and without `num_speculative_tokens`.

On the CPU the demo model answers prompts (of speculation.json) that ask for a quotation, for an edit of code, and for
text of its own (drawn, so that it does not fall into a loop). `--json` keeps the texts. With `--replay` of such a file,
a model of any shape with random weights, on a GPU, takes as long as if it said the same: everything is real (engine,
drafter, steps, their verification), but whatever a step samples counts as the recorded text's next tokens. `--context`
puts random tokens in front of the prompts then. `step_ms` is the mean time of a step by the worker's own clock.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import nanopd.core.results
import nanopd.engine.engine
from bench.lib.report import Row, arguments, emit, gpu_name, load
from nanopd import LLM, SamplingParams
from nanopd.checkpoints.demo_model import NAME as DEMO_MODEL
from nanopd.core.speculation import Drafter, rounds_of
from nanopd.messages import Work

PROMPTS = Path(__file__).with_suffix(".json")  # texts by kind


class Replay(Drafter):
    """Of one recorded answer; the sequence's own tokens make no difference."""

    __slots__ = ("_answer", "_num_observed")

    def __init__(self, answer: list[int], prompt_token_ids: list[int]) -> None:
        super().__init__(prompt_token_ids)
        self._answer, self._num_observed = answer, 0

    def observe(self, token_id: int) -> None:
        super().observe(self._answer[self._num_observed])
        self._num_observed += 1

    def rounds_of(self, slots: np.ndarray, drafts: dict[int, list[int]], token_ids: np.ndarray) -> list[np.ndarray]:
        end = self._num_observed + len(token_ids)
        return rounds_of(slots, drafts, np.array(self._answer[self._num_observed : end]))


def replay(answer: list[int], prompt_token_ids: list[int]) -> Drafter:
    """In place of the next request's drafter, which is the only one then."""
    drafter = Replay(answer, prompt_token_ids)
    nanopd.core.results.rounds_of = drafter.rounds_of
    return drafter


def answer_all(llm: LLM, samples: list[dict[str, Any]], args: argparse.Namespace) -> list[dict[str, Any]]:
    """The median run of each request, one after the other."""
    answer(llm, samples[0], args)  # warm-up
    runs = [[answer(llm, sample, args) for _ in range(args.repeats)] for sample in samples]
    return [sorted(of_sample, key=lambda run: run["tok_s"])[len(of_sample) // 2] for of_sample in runs]


def answer(llm: LLM, sample: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """Tokens, tokens per second after the first one, drafts, steps."""
    if args.replay:
        nanopd.engine.engine.Drafter = partial(replay, sample["answer"])  # type: ignore[misc, assignment]
        params = SamplingParams(temperature=0, max_tokens=len(sample["answer"]), ignore_eos=True)
    else:
        params = SamplingParams(temperature=0.8 * (sample["kind"] == "free"), seed=1, max_tokens=args.tokens)
    padding = np.random.default_rng(0).integers(1000, 40_000, args.context).tolist()
    steps: list[Work] = []
    llm.observe(steps.append)
    (output,) = llm.generate([padding + sample["prompt_token_ids"]], params, use_tqdm=False)
    log = llm.stats(reset=True).logs[-1]
    return {
        "token_ids": output.outputs[0].token_ids,
        "tok_s": (len(log.token_times_s) - 1) / (log.token_times_s[-1] - log.token_times_s[0]),
        "step_ms": 1e3 * float(np.mean([step.duration_s for step in steps if not step.num_prompt_tokens])),
        "drafts": log.num_draft_tokens,
        "accepted": log.num_accepted_tokens,
    }


def compared(drafts: int, accepted: int, plain_tok_s: float, tok_s: float) -> dict[str, float]:
    rates = {"plain_tok_s": round(plain_tok_s, 1), "tok_s": round(tok_s, 1), "ratio": round(tok_s / plain_tok_s, 3)}
    return {"drafts": drafts, "accepted": accepted, "share": round(accepted / max(drafts, 1), 2), **rates}


def make_row(sample: dict[str, Any], plain: dict[str, Any], drafted: dict[str, Any]) -> Row:
    return {
        "kind": sample["kind"],
        "prompt": len(sample["prompt_token_ids"]),
        "answer": len(plain["token_ids"]),
        **compared(drafted["drafts"], drafted["accepted"], plain["tok_s"], drafted["tok_s"]),
        "plain_step_ms": round(plain["step_ms"], 2),
        "step_ms": round(drafted["step_ms"], 2),
        "same_tokens": "answer" in sample or plain["token_ids"] == drafted["token_ids"],  # of a replay it means nothing
        "samples": {"answer": plain["token_ids"], **sample},
    }


def mean_of(kind: str, rows: list[Row]) -> Row:
    """Of the requests of a kind: all drafts, and the harmonic means of the rates."""
    of_kind = [row for row in rows if row["kind"] == kind]
    rates = (len(of_kind) / sum(1 / row[name] for row in of_kind) for name in ("plain_tok_s", "tok_s"))
    counts = (sum(row[name] for row in of_kind) for name in ("drafts", "accepted"))
    return {"kind": f"all of {kind}", **compared(*counts, *rates)}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--model", help="the demo model, or with --replay Qwen3-8B")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--drafts", type=int, default=7, help="num_speculative_tokens")
    parser.add_argument("--tokens", type=int, default=128, help="at most, of each answer")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--context", type=int, default=0, help="random tokens before each prompt")
    parser.add_argument("--replay", type=Path, help="what --json has written; its texts are said by random weights")
    args = parser.parse_args()
    model, load_format = (args.model or "Qwen3-8B", "dummy") if args.replay else (args.model or DEMO_MODEL, "auto")
    samples: list[dict[str, Any]] = [row["samples"] for row in load(args.replay)["rows"]] if args.replay else []
    prompts, answers = load(PROMPTS), []
    for num_drafts in (0, args.drafts):
        with LLM(
            model,
            load_format=load_format,
            workers=[{"device": args.device}],
            max_model_len=args.context + 2048,
            max_num_seqs=8,
            enable_prefix_caching=False,
            num_speculative_tokens=num_drafts,
        ) as llm:
            if not samples:
                chats = [(kind, [{"role": "user", "content": t}]) for kind, texts in prompts.items() for t in texts]
                samples = [{"kind": kind, "prompt_token_ids": llm.encode_chat(chat)} for kind, chat in chats]
            answers.append(answer_all(llm, samples, args))
    rows = [make_row(*parts) for parts in zip(samples, *answers, strict=True)]
    columns = [name for name in rows[0] if name != "samples"]
    config = {"model": model, "drafts": args.drafts, "tokens": args.tokens, "context": args.context}
    table = [*rows, *(mean_of(kind, rows) for kind in prompts)]
    config["replay"] = str(args.replay or "")
    emit("speculation", config, rows, columns, gpu_name(args.device), table, args.json)


if __name__ == "__main__":
    main()
