"""The same batch job on Ray Data, for those who outgrow a machine: one engine per node, rows from and to JSONL.

    pip install 'ray[data]'
    python examples/ray_batch.py prompts.jsonl answers/ --config cpu-demo --engines 1

Ray cuts the input into blocks, hands them to as many actors as there are engines, and writes a file per block; order,
retries and where blocks go are Ray's. Each actor takes all GPUs of its node (--gpus), which nanopd divides among its
workers. On one machine without GPUs this runs on a local Ray. The configuration must be there on all nodes.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import ray


class Engine:
    """An actor that holds an LLM; a batch is a column of prompts, and gets a column of answers."""

    def __init__(self, config: str, model: str | None, max_tokens: int) -> None:
        from nanopd import LLM, SamplingParams

        overrides: dict[str, Any] = {"model": model, "max_model_len": None} if model else {}
        self._llm = LLM(config=config, **overrides)
        self._params = SamplingParams(temperature=0, max_tokens=max_tokens)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        outputs = self._llm.generate(batch["prompt"].tolist(), self._params, use_tqdm=False)
        texts = [output.outputs[0].text for output in outputs]
        return {**batch, "text": np.array(texts, object), "route": np.array([str(o.route) for o in outputs], object)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", help='JSONL with {"prompt": ...}')
    parser.add_argument("output", help="a directory")
    parser.add_argument("--config", default="cpu-demo")
    parser.add_argument("--model", help="another one than the configuration's")
    parser.add_argument("--max-tokens", type=int, default=16)
    parser.add_argument("--engines", type=int, default=1, help="as many as there are nodes")
    parser.add_argument("--gpus", type=int, default=0, help="of a node")
    parser.add_argument("--batch", type=int, default=256, help="rows handed to an engine at once")
    args = parser.parse_args()
    answers = ray.data.read_json(args.input, lines=True).map_batches(
        Engine,
        fn_constructor_args=(args.config, args.model, args.max_tokens),
        batch_size=args.batch,
        compute=ray.data.ActorPoolStrategy(size=args.engines),
        num_gpus=args.gpus,
    )
    answers.write_json(args.output)


if __name__ == "__main__":
    main()
