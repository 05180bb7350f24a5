"""Hand-overs between real worker processes, over every path there is: shared memory, CUDA IPC and the relay.

Digests of all moved blocks are compared throughout. On a GPU greedy tokens may differ where two of them are as good.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from model_zoo import load_hf, make_tiny_model

from nanopd import LLM, Route, SamplingParams
from nanopd.engine.engine import Engine

GREEDY = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
MAX_GAP = 0.1  # of a row's standard deviation: how far below the best a chosen token may be
BLOCK_SIZE = 16
EDGES = [1, 2, 15, 16, 17, 31, 32, 33, 47, 48, 49, 100, 129]  # prompt lengths
ROUTES = [Route(0, 1), Route(1, 0), Route(0, 0)]
WAIT_S = 120.0
FLAT_BYTES = 64 << 20

gpu = pytest.mark.gpu
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs")
CASES = [
    pytest.param("cpu", "cpu", "shm", id="shm"),
    pytest.param("cpu", "cpu", "relay", id="relay"),
    pytest.param("cuda:0", "cuda:0", "ipc", id="one GPU, ipc", marks=gpu),
    pytest.param("cuda:0", "cuda:0", "relay", id="one GPU, relay", marks=gpu),
    pytest.param("cpu", "cuda:0", "auto", id="CPU and GPU", marks=gpu),
    pytest.param("cuda:0", "cuda:1", "ipc", id="two GPUs, ipc", marks=[gpu, two_gpus]),
    pytest.param("cuda:0", "cuda:1", "relay", id="two GPUs, relay", marks=[gpu, two_gpus]),
]
each_case = pytest.mark.parametrize(("first", "second", "transfer"), CASES)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"), "qwen3", num_heads=8, num_kv_heads=2, head_dim=64)


def make_llm(model: Path, first: str, second: str, transfer: str, **keys) -> LLM:
    on_cpu = first == second == "cpu"
    settings = {
        "workers": [{"device": first}, {"device": second}],
        "policy": "round_robin",
        "dtype": "float32" if on_cpu else "bfloat16",
        "transfer": transfer,
        "verify_transfers": True,
        "num_blocks": 300,
        "block_size": BLOCK_SIZE,
        "max_num_seqs": 16,
        "max_model_len": 256,
        "max_num_batched_tokens": 64,
    }
    return LLM(str(model), **{**settings, **keys})


def greedy_tokens(llm: LLM, prompts: list[list[int]], route: Route) -> list[list[int]]:
    handles = [llm.submit(prompt, GREEDY, route=route) for prompt in prompts]
    outputs = [handle.result(WAIT_S) for handle in handles]
    assert {output.route for output in outputs} == {route}
    return [output.outputs[0].token_ids for output in outputs]


def gaps(model: torch.nn.Module, prompt: list[int], tokens: list[int]) -> torch.Tensor:
    """How far below the best token each chosen one is, [num_tokens], in standard deviations of its row."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1].float()
    return (logits.max(-1).values - logits.gather(-1, torch.tensor(tokens)[:, None])[:, 0]) / logits.std(-1)


@each_case
def test_every_route_gives_the_same_tokens(model: Path, first: str, second: str, transfer: str) -> None:
    rng = random.Random(0)
    prompts = [[rng.randrange(4, 512) for _ in range(length)] for length in EDGES]
    with make_llm(model, first, second, transfer) as llm:
        here, there, alone = (greedy_tokens(llm, prompts, route) for route in ROUTES)
    if first == second == "cpu":
        assert here == there == alone
    reference = load_hf(model)
    for tokens in (here, there, alone):
        assert max(gaps(reference, *pair).max() for pair in zip(prompts, tokens, strict=True)) < MAX_GAP


def wait_for(llm: LLM, state: Callable[[Engine], bool]) -> None:
    deadline_s = time.monotonic() + WAIT_S
    while not llm._thread.call(state):
        assert time.monotonic() < deadline_s, "waited in vain"
        time.sleep(0.01)


def is_idle(engine: Engine) -> bool:
    """No plan and no step is out; those of aborted requests may be for a while."""
    return not engine.has_unfinished


def is_complete(engine: Engine) -> bool:
    return not any(scheduler.is_dead for scheduler in engine.schedulers)


def nothing_is_left(engine: Engine) -> None:
    engine.check_integrity()
    for scheduler, worker in zip(engine.schedulers, engine.workers, strict=True):
        assert scheduler.residency.blocks.num_free == scheduler.residency.blocks.num_usable
        assert worker.poll() == []
        assert not worker._endpoint.has_backlog
        assert worker._endpoint.writer._tail == worker._endpoint.writer._control[16], "a message was not released"


def free_gpu_bytes() -> int:
    return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else 0


def random_requests(llm: LLM, count: int, rng: random.Random) -> Iterator[tuple[str, int]]:
    """Submit them, abort a fifth of them at random moments, and give each one's end and number of tokens."""
    under_way = []
    for number in range(count):
        prompt = [rng.randrange(4, 512) for _ in range(max(1, rng.choice(EDGES) + rng.randint(-1, 1)))]
        params = SamplingParams(temperature=0, max_tokens=rng.randint(1, 40), ignore_eos=True)
        handle = llm.submit(prompt, params, route=rng.choice(ROUTES[:2]))
        due_s = time.monotonic() + rng.expovariate(50) if rng.random() < 0.2 else float("inf")
        under_way.append((handle, due_s))
        while len(under_way) > 64 or (number == count - 1 and under_way):
            for handle, due_s in under_way:
                if due_s <= time.monotonic():
                    handle.abort()
            ended = [entry for entry in under_way if entry[0].done()]
            under_way = [entry for entry in under_way if entry not in ended]
            yield from ((h.result().outputs[0].finish_reason, len(h.result().outputs[0].token_ids)) for h, _ in ended)
            time.sleep(0.001)


@each_case
def test_nothing_is_lost(model: Path, first: str, second: str, transfer: str) -> None:
    """Random lengths around the edges of blocks, pools that are too small for all, random aborts."""
    count = 150 if first == second == "cpu" else 2000
    rng = random.Random(1)
    with make_llm(model, first, second, transfer, num_blocks=80) as llm:
        ends = list(random_requests(llm, 100, rng))
        before = free_gpu_bytes()
        ends += random_requests(llm, count, rng)
        wait_for(llm, is_idle)
        llm._thread.call(nothing_is_left)
        assert before - free_gpu_bytes() < FLAT_BYTES
    assert len(ends) == 100 + count
    assert {reason for reason, _ in ends} == {"length", "abort"}
    assert sum(reason == "abort" for reason, _ in ends) > 5


@pytest.mark.parametrize("killed", [0, 1])
@pytest.mark.parametrize(("first", "second", "transfer"), CASES[1:])
def test_a_worker_is_killed_amid_transfers(model: Path, first: str, second: str, transfer: str, killed: int) -> None:
    """Everybody is answered, the other worker goes on, and hand-overs with the replacement work."""
    rng = random.Random(2)
    prompts = [[rng.randrange(4, 512) for _ in range(100)] for _ in range(40)]
    with make_llm(model, first, second, transfer) as llm:
        handles = [llm.submit(prompt, GREEDY, route=ROUTES[i % 2]) for i, prompt in enumerate(prompts)]
        while sum(handle.done() for handle in handles) < 4:
            time.sleep(0.001)
        victim = llm._thread.call(lambda engine: engine.workers[killed]._process.pid)
        os.kill(victim, signal.SIGKILL)
        assert {handle.result(WAIT_S).outputs[0].finish_reason for handle in handles} == {"length"}
        wait_for(llm, is_complete)
        again = [greedy_tokens(llm, prompts[:4], route) for route in ROUTES[:2]]
        wait_for(llm, is_idle)
        llm._thread.call(nothing_is_left)
    if first == second == "cpu":
        assert again == [[handle.result().outputs[0].token_ids for handle in handles[:4]]] * 2
