"""Profile this machine, fit the cost model, serve a minute of load with the adaptive policy, and write a summary.

    python examples/adaptive.py --config cpu-demo --summary summary.md

Every worker may prefill and decode; the policy predicts each route's latencies and chooses. Parameters that were
measured before are used again (see `python launch.py profile`). The load is Poisson, of short prompts.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

from nanopd import LLM, SamplingParams
from nanopd.lab.workload import FixedLength, UniformLength, prompt_token_ids, synthetic_requests
from nanopd.metrics import SLO, Summary, by_route, summarize

ROOT = Path(__file__).parents[1]
COLUMNS = "| route | requests | TTFT p50 / p99, ms | first gap | TPOT | tokens/s | within service levels |"


def serve(llm: LLM, rate: float, seconds: float) -> None:
    """Requests of 32 to 128 tokens in and 32 out, each submitted when it is due."""
    work = synthetic_requests(int(rate * seconds), UniformLength(32, 128), FixedLength(32), rate, seed=1)
    start_s = time.monotonic()
    handles = []
    for request in work:
        due_s = start_s + request.arrival_s
        time.sleep(max(0.0, due_s - time.monotonic()))
        params = SamplingParams(temperature=0, max_tokens=request.num_output_tokens, ignore_eos=True)
        prompt = prompt_token_ids(request, llm.model_config.vocab_size)
        handles.append(llm.submit(prompt, params, arrival_time_s=due_s))
    for handle in handles:
        handle.result()


def line(name: str, summary: Summary) -> str:
    latencies = (summary.ttft_ms, summary.first_gap_ms, summary.tpot_ms)
    cells = [f"{found.p50:.0f} / {found.p99:.0f}" if found else "-" for found in latencies]
    rest = [f"{summary.output_tokens_per_s:.1f}", f"{summary.slo_attainment or 0:.0%}"]
    return f"| {' | '.join([name, str(summary.num_requests), *cells, *rest])} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="cpu-demo")
    parser.add_argument("--params", type=Path, default=Path("params.json"), help="written, unless it is there")
    parser.add_argument("--rate", type=float, default=1.0, help="requests per second")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--slo", default="ttft=1000,tpot=150", help="milliseconds")
    parser.add_argument("--summary", type=Path, default=Path("summary.md"))
    args = parser.parse_args()
    slo = SLO.parse(args.slo)
    if not args.params.exists():
        command = [sys.executable, ROOT / "launch.py", "profile", "--config", args.config, "--params", args.params]
        subprocess.run(command, check=True)
    levels = {"ttft_ms": slo.ttft_ms, "tpot_ms": slo.tpot_ms, "first_gap_ms": slo.first_gap_ms}
    levels = {name: limit for name, limit in levels.items() if limit is not None}
    with LLM(config=args.config, policy="adaptive", params=str(args.params), slo=levels) as llm:
        serve(llm, args.rate, args.seconds)
        logs = llm.stats().logs
    rows = [line(str(route), summary) for route, summary in by_route(logs, slo).items()]
    rows.append(line("all", summarize(logs, slo)))
    page = "\n".join([f"# {args.config}, {args.rate:g} requests/s, {args.slo}", "", COLUMNS, "|" + " --- |" * 7, *rows])
    args.summary.write_text(page + "\n", encoding="utf-8")
    print(page)


if __name__ == "__main__":
    main()
