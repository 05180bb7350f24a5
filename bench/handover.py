"""The hand-over from prefill to decode through `LLM`: one worker prefills, one decodes, beside two collocated replicas.

1. Hand-over of one request while nothing else runs: `moved` is the time from the parent's reading of the first token to
   its reading of the last acknowledgement (MOVING to MOVED in the request's log). The first token comes after the last
   layer, the output head and the sampling, which `moved` leaves out; `head` is the time of the head's matrix product,
   measured alone, so the last layer's end to decode-ready is `moved` + `head` + the way of a result to the parent.
2. Decode steps of 60 sequences on the decode worker, the median gap between their tokens: alone, and while requests of
   1024 tokens, which decode one token each, are handed over to it at 24 requests/s. (A step then has up to 64 rows:
   the same graph.)
3. Open-loop Poisson arrivals, an arrival being when it was due. Figures of the requests of the window, after a warm-up.

Bars are for Qwen3-8B in bfloat16 on two H200; vLLM's figures are of two replicas of vLLM 0.26 there.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bench.lib.load import Job, Workload, play, serving
from bench.lib.report import Row, abort_all, arguments, emit, gpu_name, greedy, load, median_and_p99, prompts
from nanopd import LLM, EngineConfig
from nanopd.messages import EventKind, RequestLog
from nanopd.metrics import summarize

POLICIES = {"disaggregated": ("prefill", "decode"), "collocated": ("mixed", "mixed")}
CHUNK, SMALL_CHUNK = 4096, 1024  # tokens of a step
MOVED_BARS = {CHUNK: 1.5, SMALL_CHUNK: 0.75}  # ms, of 2048 tokens
NUM_DECODING, DECODE_CONTEXT = 60, 512
VLLM = Path(__file__).parent / "results" / "h200" / "vllm.json"


@dataclass(frozen=True, slots=True)
class Load:
    lengths: str  # IN/OUT tokens
    requests_per_s: float
    warm_up_s: float = 3.0
    window_s: float = 20.0

    def __str__(self) -> str:
        return f"{self.lengths} at {self.requests_per_s:g}/s"


LOADS = ("1024/128@24", "1024/128@32", "4096/256@6")
# bars of the disaggregated pair: p50, p99 or either
BARS = {
    ("1024/128 at 24/s", "TTFT"): "40 / 150",
    ("1024/128 at 32/s", "TTFT"): "65 / 240",
    ("4096/256 at 6/s", "TTFT"): "- / 520",
    ("1024/128 at 24/s", "first gap"): "15 / 20",
    ("1024/128 at 32/s", "first gap"): "15 / 20",
    ("1024/128 at 24/s", "ITL"): "- / 8",
    ("1024/128 at 32/s", "ITL"): "- / 8",
    ("4096/256 at 6/s", "ITL"): "- / 9",
}


@contextmanager
def pair_of(args: argparse.Namespace, policy: str, chunk: int) -> Iterator[LLM]:
    config = EngineConfig(
        args.model,
        load_format=args.load_format,
        policy=policy,
        workers=[{"device": d, "role": r} for d, r in zip(args.devices.split(","), POLICIES[policy], strict=True)],
        transfer=args.transfer,
        max_model_len=args.max_model_len,
        max_num_seqs=256,
        max_num_batched_tokens=chunk,
        enable_prefix_caching=False,  # the same prompts may come again
    )
    with serving(config) as llm:
        llm.generate(prompts(8, args.prompt, llm.model_config.vocab_size), greedy(8), False)
        llm.stats(reset=True)
        yield llm


def span_ms(log: RequestLog, start: EventKind, end: EventKind) -> float:
    times = {event.kind: event.time_s for event in log.events}
    return (times[end] - times[start]) * 1e3


def row(what: str, p50: float | None, p99: float | None, unit: str = "ms", **more: object) -> Row:
    return {"what": what, "p50": p50, "p99": p99, "unit": unit, "bar": None, "vLLM": None, **more}


def handover_rows(llm: LLM, num_tokens: int, chunk: int, repeats: int) -> list[Row]:
    """Of single hand-overs."""
    for ids in prompts(repeats + 2, num_tokens, llm.model_config.vocab_size):
        llm.generate(ids, greedy(8), False)
    logs = llm.stats(reset=True).logs[2:]
    name = f"{num_tokens} tokens, chunks of {min(chunk, num_tokens)}"
    moved = [span_ms(log, EventKind.MOVING, EventKind.MOVED) for log in logs]
    gaps = [np.diff(log.token_times_s) * 1e3 for log in logs]
    return [
        row(f"moved, {name}", *median_and_p99(moved), bar=MOVED_BARS.get(chunk)),
        row(f"first gap, {name}", *median_and_p99([gap[0] for gap in gaps])),
        row(f"decode step after it, {name}", *median_and_p99([np.median(gap[2:]) for gap in gaps])),
    ]


def head_ms(llm: LLM, device: str) -> float:
    """The matrix product of the output head for one token, by itself."""
    import torch

    model, dtype = llm.model_config, getattr(torch, llm.model_config.dtype)
    weight = torch.zeros(model.vocab_size, model.hidden_size, dtype=dtype, device=device)
    x = torch.zeros(1, model.hidden_size, dtype=dtype, device=device)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    for repeats in (3, 20):
        events[0].record()
        for _ in range(repeats):
            torch.nn.functional.linear(x, weight)
        events[1].record()
        torch.cuda.synchronize()
    return events[0].elapsed_time(events[1]) / repeats


def decode_gaps(llm: LLM, num_decoding: int, jobs: Sequence[Job], seconds: float) -> np.ndarray:
    """[gaps] float64, ms between tokens of sequences that decode while `jobs` arrive, over `seconds`."""
    vocab_size, room = llm.model_config.vocab_size, llm.config.max_model_len - DECODE_CONTEXT
    decoding = [llm.submit(ids, greedy(room)) for ids in prompts(num_decoding, DECODE_CONTEXT, vocab_size)]
    time.sleep(1.0)  # until all decode
    start_s = time.monotonic()
    play(llm, jobs)
    time.sleep(max(0.0, start_s + seconds - time.monotonic()))
    end_s = time.monotonic()
    abort_all(decoding)
    times = [log.token_times_s for log in llm.stats(reset=True).logs]
    return np.concatenate([np.diff(t[(t > start_s) & (t < end_s)]) * 1e3 for t in times])


def interference_rows(llm: LLM, load: Load, num_decoding: int, seconds: float) -> list[Row]:
    moving = Workload(f"{load.lengths.partition('/')[0]}/2", load.requests_per_s, seed=1).jobs(llm, seconds)
    cases = {"alone": [], f"beside {load.requests_per_s:g} hand-overs/s": moving}
    gaps = {name: decode_gaps(llm, num_decoding, jobs, seconds) for name, jobs in cases.items()}
    what = f"decode step, {num_decoding} x {DECODE_CONTEXT}"
    alone, beside = (float(np.median(g)) for g in gaps.values())
    rows = [row(f"{what}, {name}", *median_and_p99(g)) for name, g in gaps.items()]
    return [*rows, row("slow-down of a decode step", beside / alone - 1, None, unit="share", bar=0.05)]


def vllm_figures() -> dict[tuple[str, str], str]:
    """p50 / p99 of two replicas, by load and figure."""
    names = {"TTFT": "ttft_ms", "ITL": "itl_ms", "TPOT": "tpot_ms"}
    return {
        (f"{of['workload']} at {of['rate']}/s", name): f"{of[key]['p50']} / {of[key]['p99']}"
        for of in load(VLLM)["rows"]
        for name, key in names.items()
    }


def load_rows(llm: LLM, policy: str, load: Load) -> list[Row]:
    end_s = load.warm_up_s + load.window_s
    run = play(llm, Workload(load.lengths, load.requests_per_s, seed=1).jobs(llm, end_s), f"{policy}, {load}")
    of = summarize(run.logs, window_s=(run.start_s + load.warm_up_s, run.start_s + end_s))
    figures = {"TTFT": of.ttft_ms, "first gap": of.first_gap_ms, "ITL": of.itl_without_first_gap_ms, "TPOT": of.tpot_ms}
    bars, peers = BARS if policy == "disaggregated" else {}, vllm_figures()
    rows = []
    for name, found in figures.items():
        assert found is not None
        shown = {"bar": bars.get((str(load), name)), "vLLM": peers.get((str(load), name))}
        rows.append(row(f"{policy}, {load}: {name}", found.p50, found.p99, **shown))
    output = row(f"{policy}, {load}: output", of.output_tokens_per_s, None, unit="tok/s", requests=of.num_completed)
    return [*rows, output]


def loads_of(args: argparse.Namespace) -> list[Load]:
    texts = args.loads or LOADS
    window_s = args.window or (8.0 if args.quick else 20.0)
    parts = [text.partition("@") for text in (texts[:1] if args.quick else texts)]
    return [Load(lengths, float(rate), min(3.0, window_s), window_s) for lengths, _, rate in parts]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--model", default="Qwen3-8B")
    parser.add_argument("--load-format", default="dummy")
    parser.add_argument("--devices", default="cuda:0,cuda:1", help="of the two workers")
    parser.add_argument("--policies", nargs="+", default=list(POLICIES), choices=POLICIES)
    parser.add_argument("--transfer", default="auto")
    parser.add_argument("--max-model-len", type=int, default=8448)
    parser.add_argument("--chunk", type=int, default=CHUNK, help="tokens of a step")
    parser.add_argument("--prompt", type=int, default=2048, help="tokens of the single hand-over")
    parser.add_argument("--decoding", type=int, default=NUM_DECODING, help="sequences that decode beside hand-overs")
    parser.add_argument("--loads", nargs="+", help="IN/OUT@RATE, for others than the three of the bars")
    parser.add_argument("--window", type=float, help="seconds of each load")
    parser.add_argument("--quick", action="store_true", help="the first load only, and shorter")
    args = parser.parse_args()
    loads, repeats, device = loads_of(args), 4 if args.quick else 20, args.devices.split(",")[0]
    rows: list[Row] = []
    for policy in args.policies:
        with pair_of(args, policy, args.chunk) as llm:
            if policy == "disaggregated":
                rows += handover_rows(llm, args.prompt, args.chunk, repeats)
                rows += interference_rows(llm, loads[0], args.decoding, 2.0 if args.quick else 8.0)
            for each in loads:
                rows += load_rows(llm, policy, each)
        if policy == "disaggregated":
            with pair_of(args, policy, SMALL_CHUNK) as llm:
                rows += handover_rows(llm, args.prompt, SMALL_CHUNK, repeats)
    if device != "cpu":
        rows.append(row("head", head_ms(llm, device), None))
    settings = {"model": args.model, "devices": args.devices, "transfer": args.transfer, "chunk": args.chunk}
    columns = ["what", "p50", "p99", "unit", "bar", "vLLM"]
    emit("handover", settings, rows, columns, gpu_name(device), path=args.json)


if __name__ == "__main__":
    main()
