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
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from load import Job, Workload, greedy, play
from report import Row, emit

from nanopd import LLM
from nanopd.messages import EventKind, RequestLog
from nanopd.metrics import Percentiles, summarize

POLICIES = {"disaggregated": ("prefill", "decode"), "collocated": ("mixed", "mixed")}
CHUNK, SMALL_CHUNK = 4096, 1024  # tokens of a step
MOVED_BARS = {CHUNK: 1.5, SMALL_CHUNK: 0.75}  # ms, of 2048 tokens
NUM_DECODING, DECODE_CONTEXT = 60, 512


@dataclass(frozen=True, slots=True)
class Load:
    num_in: int
    num_out: int
    requests_per_s: float
    warm_up_s: float = 3.0
    window_s: float = 20.0

    def __str__(self) -> str:
        return f"{self.num_in}/{self.num_out} at {self.requests_per_s:g}/s"


LOADS = (Load(1024, 128, 24), Load(1024, 128, 32), Load(4096, 256, 6))
# bars of the disaggregated pair: p50, p99 or either; None: there is none
BARS: dict[tuple[str, str], tuple[float | None, float | None]] = {
    ("1024/128 at 24/s", "TTFT"): (40, 150),
    ("1024/128 at 32/s", "TTFT"): (65, 240),
    ("4096/256 at 6/s", "TTFT"): (None, 520),
    ("1024/128 at 24/s", "first gap"): (15, 20),
    ("1024/128 at 32/s", "first gap"): (15, 20),
    ("1024/128 at 24/s", "ITL"): (None, 8),
    ("1024/128 at 32/s", "ITL"): (None, 8),
    ("4096/256 at 6/s", "ITL"): (None, 9),
}
PEERS: dict[tuple[str, str], tuple[float | None, float | None]] = {
    ("1024/128 at 24/s", "TTFT"): (40, 97),
    ("1024/128 at 32/s", "TTFT"): (43, 108),
    ("4096/256 at 6/s", "TTFT"): (109, 444),
    ("1024/128 at 24/s", "ITL"): (5.9, 33),
    ("1024/128 at 32/s", "ITL"): (6.3, 35),
    ("4096/256 at 6/s", "ITL"): (6.9, 90),
    ("1024/128 at 24/s", "TPOT"): (7.5, 9.3),
    ("1024/128 at 32/s", "TPOT"): (8.7, 11.0),
    ("4096/256 at 6/s", "TPOT"): (9.5, 14.8),
}


def prompts(count: int, length: int, vocab_size: int) -> list[list[int]]:
    return np.random.default_rng(count + length).integers(10, vocab_size, (count, length)).tolist()


@contextmanager
def serving(args: argparse.Namespace, policy: str, chunk: int) -> Iterator[LLM]:
    workers = [{"device": d, "role": r} for d, r in zip(args.devices.split(","), POLICIES[policy], strict=True)]
    with LLM(
        args.model,
        load_format=args.load_format,
        policy=policy,
        workers=workers,
        transfer=args.transfer,
        max_model_len=args.max_model_len,
        max_num_seqs=256,
        max_num_batched_tokens=chunk,
        enable_prefix_caching=False,  # the same prompts may come again
    ) as llm:
        warm_up = prompts(8, args.prompt, llm.model_config.vocab_size)
        llm.generate(warm_up, greedy(8), False)
        llm.stats(reset=True)
        yield llm


def take_logs(llm: LLM) -> list[RequestLog]:
    return llm.stats(reset=True).logs


def span_ms(log: RequestLog, start: EventKind, end: EventKind) -> float:
    times = {event.kind: event.time_s for event in log.events}
    return (times[end] - times[start]) * 1e3


def row(what: str, p50: float, p99: float | None, unit: str = "ms", **more: object) -> Row:
    return {"what": what, "p50": p50, "p99": p99, "unit": unit, "bar": None, "vLLM": None, **more}


def percentile_row(what: str, values: Sequence[float], **more: object) -> Row:
    found = Percentiles.of(np.array(values))
    assert found is not None
    return row(what, found.p50, found.p99, **more)


# ------------------------------------------------------------------------------------------------- one hand-over


def handover_rows(llm: LLM, num_tokens: int, chunk: int, repeats: int) -> list[Row]:
    for ids in prompts(repeats + 2, num_tokens, llm.model_config.vocab_size):
        llm.generate(ids, greedy(8), False)
    logs = take_logs(llm)[2:]
    name = f"{num_tokens} tokens, chunks of {min(chunk, num_tokens)}"
    moved = [span_ms(log, EventKind.MOVING, EventKind.MOVED) for log in logs]
    gaps = [np.diff(log.token_times_s) * 1e3 for log in logs]
    return [
        percentile_row(f"moved, {name}", moved, bar=MOVED_BARS.get(chunk)),
        percentile_row(f"first gap, {name}", [float(gap[0]) for gap in gaps]),
        percentile_row(f"decode step after it, {name}", [float(np.median(gap[2:])) for gap in gaps]),
    ]


def head_row(llm: LLM, device: str) -> Row | None:
    """The matrix product of the output head for one token, by itself."""
    if device == "cpu":
        return None
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
    return row("head", events[0].elapsed_time(events[1]) / repeats, None)


# ------------------------------------------------------------------------------------------------- interference


def decode_gaps(llm: LLM, num_decoding: int, jobs: Sequence[Job], seconds: float) -> list[float]:
    """Gaps between tokens, in ms, of sequences that decode while `jobs` arrive, over `seconds`."""
    vocab_size, room = llm.model_config.vocab_size, llm.config.max_model_len - DECODE_CONTEXT
    decoding = [llm.submit(ids, greedy(room)) for ids in prompts(num_decoding, DECODE_CONTEXT, vocab_size)]
    time.sleep(1.0)  # until all decode
    start_s = time.monotonic()
    play(llm, jobs)
    time.sleep(max(0.0, start_s + seconds - time.monotonic()))
    end_s = time.monotonic()
    for handle in decoding:
        handle.abort()
    for handle in decoding:
        handle.result()
    times = [log.token_times_s for log in take_logs(llm)]
    return np.concatenate([np.diff(t[(t > start_s) & (t < end_s)]) * 1e3 for t in times]).tolist()


def interference_rows(llm: LLM, load: Load, num_decoding: int, seconds: float) -> list[Row]:
    moving = Workload(f"{load.num_in}/2", load.requests_per_s, seed=1).jobs(llm, seconds)
    cases = {"alone": [], f"beside {load.requests_per_s:g} hand-overs/s": moving}
    gaps = {name: decode_gaps(llm, num_decoding, jobs, seconds) for name, jobs in cases.items()}
    rows = [percentile_row(f"decode step, {num_decoding} x {DECODE_CONTEXT}, {name}", g) for name, g in gaps.items()]
    alone, beside = (float(np.median(g)) for g in gaps.values())
    return [*rows, row("slow-down of a decode step", beside / alone - 1, None, unit="share", bar=0.05)]


# ------------------------------------------------------------------------------------------------------- loads


def load_rows(llm: LLM, policy: str, load: Load) -> list[Row]:
    end_s = load.warm_up_s + load.window_s
    jobs = Workload(f"{load.num_in}/{load.num_out}", load.requests_per_s, seed=1).jobs(llm, end_s)
    run = play(llm, jobs, f"{policy}, {load}")
    summary = summarize(run.logs, window_s=(run.start_s + load.warm_up_s, run.start_s + end_s))
    figures = {
        "TTFT": summary.ttft_ms,
        "first gap": summary.first_gap_ms,
        "ITL": summary.itl_without_first_gap_ms,
        "TPOT": summary.tpot_ms,
    }
    rows = []
    for name, found in figures.items():
        assert found is not None
        bars, peers = (table.get((str(load), name), (None, None)) for table in (BARS, PEERS))
        shown = {"bar": slashed(*bars) if policy == "disaggregated" else None, "vLLM": slashed(*peers)}
        rows.append(row(f"{policy}, {load}: {name}", found.p50, found.p99, **shown))
    rate = summary.output_tokens_per_s
    return [*rows, row(f"{policy}, {load}: output", rate, None, unit="tok/s", requests=summary.num_completed)]


def slashed(p50: float | None, p99: float | None) -> str | None:
    return None if (p50, p99) == (None, None) else f"{p50 or '-'} / {p99 or '-'}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
    parser.add_argument("--json", type=Path, help="write the report here too")
    args = parser.parse_args()
    loads = [parse_load(text) for text in args.loads] if args.loads else list(LOADS)
    if args.quick or args.window:
        window_s = args.window or 8.0
        kept = loads[:1] if args.quick else loads
        loads = [Load(x.num_in, x.num_out, x.requests_per_s, min(3.0, window_s), window_s) for x in kept]
    rows: list[Row] = []
    for policy in args.policies:
        with serving(args, policy, args.chunk) as llm:
            if policy == "disaggregated":
                rows += handover_rows(llm, args.prompt, args.chunk, 4 if args.quick else 20)
                rows += interference_rows(llm, loads[0], args.decoding, 2.0 if args.quick else 8.0)
            for load in loads:
                rows += load_rows(llm, policy, load)
            model = llm
        if policy == "disaggregated":
            with serving(args, policy, SMALL_CHUNK) as llm:
                rows += handover_rows(llm, args.prompt, SMALL_CHUNK, 4 if args.quick else 20)
    device = args.devices.split(",")[0]
    head = head_row(model, device)
    rows += [head] if head else []
    settings = {"model": args.model, "devices": args.devices, "transfer": args.transfer, "chunk": args.chunk}
    columns = ["what", "p50", "p99", "unit", "bar", "vLLM"]
    report = emit("handover", settings, rows, columns, device=device_name(device))
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")


def parse_load(text: str) -> Load:
    lengths, _, rate = text.partition("@")
    num_in, _, num_out = lengths.partition("/")
    return Load(int(num_in), int(num_out), float(rate))


def device_name(device: str) -> str | None:
    if device == "cpu":
        return None
    import torch

    return torch.cuda.get_device_name(device)


if __name__ == "__main__":
    main()
