"""The peer of the benches: `generate` of transformers on one device, in the type that a worker would use.

It generates a batch of equal lengths, or serves requests one by one in the order in which they come.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.generation import BaseStreamer

from bench.lib.load import Run, num_devices
from nanopd.checkpoints.model_files import read_model_config, resolve
from nanopd.config import EngineConfig, ModelConfig
from nanopd.lab.workload import WorkloadRequest, prompt_token_ids
from nanopd.messages import EventKind, FinishReason, RequestEvent, RequestLog, Route


class _Times(BaseStreamer):
    """When each token came."""

    def __init__(self) -> None:
        self.times_s: list[float] = []

    def put(self, value: torch.Tensor) -> None:  # [1, num_prompt_tokens] at first, then [1]
        self.times_s.append(time.monotonic())

    def end(self) -> None:
        pass


class Peer:
    """The model in transformers, ready to serve."""

    def __init__(self, base: EngineConfig) -> None:
        """The model of `base`, in the type that its workers would use, on the first of its devices."""
        self.device = base.workers[0].device
        path = resolve(base.model, load_format=base.load_format)
        self.model_config: ModelConfig = read_model_config(path, base.dtype, self.device == "cpu")
        self.max_len = base.max_len_of(self.model_config)
        self.num_devices = num_devices(base) if self.device == "cpu" else 1  # workers share a CPU's cores
        dtype = getattr(torch, self.model_config.dtype)
        with torch.device(self.device):
            if base.load_format == "dummy":
                model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path), dtype=dtype)
            else:
                model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
        self._model = model.eval()
        self.generate([[1] * 64], 8)

    def generate(
        self, prompts: list[list[int]], num_tokens: int, streamer: BaseStreamer | None = None
    ) -> list[list[int]]:
        """`num_tokens` tokens for each of some prompts of one length, greedily."""
        ids = torch.tensor(prompts, device=self.device)
        settings = GenerationConfig(
            max_new_tokens=num_tokens, min_new_tokens=num_tokens, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        with torch.inference_mode():
            mask = torch.ones_like(ids)
            out = self._model.generate(ids, attention_mask=mask, generation_config=settings, streamer=streamer)
        return out[:, ids.shape[1] :].tolist()

    def generate_continuously(self, prompts: list[list[int]], num_tokens: int) -> int:
        """`num_tokens` tokens for each of some prompts, by its continuous batching on a GPU; how many came."""
        settings = GenerationConfig(max_new_tokens=num_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0)
        torch.cuda.set_device(self.device)
        done = self._model.generate_batch(prompts, generation_config=settings)
        return sum(len(output.generated_tokens) for output in done.values())

    def play(self, requests: Sequence[WorkloadRequest], label: str) -> Run:
        """As `load.play`, also in that Ctrl-C ends it; who comes while another is served waits."""
        run = Run(time.monotonic() + 0.1, busy_s=[0.0], num_devices=self.num_devices)
        prompts = [prompt_token_ids(request, self.model_config.vocab_size) for request in requests]
        try:
            for number, request in enumerate(tqdm(requests, label, unit="req", disable=None)):
                run.logs.append(self._serve(str(number), request, prompts[number], run))
        except KeyboardInterrupt:
            run.is_interrupted = True
        run.seconds = time.monotonic() - run.start_s
        return run

    def _serve(self, name: str, request: WorkloadRequest, prompt: list[int], run: Run) -> RequestLog:
        due_s = run.start_s + request.arrival_s
        time.sleep(max(0.0, due_s - time.monotonic()))
        start_s = time.monotonic()
        times = _Times()
        self.generate([prompt], request.num_output_tokens, times)
        times_s = np.array(times.times_s[1:])
        run.busy_s[0] += time.monotonic() - start_s
        kinds = (EventKind.ARRIVED, due_s), (EventKind.SCHEDULED, start_s), (EventKind.FINISHED, times_s[-1])
        events = [RequestEvent(float(time_s), kind) for kind, time_s in kinds]
        reason = FinishReason.LENGTH
        return RequestLog(name, request.num_prompt_tokens, events, times_s, Route(0, 0), finish_reason=reason)
