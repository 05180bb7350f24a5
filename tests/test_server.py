"""The OpenAI-compatible server, asked by OpenAI's own client; its texts against those of the library."""

from __future__ import annotations

import importlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from tiny_chat_model import make_tiny_chat_model

from nanopd import AsyncLLM, SamplingParams, cli
from nanopd.request import PLAIN_FIELDS

fastapi, uvicorn, httpx, openai = (
    pytest.importorskip(package, reason="needs the extras serve and test")
    for package in ("fastapi", "uvicorn", "httpx", "openai")
)
app, protocol = (importlib.import_module(f"nanopd.serve.{name}") for name in ("app", "protocol"))

ROOT = Path(__file__).parents[1]
WAIT_S = 30.0
KEY = "sk-test"
SEEDED = {"temperature": 1.0, "seed": 7, "max_tokens": 24}
NO_END = {"ignore_eos": True}
LONG = {"temperature": 0, "max_tokens": 400, "extra_body": NO_END}
MESSAGES = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_chat_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[tuple[AsyncLLM, str]]:
    llm = AsyncLLM(str(model), num_blocks=600, max_num_seqs=32)
    with llm.llm, app.bind("127.0.0.1", 0) as listener:
        http_server = uvicorn.Server(uvicorn.Config(app.make_app(llm, KEY), log_config=None))
        thread = threading.Thread(target=http_server.run, kwargs={"sockets": [listener]})
        thread.start()
        yield llm, f"http://127.0.0.1:{listener.getsockname()[1]}"
        http_server.should_exit = True
        thread.join(WAIT_S)
        assert not thread.is_alive()


@pytest.fixture
def llm(server: tuple[AsyncLLM, str]) -> Iterator[AsyncLLM]:
    """Whatever a test does, no block is in use after it."""
    llm, _ = server
    llm.llm.stats(reset=True)
    yield llm
    end = time.monotonic() + WAIT_S
    while llm.llm.stats().blocks[0].used:
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.fixture
def http(server: tuple[AsyncLLM, str]) -> Iterator[httpx.Client]:
    headers = {"Authorization": f"Bearer {KEY}"}
    with httpx.Client(base_url=server[1], headers=headers, timeout=WAIT_S, trust_env=False) as client:
        yield client


@pytest.fixture
def client(llm: AsyncLLM, http: httpx.Client) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{http.base_url}/v1", api_key=KEY, http_client=http, max_retries=0)


@pytest.fixture
def name(llm: AsyncLLM) -> str:
    return llm.llm.config.model


def generate(llm: AsyncLLM, prompt: str | list[int], **params: Any) -> Any:
    [output] = llm.llm.generate(prompt, SamplingParams(**params), use_tqdm=False)
    return output.outputs[0]


# ------------------------------------------------------------------------------------------------------ completions


def test_completion(client: openai.OpenAI, llm: AsyncLLM, name: str) -> None:
    for prompt in ("Hello", [5, 6, 7]):
        expected = generate(llm, prompt, **SEEDED)
        answer = client.completions.create(model=name, prompt=prompt, **SEEDED)
        [choice] = answer.choices
        assert (choice.text, choice.finish_reason) == (expected.text, expected.finish_reason)
        assert (answer.object, answer.model) == ("text_completion", name)
        num_tokens = len(expected.token_ids)
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(prompt), num_tokens)
        assert answer.usage.total_tokens == len(prompt) + num_tokens
    assert client.completions.create(model=name, prompt="x", extra_body=NO_END).usage.completion_tokens == 16


def test_several_prompts_and_choices(client: openai.OpenAI, llm: AsyncLLM, name: str) -> None:
    """Choice i of a seeded request is the single request with the seed + i."""
    answer = client.completions.create(model=name, prompt=["Hello", "there"], n=3, **SEEDED)
    params = [{**SEEDED, "seed": 7 + i} for i in range(3)]
    expected = [generate(llm, prompt, **p).text for prompt in ("Hello", "there") for p in params]
    assert [choice.text for choice in answer.choices] == expected
    assert [choice.index for choice in answer.choices] == list(range(6))
    assert len(set(expected)) == 6
    assert answer.usage.prompt_tokens == 10
    chunks = client.completions.create(model=name, prompt=["Hello", "there"], n=3, stream=True, **SEEDED)
    texts = [""] * 6
    for chunk in chunks:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == expected


def test_the_best_of_several(client: openai.OpenAI, llm: AsyncLLM, name: str) -> None:
    params = {**SEEDED, "n": 2, "best_of": 4}
    [expected] = llm.llm.generate("Hello", SamplingParams(**params), use_tqdm=False)
    answer = client.completions.create(model=name, prompt="Hello", **params)
    assert [choice.text for choice in answer.choices] == [completion.text for completion in expected.outputs]
    num_tokens = sum(len(completion.token_ids) for completion in expected.outputs)
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (5, num_tokens)
    urgent = client.completions.create(model=name, prompt="Hello", **SEEDED, extra_body={"priority": -1})
    assert urgent.choices[0].text == generate(llm, "Hello", **SEEDED).text


def test_completion_stream(client: openai.OpenAI, llm: AsyncLLM, name: str) -> None:
    expected = generate(llm, "Hello", **SEEDED, ignore_eos=True)
    options = {"stream": True, "stream_options": {"include_usage": True}, "extra_body": NO_END}
    *chunks, last = client.completions.create(model=name, prompt="Hello", **SEEDED, **options)
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected.text
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert len({chunk.id for chunk in chunks}) == 1
    assert {chunk.usage for chunk in chunks} == {None}
    assert (last.choices, last.usage.prompt_tokens, last.usage.completion_tokens) == ([], 5, 24)


def test_stop(client: openai.OpenAI, llm: AsyncLLM, name: str) -> None:
    params = {**SEEDED, "max_tokens": 100, "seed": 1}
    text = generate(llm, "Hello", **params, ignore_eos=True).text
    stop = next(text[i : i + 2] for i in range(10, len(text)) if "\ufffd" not in text[i : i + 2])
    [choice] = client.completions.create(
        model=name, prompt="Hello", stop=["not there", stop], extra_body=NO_END, **params
    ).choices
    assert (choice.text, choice.finish_reason) == (text[: text.index(stop)], "stop")
    chunks = client.completions.create(model=name, prompt="Hello", stop=stop, stream=True, extra_body=NO_END, **params)
    assert "".join(chunk.choices[0].text for chunk in chunks) == choice.text


def test_completion_logprobs(client: openai.OpenAI, llm: AsyncLLM, name: str) -> None:
    params = {"temperature": 0, "max_tokens": 8, "logprobs": 2}
    expected = generate(llm, "Hello", **params, ignore_eos=True)
    values = [row[token] for row, token in zip(expected.logprobs, expected.token_ids, strict=True)]
    [choice] = client.completions.create(model=name, prompt="Hello", extra_body=NO_END, **params).choices
    found = choice.logprobs
    assert found.token_logprobs == pytest.approx(values, abs=1e-4)
    assert [max(row.values()) for row in found.top_logprobs] == pytest.approx(values, abs=1e-4)
    assert (len(found.tokens), found.text_offset[0]) == (8, 0)
    chunks = list(client.completions.create(model=name, prompt="Hello", stream=True, extra_body=NO_END, **params))
    streamed = [value for chunk in chunks if chunk.choices[0].logprobs for value in chunk.choices[0].logprobs.tokens]
    assert streamed == found.tokens


def test_what_changes_logits(client: openai.OpenAI, llm: AsyncLLM, name: str) -> None:
    openai_has = {"presence_penalty": 0.5, "frequency_penalty": 0.5, "logit_bias": {"40": 5}}
    others = {"min_p": 0.1, "repetition_penalty": 1.5, "bad_words": ["a", [50, 51]], "allowed_token_ids": [*range(99)]}
    expected = generate(llm, "Hello", **SEEDED, **openai_has, **others, ignore_eos=True).text
    body = {**NO_END, **others}
    [choice] = client.completions.create(model=name, prompt="Hello", extra_body=body, **SEEDED, **openai_has).choices
    assert choice.text == expected
    assert expected != generate(llm, "Hello", **SEEDED, ignore_eos=True).text


# -------------------------------------------------------------------------------------------------------------- chat


def test_chat(client: openai.OpenAI, llm: AsyncLLM, name: str) -> None:
    [expected] = llm.llm.chat(MESSAGES, SamplingParams(**SEEDED), use_tqdm=False)
    params = {key: value for key, value in SEEDED.items() if key != "max_tokens"}
    answer = client.chat.completions.create(model=name, messages=MESSAGES, max_completion_tokens=24, **params)
    [choice] = answer.choices
    assert (choice.message.role, choice.message.content) == ("assistant", expected.outputs[0].text)
    assert answer.usage.prompt_tokens == len(expected.prompt_token_ids)
    parts = [{"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]}]
    again = client.chat.completions.create(model=name, messages=parts, **SEEDED)
    assert again.choices[0].message.content == choice.message.content
    thread = [*MESSAGES, choice.message, {"role": "user", "content": "And?"}]  # as clients pass answers back
    assert client.chat.completions.create(model=name, messages=thread, max_tokens=2).choices
    chunks = list(client.chat.completions.create(model=name, messages=MESSAGES, stream=True, **SEEDED))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == choice.message.content
    assert chunks[-1].choices[0].finish_reason == choice.finish_reason


def test_chat_goes_on_to_the_end_by_default(client: openai.OpenAI, name: str) -> None:
    answer = client.chat.completions.create(model=name, messages=MESSAGES, temperature=0, extra_body=NO_END)
    assert (answer.usage.total_tokens, answer.choices[0].finish_reason) == (512, "length")


def test_chat_logprobs(client: openai.OpenAI, llm: AsyncLLM, name: str) -> None:
    [expected] = llm.llm.chat(MESSAGES, SamplingParams(**SEEDED, logprobs=3), use_tqdm=False)
    options = {**SEEDED, "logprobs": True, "top_logprobs": 3}
    [choice] = client.chat.completions.create(model=name, messages=MESSAGES, **options).choices
    rows = expected.outputs[0].logprobs
    assert [token.logprob for token in choice.logprobs.content] == pytest.approx([next(iter(r.values())) for r in rows])
    for token, row in zip(choice.logprobs.content, rows, strict=True):
        assert [t.logprob for t in token.top_logprobs] == pytest.approx(sorted(row.values())[:-4:-1])
        assert token.bytes is None or bytes(token.bytes).decode() == token.token
    text = "".join(token.token for token in choice.logprobs.content)
    assert [c for c in text if c.isascii()] == [c for c in choice.message.content if c.isascii()]


# ------------------------------------------------------------------------------------------------------------ errors

BAD_BODIES: dict[str, tuple[dict[str, Any], str, str]] = {
    "penalty": ({"frequency_penalty": 2.5}, "frequency_penalty", "-2 to 2"),
    "bias": ({"logit_bias": {"x": 1}}, "logit_bias", "token ids"),
    "word": ({"bad_words": [["x"]]}, "bad_words", "valid"),
    "echo": ({"echo": True}, "echo", "not supported"),
    "best_of": ({"n": 3, "best_of": 2}, "best_of", "n to 128"),
    "best of a stream": ({"best_of": 2, "stream": True}, "best_of", "for a stream"),
    "unknown": ({"temprature": 0}, "temprature", "not supported"),
    "temperature": ({"temperature": -1}, "temperature", "a finite number >= 0"),
    "type": ({"max_tokens": "5"}, "max_tokens", "valid integer"),
    "n": ({"n": 0}, "n", "1 to 128"),
    "logprobs": ({"logprobs": 21}, "logprobs", "0 to 20"),
    "too long": ({"max_tokens": 512}, "max_tokens", "max_model_len=512"),
    "one of several": ({"prompt": ["good", ""]}, "prompt", "at least one token"),
    "token": ({"prompt": [[1], [257]]}, "prompt_token_ids", "0 to 256"),
    "prompt": ({"prompt": 5}, "prompt", "valid string"),
    "no prompt": ({"prompt": None}, "prompt", "required"),
    "surrogate": ({"prompt": "\ud800"}, "prompt", "surrogates not allowed"),
    "stream_options": ({"stream_options": {"include_usage": True}}, "stream_options", "stream=true"),
}


@pytest.mark.parametrize("case", BAD_BODIES)
def test_bad_completions(llm: AsyncLLM, http: httpx.Client, case: str) -> None:
    body, param, message = BAD_BODIES[case]
    content = json.dumps({"prompt": "Hello", **body})  # httpx itself cannot send a surrogate
    answer = http.post("/v1/completions", content=content, headers={"Content-Type": "application/json"})
    error = answer.json()["error"]
    assert (answer.status_code, error["type"], error["code"]) == (400, "invalid_request_error", None)
    assert message in error["message"] and param in error["message"]
    assert error["param"] == (None if case == "stream_options" else param)
    assert all(log.finish_reason == "abort" for log in llm.llm.stats().logs)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "text": ""}]}]}, "messages"),
        ({"messages": [{"role": "user", "content": "Hi", "name": "me"}]}, "messages.0.name: is not supported"),
        ({"messages": MESSAGES, "tools": [{"type": "function"}]}, "tools: is not supported"),
        ({"messages": MESSAGES, "response_format": {"type": "json_object"}}, "response_format: is not supported"),
        ({"messages": MESSAGES, "top_logprobs": 2}, "logprobs=true"),
        ({"messages": MESSAGES, "chat_template_kwargs": {"chat_template": ""}}, "chat_template_kwargs.chat_template"),
    ],
)
def test_bad_chats(llm: AsyncLLM, http: httpx.Client, body: dict[str, Any], message: str) -> None:
    answer = http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]


def test_bodies_have_the_sampling_parameters() -> None:
    completion, chat = protocol.CompletionBody(prompt="a"), protocol.ChatBody(messages=[])
    assert completion.params() == SamplingParams()
    assert chat.params() == SamplingParams(max_tokens=None)
    assert PLAIN_FIELDS.keys() - type(completion).model_fields.keys() == {"prompt_logprobs"}
    values = {"top_k": 5, "stop": "x", "bad_words": ["a", [1, 2]], "logit_bias": {"7": 1.5}, "best_of": 3}
    params = SamplingParams(top_k=5, stop=("x",), bad_words=("a", (1, 2)), logit_bias={7: 1.5}, best_of=3)
    assert protocol.CompletionBody(prompt="a", **values).params() == params


def test_values_that_ask_for_nothing_are_taken(llm: AsyncLLM, http: httpx.Client) -> None:
    nothing = {"frequency_penalty": 0.0, "best_of": 1, "echo": False, "logit_bias": {}, "suffix": None, "user": "me"}
    assert http.post("/v1/completions", json={"prompt": "Hello", **nothing}).status_code == 200


def test_other_errors(client: openai.OpenAI, http: httpx.Client, name: str) -> None:
    with pytest.raises(openai.NotFoundError) as error:
        client.completions.create(model="gpt-0", prompt="Hello")
    assert (error.value.code, error.value.param) == ("model_not_found", "model")
    for key in ("wrong", "sk-t\u00e9st"):
        headers = {"Authorization": f"Bearer {key}".encode()}
        answer = http.post("/v1/completions", content=b"{", headers=headers)
        assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
    assert httpx.get(f"{http.base_url}/v1/models", trust_env=False).status_code == 401
    assert httpx.get(f"{http.base_url}/health", trust_env=False).json() == {"status": "ok"}
    answer = http.post("/v1/completions", content=b'{"prompt"', headers={"Content-Type": "application/json"})
    assert (answer.status_code, answer.json()["error"]["type"]) == (400, "invalid_request_error")
    assert http.get("/v1/nothing").status_code == 404
    assert http.get("/v1/completions").json()["error"]["message"] == "Method Not Allowed"
    assert [model.id for model in client.models.list()] == [name]
    assert client.models.retrieve(name).id == name


# --------------------------------------------------------------------------------------------- disconnects and load


@pytest.mark.parametrize("is_streamed", [True, False])
def test_disconnect_aborts(llm: AsyncLLM, server: tuple[AsyncLLM, str], is_streamed: bool) -> None:
    host, port = server[1].removeprefix("http://").split(":")
    body = json.dumps({"prompt": "Hello", "n": 2, "stream": is_streamed, "max_tokens": 500, **NO_END})
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {KEY}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall((head + body).encode())
        if is_streamed:
            assert b"200 OK" in connection.recv(100)
        while llm.llm.stats().num_running < 2:
            time.sleep(0.001)
    end = time.monotonic() + WAIT_S
    while len(logs := llm.llm.stats().logs) < 2:
        assert time.monotonic() < end
        time.sleep(0.01)
    assert [log.finish_reason for log in logs] == ["abort", "abort"]


def test_64_streams(client: openai.OpenAI, llm: AsyncLLM, name: str) -> None:
    def text(seed: int) -> str:
        params = {"temperature": 1, "seed": seed, "max_tokens": 20, "stream": True}
        with client.completions.create(model=name, prompt="Hello", **params) as chunks:
            return "".join(chunk.choices[0].text for chunk in chunks)

    params = [SamplingParams(temperature=1, seed=seed, max_tokens=20) for seed in range(64)]
    expected = [output.outputs[0].text for output in llm.llm.generate(["Hello"] * 64, params, use_tqdm=False)]
    with ThreadPoolExecutor(64) as pool:
        assert list(pool.map(text, range(64))) == expected


def test_metrics(client: openai.OpenAI, llm: AsyncLLM, http: httpx.Client, name: str) -> None:
    def samples() -> dict[str, float]:
        text = http.get("/metrics").text
        return {key: float(value) for key, value in re.findall(r"^(nanopd_\S+) (\S+)$", text, re.MULTILINE)}

    before = samples()
    assert samples() == before  # a scrape changes nothing
    client.completions.create(model=name, prompt="Hello", max_tokens=5, n=2, extra_body=NO_END)
    after = samples()
    changed = {key: value - before[key] for key, value in after.items() if value != before[key]}
    assert changed['nanopd_requests_total{finish_reason="length"}'] == 2
    assert (changed["nanopd_prompt_tokens_total"], changed["nanopd_output_tokens_total"]) == (10, 10)
    for histogram in ("time_to_first_token", "time_per_output_token", "request"):
        assert changed[f"nanopd_{histogram}_seconds_count"] == 2
        assert changed[f'nanopd_{histogram}_seconds_bucket{{le="+Inf"}}'] == 2
        assert changed[f"nanopd_{histogram}_seconds_sum"] > 0
    assert after['nanopd_kv_blocks{worker="0"}'] == 599
    assert len(llm.llm.stats().logs) == 2 and llm.llm.stats().blocks[0].peak > 0
    assert after["nanopd_requests_running"] == after["nanopd_requests_waiting"] == 0


def test_an_engine_that_ends(model: Path) -> None:
    testclient = importlib.import_module("fastapi.testclient")
    llm = AsyncLLM(str(model), num_blocks=100)
    client = testclient.TestClient(app.make_app(llm))
    body = {"prompt": "Hello", "max_tokens": 500, **NO_END}
    with ThreadPoolExecutor(2) as pool:
        answers = [pool.submit(client.post, "/v1/completions", json={**body, "stream": s}) for s in (True, False)]
        while llm.llm.stats().num_running < 2:
            time.sleep(0.001)
        llm.llm.shutdown()
        streamed, whole = (answer.result(WAIT_S) for answer in answers)
    assert "shut down" in json.loads(streamed.text.split("data: ")[-1])["error"]["message"]
    for answer in (whole, client.get("/health"), client.post("/v1/completions", json={"prompt": "Hello"})):
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "engine_failed"


# ----------------------------------------------------------------------------------------------------------- command


@pytest.mark.parametrize(
    ("port", "message"), [("70000", "port=70000 is not allowed"), ("taken", "Address already in use")]
)
def test_a_port_that_cannot_be_had(
    server: tuple[AsyncLLM, str], port: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    port = port.replace("taken", server[1].rpartition(":")[2])
    assert cli.main(["--config", "cpu-demo", "--serve", "--port", port]) == cli.BAD_USAGE
    assert message in capsys.readouterr().err


def test_ctrl_c_ends_the_command(model: Path, tmp_path: Path) -> None:
    config = tmp_path / "tiny.yaml"
    config.write_text(f"model: {model}\nworkers: [{{device: cpu, role: mixed}}]\nnum_blocks: 100\n")
    command = [sys.executable, "launch.py", "--config", str(config), "--serve", "--port", "0"]
    environment = {**os.environ, "NANOPD_API_KEY": KEY}
    with subprocess.Popen(command, cwd=ROOT, text=True, stderr=subprocess.PIPE, env=environment) as process:
        assert process.stderr
        line = next(line for line in process.stderr if line.startswith("nanopd: serving"))
        url = line.split()[-1]
        headers = {"Authorization": f"Bearer {KEY}"}
        body = {"prompt": "Hello", "max_tokens": 500, "stream": True, **NO_END}
        while True:
            try:
                assert httpx.get(f"{url}/models", headers=headers, trust_env=False).status_code == 200
                break
            except httpx.ConnectError:
                time.sleep(0.05)
        with httpx.stream("POST", f"{url}/completions", json=body, headers=headers, trust_env=False) as answer:
            next(answer.iter_lines())
            start = time.monotonic()
            os.kill(process.pid, signal.SIGINT)
            assert process.wait(WAIT_S) == 128 + signal.SIGINT
            assert time.monotonic() - start < 10
        assert "Traceback" not in process.stderr.read()
