"""A collocated worker on each GPU through `LLM`: decode steps, prefill and offline throughput, beside their floors.

Random weights of the model's shape cost the same time as trained ones. A decode step is the median gap between tokens
while all sequences decode; prefill is the time to the first token of one prompt on an idle engine, the best of five.
Floors and vLLM's figures were measured for Qwen3-8B in bfloat16 on one H200 (docs/en/performance.md); rows of another
model or device have none. With several devices only the offline rows are measured, with as many times the requests.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
from report import Row, emit

from nanopd import LLM, SamplingParams

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
OFFLINE_FLOORS = {(256, 512, 128): (7200, 6656), (256, 1024, 512): (8400, 7775), (64, 4096, 256): (1660, 1591)}
NUM_STEPS = 48


def prompts(count: int, length: int, vocab_size: int) -> list[list[int]]:
    return np.random.default_rng(count + length).integers(10, vocab_size, (count, length)).tolist()


def greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)


def decode_step(llm: LLM, batch: int, context: int) -> float:
    """Milliseconds of a step while `batch` sequences of about `context` tokens decode."""
    llm.stats(reset=True)
    llm.generate(prompts(batch, context - NUM_STEPS // 2, llm.model_config.vocab_size), greedy(NUM_STEPS + 64), False)
    logs = llm.stats().logs
    start = max(log.token_times_s[0] for log in logs)  # all are prefilled
    gaps = [np.diff(log.token_times_s[log.token_times_s > start]) for log in logs]
    return float(np.median(np.concatenate([gap[4:NUM_STEPS] for gap in gaps])) * 1e3)


def prefill(llm: LLM, length: int) -> float:
    """Milliseconds to the first token of one prompt."""
    tokens = prompts(5, length, llm.model_config.vocab_size)
    return min(llm.generate([ids], greedy(1), False)[0].metrics.ttft_ms or 0.0 for ids in tokens)


def offline(llm: LLM, count: int, num_in: int, num_out: int) -> float:
    """Output tokens per second."""
    work = prompts(count, num_in, llm.model_config.vocab_size)
    start = time.perf_counter()
    llm.generate(work, greedy(num_out), False)
    return count * num_out / (time.perf_counter() - start)


def row(what: str, value: float, unit: str, reference: tuple[float | None, float | None]) -> Row:
    floor, peer = reference
    better = value / floor if unit == "tok/s" and floor else floor / value if floor else None
    return {"what": what, "value": round(value, 2), "unit": unit, "floor": floor, "of_floor": better, "vLLM 0.26": peer}


def latency_rows(llm: LLM, quick: bool) -> list[Row]:
    rows = []
    for batch, context in [(1, 512), (64, 512)] if quick else DECODE_FLOORS:
        value = decode_step(llm, batch, context)
        rows.append(row(f"decode step, {batch} x {context}", value, "ms", DECODE_FLOORS[batch, context]))
    for length, reference in PREFILL_FLOORS.items():
        rows.append(row(f"prefill, {length}", prefill(llm, length), "ms", reference))
    return rows


def gpu_name() -> str:
    import torch

    return torch.cuda.get_device_name()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="Qwen3-8B")
    parser.add_argument("--devices", nargs="+", default=["cuda:0"])
    parser.add_argument("--quick", action="store_true", help="a few rows")
    parser.add_argument("--json", type=Path, help="write the report here too")
    args = parser.parse_args()
    none = (None, None)
    start = time.perf_counter()
    with LLM(
        args.model,
        load_format="dummy",
        workers=[{"device": device} for device in args.devices],
        max_model_len=8448,
        max_num_seqs=256,
        max_num_batched_tokens=8192,
    ) as llm:
        rows = [row("start", time.perf_counter() - start, "s", none)]
        num_devices = len(args.devices)
        offline(llm, 8 * num_devices, 512, 16)  # warm-up
        rows += latency_rows(llm, args.quick) if num_devices == 1 else []
        for count, num_in, num_out in [(256, 512, 128)] if args.quick else OFFLINE_FLOORS:
            value = offline(llm, count * num_devices, num_in, num_out)
            reference = OFFLINE_FLOORS[count, num_in, num_out] if num_devices == 1 else none
            rows.append(row(f"offline, {count * num_devices} x {num_in}/{num_out}", value, "tok/s", reference))
    report = emit("engine", {"model": args.model, "devices": args.devices}, rows, device=gpu_name())
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
