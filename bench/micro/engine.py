"""A collocated worker on each GPU through `LLM`: decode steps, prefill and offline throughput, beside their floors.

Random weights of the model's shape cost the same time as trained ones. A decode step is the median gap between tokens
while all sequences decode; prefill is the time to the first token of one prompt on an idle engine, the best of five.
Floors and vLLM's figures were measured for Qwen3-8B in bfloat16 on one H200 (docs/en/performance.md); rows of another
model or device have none. With several devices only the offline rows are measured, with as many times the requests.
Rows of sampled steps say how fast they are against the greedy step of the same size (`of_greedy`).
`idle` is the share of a second of steady decoding in which the GPU had nothing to do, by the worker's events.
`--peer transformers` runs the first offline row through its continuous batching too, in a process of its own: before,
or at the same time on another GPU (`--peer-device`).
"""

from __future__ import annotations

import math
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import numpy as np

from bench.lib.report import Row, abort_all, arguments, emit, gpu_name, greedy, prompts, seconds_of
from nanopd import LLM, EngineConfig

# batch, context -> floor ms, vLLM 0.26 ms
DECODE_FLOORS = {
    (1, 512): (4.18, 5.24),
    (8, 512): (4.31, 5.60),
    (16, 512): (4.5, None),
    (32, 512): (4.82, 6.14),
    (64, 512): (5.44, 6.97),
    (128, 512): (6.98, 8.84),
    (256, 512): (11.6, 13.9),
    (1, 4096): (4.30, 5.42),
    (32, 4096): (8.79, 9.84),
}
PREFILL_FLOORS = {512: (12.7, 14.8), 2048: (48.6, 51.6), 8192: (212, 219)}  # tokens -> floor ms, vLLM ms
PEER_WORK = (256, 512, 128)
MANY_PROMPTS = (32, 2048, 42_400, 42_400)  # count, tokens, floor and vLLM in tokens/s
OFFLINE_FLOORS = {(256, 512, 128): (7200, 6656), (256, 1024, 512): (8400, 7775), (64, 4096, 256): (1660, 1591)}
NUM_STEPS = 48
LIKELY = {"temperature": 0.8, "top_p": 0.95}
PENALTIES = {"presence_penalty": 0.5, "frequency_penalty": 0.2, "repetition_penalty": 1.1}
SAMPLED: dict[str, dict[str, Any]] = {
    "top-k 50, top-p 0.95": {**LIKELY, "top_k": 50},
    "the same and 5 logprobs": {**LIKELY, "top_k": 50, "logprobs": 5},
    "top-p 0.95, penalties and 5 logprobs": {**LIKELY, "logprobs": 5, **PENALTIES},
}
NONE = (None, None)
REFERENCES = ("floor", "of_floor", "vLLM 0.26")


def decode_step(llm: LLM, batch: int, context: int, **params: Any) -> float:
    """Milliseconds of a step while `batch` sequences of about `context` tokens decode."""
    llm.stats(reset=True)
    work = prompts(batch, context - NUM_STEPS // 2, llm.model_config.vocab_size)
    llm.generate(work, greedy(NUM_STEPS + 64, **params), False)
    logs = llm.stats().logs
    start = max(log.token_times_s[0] for log in logs)  # all are prefilled
    gaps = [np.diff(log.token_times_s[log.token_times_s > start]) for log in logs]
    return float(np.median(np.concatenate([gap[4:NUM_STEPS] for gap in gaps])) * 1e3)


def prefill(llm: LLM, length: int) -> float:
    """Milliseconds to the first token of one prompt."""
    tokens = prompts(5, length, llm.model_config.vocab_size)
    return min(llm.generate([ids], greedy(1), False)[0].metrics.ttft_ms or 0.0 for ids in tokens)


def idle(llm: LLM, batch: int, context: int) -> float:
    """Share of a second in which the GPU did nothing, while `batch` sequences of about `context` tokens decode."""
    work = prompts(batch, context, llm.model_config.vocab_size)
    handles = [llm.submit(ids, greedy(1024), stream=True) for ids in work]
    for handle in handles:
        next(iter(handle))
    llm.stats(reset=True)
    start = time.perf_counter()
    time.sleep(1.0)
    stats, seconds = llm.stats(), time.perf_counter() - start
    abort_all(handles)
    return 1 - stats.busy_s[0] / seconds


def offline(llm: LLM, count: int, num_in: int, num_out: int) -> float:
    """Output tokens per second of requests that are submitted at once."""
    work = prompts(count, num_in, llm.model_config.vocab_size)
    return count * num_out / seconds_of(lambda: llm.generate(work, greedy(num_out), False))


def peer_transformers(model: str, device: str, count: int, num_in: int, num_out: int) -> float:
    """Output tokens per second of `generate_batch` with random weights."""
    from bench.lib.peer import Peer  # it imports torch and transformers, in the process of its own

    peer = Peer(EngineConfig(model, load_format="dummy", workers=[{"device": device}]))
    work = [prompts(n, num_in, peer.model_config.vocab_size) for n in (8, count)]
    peer.generate_continuously(work[0], num_out)
    start = time.perf_counter()
    return peer.generate_continuously(work[1], num_out) / (time.perf_counter() - start)


def row(what: str, value: float, unit: str, reference: tuple[float | None, float | None]) -> Row:
    floor, peer = reference
    better = value / floor if unit == "tok/s" and floor else floor / value if floor else None
    cells = {"what": what, "value": round(value, 2), "unit": unit}
    return {**cells, "floor": floor, "of_floor": better, "vLLM 0.26": peer, "of_greedy": None}


def latency_rows(llm: LLM, quick: bool) -> list[Row]:
    rows: list[Row] = []
    steps = {work: decode_step(llm, *work) for work in ([(1, 512), (64, 512)] if quick else DECODE_FLOORS)}
    for (batch, context), value in steps.items():
        rows.append(row(f"decode step, {batch} x {context}", value, "ms", DECODE_FLOORS[batch, context]))
    for batch in () if quick else (1, 64):
        rows.append(row(f"idle, {batch} x 512", 100 * idle(llm, batch, 512), "%", NONE))
    for name, params in {} if quick else SAMPLED.items():
        value = decode_step(llm, 64, 512, **params)
        cells = row(f"decode step, 64 x 512, {name}", value, "ms", NONE)
        rows.append({**cells, "of_greedy": steps[64, 512] / value})
    for length, reference in PREFILL_FLOORS.items():
        rows.append(row(f"prefill, {length}", prefill(llm, length), "ms", reference))
    count, length, *reference = MANY_PROMPTS
    rows.append(row(f"prefill, {count} x {length}", length * offline(llm, count, length, 1), "tok/s", tuple(reference)))
    return rows


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--model", default="Qwen3-8B")
    parser.add_argument("--devices", nargs="+", default=["cuda:0"])
    parser.add_argument("--quick", action="store_true", help="a few rows")
    parser.add_argument("--peer", choices=["transformers"])
    parser.add_argument("--peer-device", help="of another GPU than the engine's")
    args = parser.parse_args()
    num_devices = len(args.devices)
    peer = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
    work = (args.model, args.peer_device or args.devices[0], *PEER_WORK)
    figure = peer.submit(peer_transformers, *work) if args.peer else None
    if args.peer_device is None:
        peer.shutdown()  # its memory is free then
    start = time.perf_counter()
    with LLM(
        args.model,
        load_format="dummy",
        workers=[{"device": device} for device in args.devices],
        max_model_len=8448,
        max_num_seqs=256,
        max_num_batched_tokens=8192,
        enable_prefix_caching=False,  # the same prompts may come again
    ) as llm:
        rows = [row("start", time.perf_counter() - start, "s", NONE)]
        offline(llm, 8 * num_devices, 512, 16)  # warm-up
        rows += latency_rows(llm, args.quick) if num_devices == 1 else []
        for count, num_in, num_out in [(256, 512, 128)] if args.quick else OFFLINE_FLOORS:
            value = offline(llm, count * num_devices, num_in, num_out)
            reference = OFFLINE_FLOORS[count, num_in, num_out] if num_devices == 1 else NONE
            rows.append(row(f"offline, {count * num_devices} x {num_in}/{num_out}", value, "tok/s", reference))
    if figure is not None:
        count, num_in, num_out = PEER_WORK
        what = f"transformers, offline, {count} x {num_in}/{num_out}"
        rows.append(row(what, math.nan if figure.exception() else figure.result(), "tok/s", NONE))
    device = gpu_name(args.devices[0])
    if args.model != "Qwen3-8B" or "H200" not in (device or ""):
        rows = [{name: value for name, value in found.items() if name not in REFERENCES} for found in rows]
    emit("engine", {"model": args.model, "devices": args.devices}, rows, device=device, path=args.json)


if __name__ == "__main__":
    main()
