"""The library's face, with worker processes, on a tiny model that has a tokenizer and a chat template."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from model_zoo import load_hf
from tiny_chat_model import CHAT_TEMPLATE, EOS, make_tiny_chat_model
from transformers import PreTrainedModel

from nanopd import LLM, ConfigError, RequestError, RequestOutput, Route, SamplingParams
from nanopd.messages import FinishReason

pytestmark = pytest.mark.process

WAIT_S = 30.0
MAX_LEN = 512
VOCAB_SIZE = EOS + 1
ROUTES = [Route(p, d) for p in (0, 1) for d in (0, 1)]
PROMPTS = ["Hello", "a longer prompt, of more than one block of the cache", [5, 6, 7], list(range(200)), "x"]
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
LONG = SamplingParams(temperature=0, max_tokens=400, ignore_eos=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_chat_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def module_llm(model: Path) -> Iterator[LLM]:
    workers = [{"device": "cpu", "role": "mixed"}] * 2
    with LLM(str(model), workers=workers, policy="round_robin", num_blocks=200, max_num_seqs=8) as llm:
        yield llm


@pytest.fixture
def llm(module_llm: LLM) -> Iterator[LLM]:
    """Whatever a test does, no block is in use after it."""
    module_llm.stats(reset=True)
    yield module_llm
    assert used_blocks(module_llm) == [0, 0]


def used_blocks(llm: LLM) -> list[int]:
    """After at most the steps that are in flight."""
    end = time.monotonic() + 2.0
    while any(used := [blocks.used for blocks in llm.stats().blocks]) and time.monotonic() < end:
        time.sleep(0.01)
    return used


def hf_greedy(hf: PreTrainedModel, prompt: list[int], num_tokens: int) -> list[int]:
    out = hf.generate(torch.tensor([prompt]), max_new_tokens=num_tokens, do_sample=False, eos_token_id=None)
    return out[0, len(prompt) :].tolist()


# --------------------------------------------------------------------------------------------------------- generate


def test_generate(llm: LLM, model: Path) -> None:
    hf = load_hf(model)
    results = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    assert [r.prompt for r in results] == [p if isinstance(p, str) else None for p in PROMPTS]
    assert {r.route for r in results} == set(ROUTES)
    for prompt, result in zip(PROMPTS, results, strict=True):
        ids = llm.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        [completion] = result.outputs
        assert (result.prompt_token_ids, result.finished, result.error) == (ids, True, None)
        assert completion.token_ids == hf_greedy(hf, ids, 12)
        assert completion.text == llm.tokenizer.decode(completion.token_ids, skip_special_tokens=True)
        assert (completion.index, completion.finish_reason, completion.stop_reason) == (0, "length", None)
        assert completion.logprobs is None
        assert (result.metrics.num_prompt_tokens, result.metrics.num_output_tokens) == (len(ids), 12)
        assert 0 < result.metrics.ttft_ms <= result.metrics.e2e_ms


def test_generate_takes_one_or_many(llm: LLM, capsys: pytest.CaptureFixture) -> None:
    [text], [ids] = llm.generate("Hello", GREEDY), llm.generate(llm.tokenizer.encode("Hello"), GREEDY)
    assert capsys.readouterr().out == ""  # the bar is on stderr
    assert text.outputs[0].token_ids == ids.outputs[0].token_ids
    assert llm.generate([], use_tqdm=False) == []
    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in (1, 3, 2)]
    results = llm.generate(["a", "b", "c"], params, use_tqdm=False)
    assert [len(r.outputs[0].token_ids) for r in results] == [1, 3, 2]
    assert len(llm.generate("x", use_tqdm=False)) == 1  # with the default parameters


def test_chat(llm: LLM) -> None:
    conversations = [[{"role": "user", "content": "Hi"}], [{"role": "user", "content": "Hello"}]]
    texts = ["user: Hi\nassistant:", "user: Hello\nassistant:"]
    expected = [r.outputs[0].token_ids for r in llm.generate(texts, GREEDY, use_tqdm=False)]
    answers = llm.chat(conversations, GREEDY, use_tqdm=False)
    assert [r.outputs[0].token_ids for r in answers] == expected
    assert llm.chat(conversations[0], GREEDY, use_tqdm=False)[0].outputs[0].token_ids == expected[0]
    llm.tokenizer.chat_template = None
    with pytest.raises(RequestError, match="chat template"):
        llm.chat(conversations, GREEDY)
    llm.tokenizer.chat_template = CHAT_TEMPLATE


# ---------------------------------------------------------------------------------------------------------- streams


def test_stream_adds_up(llm: LLM) -> None:
    """Random tokens of a byte-level model: characters come in parts, and some never get complete."""
    for seed, route in enumerate(ROUTES):
        params = SamplingParams(temperature=1, seed=seed, max_tokens=60, ignore_eos=True)
        deltas = list(llm.stream("Hello", params, route=route))
        [whole] = llm.generate("Hello", params, use_tqdm=False)
        assert [token for delta in deltas for token in delta.token_ids] == whole.outputs[0].token_ids
        assert "".join(delta.text for delta in deltas) == whole.outputs[0].text
        assert [delta.finish_reason for delta in deltas[:-1]] == [None] * (len(deltas) - 1)
        assert deltas[-1].finish_reason == "length"


def test_leaving_a_stream_aborts(llm: LLM) -> None:
    stream = llm.stream("Hello", LONG, request_id="left")
    next(stream)
    stream.close()
    assert used_blocks(llm) == [0, 0]
    [log] = llm.stats().logs
    assert (log.request_id, log.finish_reason) == ("left", FinishReason.ABORT)
    assert len(log.token_times_s) < 400


def test_handle_of_a_stream(llm: LLM) -> None:
    handle = llm.submit("Hello", GREEDY, stream=True)
    tokens = [token for delta in handle for token in delta.token_ids]
    assert tokens == handle.result(WAIT_S).outputs[0].token_ids
    assert list(handle) == []
    with pytest.raises(RequestError, match="stream"):
        next(iter(llm.submit("Hello", GREEDY)))


# ------------------------------------------------------------------------------------------------------------- ends


def test_stop_strings(llm: LLM) -> None:
    params = SamplingParams(temperature=1, seed=1, max_tokens=100, ignore_eos=True)
    [free] = llm.generate("Hello", params, use_tqdm=False)
    text = free.outputs[0].text
    stop = next(text[i : i + 2] for i in range(10, len(text)) if "\ufffd" not in text[i : i + 2])
    for route in ROUTES:
        stopping = SamplingParams(temperature=1, seed=1, max_tokens=100, ignore_eos=True, stop=["not there", stop])
        deltas = list(llm.stream("Hello", stopping, route=route))
        completion = llm.submit("Hello", stopping, route=route).result(WAIT_S).outputs[0]
        assert completion.text == text[: text.index(stop)] == "".join(delta.text for delta in deltas)
        assert (completion.finish_reason, completion.stop_reason) == ("stop", stop)
        assert completion.token_ids == free.outputs[0].token_ids[: len(completion.token_ids)]


def test_stop_token_ids_and_min_tokens(llm: LLM) -> None:
    [free] = llm.generate("Hello", GREEDY, use_tqdm=False)
    tokens = free.outputs[0].token_ids
    last = tokens[3]
    stopping = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, stop_token_ids=[last])
    completion = llm.submit("Hello", stopping).result(WAIT_S).outputs[0]
    assert completion.token_ids == tokens[: tokens.index(last) + 1]
    assert (completion.finish_reason, completion.stop_reason) == ("stop", last)
    later = SamplingParams(temperature=0, max_tokens=12, min_tokens=7, ignore_eos=True, stop_token_ids=[last])
    completion = llm.submit("Hello", later).result(WAIT_S).outputs[0]
    assert len(completion.token_ids) >= 7
    assert last not in completion.token_ids[:7]


def test_end_of_sequence(llm: LLM) -> None:
    """Nearly uniform sampling meets EOS sooner or later."""
    params = SamplingParams(temperature=50, seed=3, max_tokens=None)
    completion = llm.submit([5], params).result(WAIT_S).outputs[0]
    assert (completion.finish_reason, completion.stop_reason, completion.token_ids[-1]) == ("stop", None, EOS)
    assert EOS not in completion.token_ids[:-1]


def test_max_model_len(llm: LLM) -> None:
    prompt = [1 + n % 200 for n in range(MAX_LEN - 1)]
    params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
    assert len(llm.submit(prompt, params).result(WAIT_S).outputs[0].token_ids) == 1
    unlimited = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)
    completion = llm.submit(prompt[:-30], unlimited).result(WAIT_S).outputs[0]
    assert (len(completion.token_ids), completion.finish_reason) == (31, "length")


def test_deadline(llm: LLM) -> None:
    result = llm.submit("Hello", LONG, deadline_s=0.03).result(WAIT_S)
    assert (result.outputs[0].finish_reason, result.error) == ("abort", "the deadline has passed")
    assert len(result.outputs[0].token_ids) < 400
    assert llm.submit("Hello", GREEDY, deadline_s=60).result(WAIT_S).error is None


@pytest.mark.parametrize("limit_s", [math.inf, np.float32(60), np.int64(60)])
def test_numbers_that_callers_compute(llm: LLM, limit_s: float) -> None:
    """Infinity is a limit that never passes; numbers may be numpy's, and a priority is any integer."""
    due_s = np.float32(time.monotonic())
    options = {"deadline_s": limit_s, "queue_timeout_s": limit_s, "arrival_time_s": due_s, "priority": 2**70}
    assert llm.submit("Hello", GREEDY, **options).result(WAIT_S).error is None


def test_abort_by_another_thread(llm: LLM) -> None:
    handle = llm.submit("Hello", LONG, request_id="mine", stream=True)
    deltas = iter(handle)
    next(deltas)
    threading.Thread(target=llm.abort, args=("mine",)).start()
    result = handle.result(WAIT_S)
    assert list(deltas)[-1].finish_reason == result.outputs[0].finish_reason == "abort"
    assert 1 <= len(result.outputs[0].token_ids) < 400
    llm.abort("mine")
    llm.abort("never heard of")


def test_result_with_timeout(llm: LLM) -> None:
    handle = llm.submit("Hello", LONG)
    with pytest.raises(TimeoutError):
        handle.result(timeout=0.001)
    assert len(handle.result(WAIT_S).outputs[0].token_ids) == 400


# ---------------------------------------------------------------------------------------------------------- sampling


def test_seeds(llm: LLM) -> None:
    """The same seed, the same tokens: alone, in a batch, on every route."""
    params = SamplingParams(temperature=1.3, top_p=0.9, top_k=50, seed=11, max_tokens=40, ignore_eos=True)
    expected = llm.submit("Hello", params).result(WAIT_S).outputs[0].token_ids
    other = SamplingParams(temperature=1, max_tokens=40, ignore_eos=True)
    batch = llm.generate(["Hello", *PROMPTS, "Hello"], [params, *[other] * len(PROMPTS), params], use_tqdm=False)
    assert batch[0].outputs[0].token_ids == batch[-1].outputs[0].token_ids == expected
    for route in ROUTES:
        assert llm.submit("Hello", params, route=route).result(WAIT_S).outputs[0].token_ids == expected
    unseeded = [r.outputs[0].token_ids for r in llm.generate(["Hello"] * 2, other, use_tqdm=False)]
    assert unseeded[0] != unseeded[1]


@pytest.mark.parametrize("route", ROUTES, ids=str)
def test_logprobs(llm: LLM, model: Path, route: Route) -> None:
    params = SamplingParams(temperature=1, seed=2, max_tokens=10, logprobs=3, ignore_eos=True)
    prompt = [5, 6, 7]
    completion = llm.submit(prompt, params, route=route).result(WAIT_S).outputs[0]
    with torch.no_grad():
        logits = load_hf(model)(torch.tensor([prompt + completion.token_ids])).logits[0, len(prompt) - 1 : -1]
    expected = torch.log_softmax(logits.float(), -1)
    assert len(completion.logprobs) == 10
    for token, found, row in zip(completion.token_ids, completion.logprobs, expected, strict=True):
        assert next(iter(found)) == token
        assert set(found) == {token, *row.topk(3).indices.tolist()}
        np.testing.assert_allclose(list(found.values()), row[list(found)], atol=1e-4)


@pytest.mark.parametrize("route", ROUTES, ids=str)
def test_prompt_logprobs(llm: LLM, model: Path, route: Route) -> None:
    prompt = PROMPTS[1]
    output = llm.submit(prompt, SamplingParams(max_tokens=1, prompt_logprobs=2), route=route).result(WAIT_S)
    first, *rows = output.prompt_logprobs
    with torch.no_grad():
        exact = load_hf(model)(torch.tensor([output.prompt_token_ids])).logits[0].log_softmax(-1)
    assert first is None and len(rows) == len(prompt) - 1
    for row, values, token in zip(rows, exact, output.prompt_token_ids[1:], strict=False):
        assert list(row) == list(dict.fromkeys([token, *values.topk(2).indices.tolist()]))
        assert list(row.values()) == pytest.approx(values[list(row)].tolist(), abs=1e-4)


def test_bad_words_as_text(llm: LLM) -> None:
    text = llm.generate("Hello", GREEDY, use_tqdm=False)[0].outputs[0].text
    word = next(text[i : i + 2] for i in range(2, 8) if text[i : i + 2].isascii() and text[i : i + 2].strip())
    params = dataclasses.replace(GREEDY, max_tokens=100, bad_words=[word])
    other = llm.generate("Hello", params, use_tqdm=False)[0].outputs[0].text
    assert word.strip() not in other and other[:2] == text[:2]


def even_tokens(token_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
    logits[1::2] = -torch.inf
    return logits


@pytest.mark.parametrize("route", ROUTES, ids=str)
def test_users_functions(llm: LLM, route: Route) -> None:
    params = dataclasses.replace(GREEDY, logits_processors=(even_tokens,))
    tokens = llm.submit("Hello", params, route=route).result(WAIT_S).outputs[0].token_ids
    assert len(tokens) == GREEDY.max_tokens and not any(token % 2 for token in tokens)


def test_no_best_logprobs(llm: LLM) -> None:
    [result] = llm.generate("Hello", SamplingParams(temperature=0, max_tokens=4, logprobs=0), use_tqdm=False)
    assert [list(found) for found in result.outputs[0].logprobs] == [[t] for t in result.outputs[0].token_ids]


# --------------------------------------------------------------------------------------------------------- bad input

BAD_REQUESTS = {
    "empty text": ("", {}, "prompt", "at least one token"),
    "no tokens": ([], {}, "prompt", "at least one token"),
    "not a prompt": ({"a": 1}, {}, "prompt", "token ids"),
    "not token ids": ([1, "a"], {}, "prompt", "token ids"),
    "beyond the vocabulary": ([1, VOCAB_SIZE], {}, "prompt_token_ids", f"0 to {VOCAB_SIZE - 1}"),
    "negative token": ([-1], {}, "prompt_token_ids", f"0 to {VOCAB_SIZE - 1}"),
    "prompt too long": ([1] * MAX_LEN, {}, "prompt", f"max_model_len={MAX_LEN}"),
    "too many tokens": ([1], {"max_tokens": MAX_LEN}, "max_tokens", f"max_model_len={MAX_LEN}"),
    "stop token": ([1], {"stop_token_ids": [VOCAB_SIZE]}, "stop_token_ids", f"0 to {VOCAB_SIZE - 1}"),
}
BAD_OPTIONS = {
    "deadline": ({"deadline_s": 0.0}, "deadline_s"),
    "deadline of text": ({"deadline_s": "1"}, "deadline_s"),
    "priority": ({"priority": 1.5}, "priority"),
    "deadline that is none": ({"deadline_s": float("nan")}, "deadline_s"),
    "route": ({"route": Route(0, 2)}, "route"),
    "sampling parameters": ({"sampling_params": {"temperature": 0}}, "sampling_params"),
}


@pytest.mark.parametrize("case", BAD_REQUESTS)
def test_bad_requests(llm: LLM, case: str) -> None:
    prompt, keys, field, allowed = BAD_REQUESTS[case]
    params = SamplingParams(**keys)
    for use in (llm.submit, llm.stream, lambda prompt, params: llm.generate(["good", prompt], params, use_tqdm=False)):
        with pytest.raises(RequestError) as error:
            use(prompt, params)
        assert error.value.field == field
        assert allowed in error.value.allowed
        assert field in str(error.value)
    assert llm._thread.call(lambda engine: len(engine.seqs)) == 0
    assert llm.stats().logs == []  # the good one was not started either


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_bad_options(llm: LLM, case: str) -> None:
    options, field = BAD_OPTIONS[case]
    with pytest.raises(RequestError) as error:
        llm.submit("Hello", **options)
    assert error.value.field == field
    assert llm.stats().logs == []


def test_wrong_number_of_params(llm: LLM) -> None:
    with pytest.raises(RequestError, match="sampling_params"):
        llm.generate(["a", "b"], [GREEDY])


def test_duplicate_request_id(llm: LLM) -> None:
    first = llm.submit("Hello", LONG, request_id="twice")
    with pytest.raises(RequestError, match="request_id"):
        llm.submit("Hello", GREEDY, request_id="twice")
    assert first.result(WAIT_S).error is None
    assert llm.submit("Hello", GREEDY, request_id="twice").result(WAIT_S).request_id == "twice"


@pytest.mark.parametrize(
    ("keys", "field"),
    [
        ({"max_model_len": MAX_LEN + 1}, "max_model_len"),
        ({"policy": "disaggregated"}, "policy"),
        ({"num_block": 4}, "config key"),
        ({"workers": [{"device": "cuda:99"}]}, "workers.0.device"),
        ({"model": "/nowhere/at/all"}, "model"),
    ],
)
def test_bad_configuration_spawns_nothing(module_llm: LLM, model: Path, keys: dict, field: str) -> None:
    children = psutil.Process().children()
    with pytest.raises(ConfigError) as error:
        LLM(**{"model": str(model), **keys})
    assert error.value.field == field
    assert psutil.Process().children() == children


# ------------------------------------------------------------------------------------------------ load and threads


def test_open_loop(llm: LLM) -> None:
    """Handles at once, the time of arrival as it was due, everything answered."""
    handles = []
    for _ in range(30):
        due_s = time.monotonic() - 0.2
        handles.append((due_s, llm.submit([5, 6, 7], GREEDY, arrival_time_s=due_s)))
        time.sleep(0.002)
    for due_s, handle in handles:
        metrics = handle.result(WAIT_S).metrics
        assert metrics.arrived_s == due_s
        assert 200 < metrics.ttft_ms < metrics.e2e_ms
    stats = llm.stats(reset=True)
    assert len(stats.logs) == 30
    assert all(0 < blocks.peak <= blocks.total == 199 for blocks in stats.blocks)
    assert llm.stats().logs == []
    assert [blocks.peak for blocks in llm.stats().blocks] == [0, 0]


def test_many_threads(llm: LLM) -> None:
    """Text in, text out, streams and whole answers, from all sides at once."""
    params = SamplingParams(temperature=1, seed=4, max_tokens=20, ignore_eos=True)
    [expected] = llm.generate("Hello", params, use_tqdm=False)
    found: list[str] = []

    def use(number: int) -> None:
        for _ in range(4):
            if number % 2:
                found.append("".join(delta.text for delta in llm.stream("Hello", params)))
            else:
                found.append(llm.generate("Hello", params, use_tqdm=False)[0].outputs[0].text)

    threads = [threading.Thread(target=use, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    assert found == [expected.outputs[0].text] * 24


# ----------------------------------------------------------------------------- a second LLM, from a configuration alone


@pytest.fixture(scope="module")
def dummy_llm(module_llm: LLM, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    """Random weights, no tokenizer, a small cache; made beside another LLM, by a thread that has ended."""
    shape = {"model_type": "llama", "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96}
    heads = {"num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 64}
    file = tmp_path_factory.mktemp("dummy") / "config.json"
    file.write_text(json.dumps({**shape, **heads, "max_position_embeddings": 512, "eos_token_id": 2}))
    made: list[LLM] = []

    def make() -> None:
        made.append(LLM(str(file), load_format="dummy", num_blocks=11, max_num_seqs=4))

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    del thread
    with made.pop() as llm:
        yield llm


def test_without_a_tokenizer(dummy_llm: LLM, module_llm: LLM) -> None:
    [mine], [other] = (llm.generate([5, 6, 7], GREEDY, use_tqdm=False) for llm in (dummy_llm, module_llm))
    assert (len(mine.outputs[0].token_ids), mine.outputs[0].text) == (12, "")
    assert mine.outputs[0].token_ids != other.outputs[0].token_ids
    deltas = list(dummy_llm.stream([5, 6, 7], GREEDY))
    assert [token for delta in deltas for token in delta.token_ids] == mine.outputs[0].token_ids
    for prompt, params in (("text", GREEDY), ([5], SamplingParams(stop="x"))):
        with pytest.raises(RequestError, match="tokenizer"):
            dummy_llm.submit(prompt, params)
    with pytest.raises(RequestError, match="chat template"):
        dummy_llm.chat([{"role": "user", "content": "Hi"}])


def test_larger_than_every_pool(dummy_llm: LLM) -> None:
    """10 blocks of 16 tokens: what fits is served, however many want it; what never can is refused."""
    with pytest.raises(RequestError, match="KV caches of \\[160\\] tokens"):
        dummy_llm.submit([1] * 100, SamplingParams(max_tokens=61))
    params = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
    results: list[RequestOutput] = dummy_llm.generate([[1] * 100] * 6, params, use_tqdm=False)
    assert len({tuple(r.outputs[0].token_ids) for r in results}) == 1
    assert [len(r.outputs[0].token_ids) for r in results] == [60] * 6
    assert [blocks.used for blocks in dummy_llm.stats().blocks] == [0]


def test_environment_is_left_alone(dummy_llm: LLM) -> None:
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert not [name for name in os.environ if name.startswith("NANOPD")]
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])
