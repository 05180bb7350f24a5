"""The hand-over from prefill to decode through `LLM`: one worker prefills, one decodes.

1. Hand-over of one request while nothing else runs: `moved` is the time from the parent's reading of the first token to
   its reading of the last acknowledgement (MOVING to MOVED in the request's log).
2. Decode steps of 60 sequences on the decode worker, the median gap between their tokens: alone, and while requests of
   1024 tokens, which decode one token each, are handed over to it at 24 requests/s. (A step then has up to 64 rows:
   the same graph.)

Bars are for Qwen3-8B in bfloat16 on two H200. Loads over time, beside two collocated replicas and vLLM's, are a sweep:
`python -m bench.run sweep --config 2xh200 --policies 1P1D 2M --points 1024/128@24,32 4096/256@6`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import numpy as np

from bench.lib.load import Job, Workload, engine_config, play, serving, serving_arguments, settings_of
from bench.lib.report import Row, abort_all, arguments, device_name, emit, greedy, median_and_p99, prompts
from nanopd import LLM
from nanopd.messages import EventKind, RequestLog

SETTINGS = ("model=Qwen3-8B", "load_format=dummy", "enable_prefix_caching=false")  # the same prompts may come again
MOVED_BARS = {4096: 1.5, 1024: 0.75}  # tokens of a step -> ms, of 2048 tokens
DECODE_CONTEXT = 512
MOVES_PER_S = 24.0


def row(what: str, p50: float | None, p99: float | None, unit: str = "ms", bar: float | None = None) -> Row:
    return {"what": what, "p50": p50, "p99": p99, "unit": unit, "bar": bar}


def span_ms(log: RequestLog, start: EventKind, end: EventKind) -> float:
    times = {event.kind: event.time_s for event in log.events}
    return (times[end] - times[start]) * 1e3


def handover_rows(llm: LLM, num_tokens: int, chunk: int, repeats: int) -> Iterator[Row]:
    """Of single hand-overs."""
    llm.stats(reset=True)
    for ids in prompts(repeats + 4, num_tokens, llm.model_config.vocab_size):
        llm.generate(ids, greedy(8), False)
    logs = llm.stats(reset=True).logs[4:]
    name = f"{num_tokens} tokens, chunks of {min(chunk, num_tokens)}"
    moved = [span_ms(log, EventKind.MOVING, EventKind.MOVED) for log in logs]
    gaps = [np.diff(log.token_times_s) * 1e3 for log in logs]
    yield row(f"moved, {name}", *median_and_p99(moved), bar=MOVED_BARS[chunk])
    yield row(f"first gap, {name}", *median_and_p99([gap[0] for gap in gaps]))
    yield row(f"decode step after it, {name}", *median_and_p99([np.median(gap[2:]) for gap in gaps]))


def decode_gaps(llm: LLM, num_decoding: int, jobs: Sequence[Job], seconds: float) -> np.ndarray:
    """[gaps] float64, ms between tokens of sequences that decode while `jobs` arrive, over `seconds`."""
    vocab_size, room = llm.model_config.vocab_size, llm.config.max_len_of(llm.model_config) - DECODE_CONTEXT
    decoding = [llm.submit(ids, greedy(room)) for ids in prompts(num_decoding, DECODE_CONTEXT, vocab_size)]
    time.sleep(1.0)  # until all decode
    start_s = time.monotonic()
    play(llm, jobs)
    time.sleep(max(0.0, start_s + seconds - time.monotonic()))
    end_s = time.monotonic()
    abort_all(decoding)
    times = [log.token_times_s for log in llm.stats(reset=True).logs]
    return np.concatenate([np.diff(t[(t > start_s) & (t < end_s)]) * 1e3 for t in times])


def interference_rows(llm: LLM, num_decoding: int, seconds: float) -> Iterator[Row]:
    moving = Workload("1024/2", MOVES_PER_S, seed=1).jobs(llm, seconds)
    cases = {"alone": [], f"beside {MOVES_PER_S:g} hand-overs/s": moving}
    gaps = {name: decode_gaps(llm, num_decoding, jobs, seconds) for name, jobs in cases.items()}
    for name, found in gaps.items():
        yield row(f"decode step, {num_decoding} x {DECODE_CONTEXT}, {name}", *median_and_p99(found))
    alone, beside = (float(np.median(found)) for found in gaps.values())
    yield row("slow-down of a decode step", beside / alone - 1, None, unit="share", bar=0.05)


def main() -> None:
    parser = serving_arguments(arguments(__doc__))
    parser.set_defaults(config="2xh200")
    parser.add_argument("--prompt", type=int, default=2048, help="tokens of the single hand-over")
    parser.add_argument("--decoding", type=int, default=60, help="sequences that decode beside hand-overs")
    parser.add_argument("--quick", action="store_true", help="less often, and shorter")
    args = parser.parse_args()
    base = engine_config(args, SETTINGS)
    workers = [{"device": w.device, "role": role} for w, role in zip(base.workers, ("prefill", "decode"))]
    rows: list[Row] = []
    for chunk in MOVED_BARS:
        config = base.replace(policy="disaggregated", workers=workers, max_num_batched_tokens=chunk)
        with serving(config) as llm:
            rows += handover_rows(llm, args.prompt, chunk, 4 if args.quick else 20)
            if chunk == max(MOVED_BARS):
                rows += interference_rows(llm, args.decoding, 2.0 if args.quick else 8.0)
    emit("handover", {"engine": settings_of(base)}, rows, device=device_name(config), path=args.json)


if __name__ == "__main__":
    main()
