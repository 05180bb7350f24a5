"""The command line over an LLM that repeats its prompts: rows, order, errors, signals, exit statuses."""

from __future__ import annotations

import io
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import nanopd
from nanopd import cli
from nanopd.commands.chat import chat
from nanopd.commands.run import DEMO_PROMPTS, SAMPLING_OPTIONS
from nanopd.config import load_config
from nanopd.errors import RequestError, WorkerError
from nanopd.frontend.jsonl import serve_rows
from nanopd.frontend.outputs import BlockStats
from nanopd.messages import EventKind, FinishReason, RequestEvent, RequestLog, Role, Route
from nanopd.metrics import RequestMetrics
from nanopd.request import SamplingParams
from nanopd.routing.policy import Decision, Prediction

ROOT = Path(__file__).parents[1]
EXPLAINED = Decision(
    Route(0, 1),
    Prediction(Route(0, 1), 90.0, 30.0, 20.0, 0.0, 0.0, 1000.0),
    Prediction(Route(1, 1), 120.0, 25.0, 25.0, 0.0, 0.0, 1100.0),
)


def echo_log(request_id: str, num_tokens: int) -> RequestLog:
    """Arrived at 1 s; tokens at 1.1 s, 1.2 s, ...; finished at 2 s."""
    events = [RequestEvent(1.0, EventKind.ARRIVED), RequestEvent(2.0, EventKind.FINISHED)]
    times_s = 1.0 + 0.1 * np.arange(1, num_tokens + 1)
    return RequestLog(request_id, 4, events, times_s, Route(0, 1), finish_reason=FinishReason.LENGTH)


class EchoHandle:
    """Ends on its own after a while, or at once when aborted."""

    def __init__(self, request_id: str, prompt: str | list[int], max_tokens: int, delay_s: float | None) -> None:
        self.request_id = request_id
        self.prompt = prompt
        self.max_tokens = max_tokens
        self.reason = "length"
        self.is_done = threading.Event()
        if delay_s is not None:
            threading.Timer(delay_s, self.is_done.set).start()

    def done(self) -> bool:
        return self.is_done.is_set()

    def abort(self) -> None:
        self.reason = "abort"
        self.is_done.set()

    def result(self) -> SimpleNamespace:
        assert self.is_done.wait(30)
        text = self.prompt if isinstance(self.prompt, str) else ""
        completion = SimpleNamespace(text=text.upper(), token_ids=[1] * self.max_tokens, finish_reason=self.reason)
        return SimpleNamespace(
            request_id=self.request_id,
            prompt=text or None,
            outputs=[completion],
            route=Route(0, 1),
            metrics=RequestMetrics.from_log(echo_log(self.request_id, self.max_tokens)),
            error="the worker is gone" if text == "crash" else None,
            decision=EXPLAINED if text == "why" else None,
        )

    def __iter__(self) -> Iterator[SimpleNamespace]:
        for word in ("well, ", "yes"):
            yield SimpleNamespace(text=word)


class EchoLLM:
    """Takes what `LLM` takes from the command line; `endless` requests end only when aborted."""

    def __init__(self, config: Any = None, show_progress: bool = False, endless: bool = False) -> None:
        self.endless = endless
        self.tokenizer = SimpleNamespace(chat_template="yes")
        self.numbers = itertools.count()
        self.random = random.Random(0)
        self.handles: list[EchoHandle] = []
        self.params: list[SamplingParams] = []
        self.is_shut_down = False
        self.drift: dict[str, float] = {}
        self.config = config or load_config("cpu-demo")

    def __enter__(self) -> EchoLLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.is_shut_down = True

    def encode_chat(self, messages: list[dict[str, str]]) -> list[int]:
        return list(range(len(messages)))

    def stats(self) -> SimpleNamespace:
        logs = [echo_log(handle.request_id, handle.max_tokens) for handle in self.handles]
        blocks = [BlockStats(0, 3, 99), BlockStats(0, 5, 98)]
        return SimpleNamespace(logs=logs, blocks=blocks, roles=[Role.MIXED] * 2, drift=self.drift)

    def submit(
        self, prompt: str | list[int], params: SamplingParams, *, request_id: str | None = None, stream: bool = False
    ) -> EchoHandle:
        if prompt == "":
            raise RequestError("prompt", prompt, "at least one token")
        delay_s = None if self.endless else self.random.uniform(0, 0.01)
        assert params.max_tokens is not None
        handle = EchoHandle(request_id or str(next(self.numbers)), prompt, params.max_tokens, delay_s)
        self.handles.append(handle)
        self.params.append(params)
        return handle


def serve(llm: EchoLLM, lines: Any, window: int = 8, **sampling: Any) -> tuple[int, list[dict[str, Any]]]:
    rows: list[dict[str, Any]] = []
    return serve_rows(llm, lines, sampling, rows.append, window), rows


# ------------------------------------------------------------------------------------------------------- rows


def test_answers_come_in_the_order_of_rows() -> None:
    num_failed, rows = serve(EchoLLM(), [json.dumps({"prompt": f"p{n}"}) for n in range(50)])
    assert num_failed == 0
    assert [(row["line"], row["text"]) for row in rows] == [(n + 1, f"P{n}") for n in range(50)]


def test_an_answer_has_what_was_promised() -> None:
    line = json.dumps({"prompt": "hé", "max_tokens": 3, "request_id": "mine"})
    assert serve(EchoLLM(), [line], max_tokens=9)[1] == [
        {
            "line": 1,
            "request_id": "mine",
            "prompt": "hé",
            "text": "HÉ",
            "token_ids": [1, 1, 1],
            "finish_reason": "length",
            "route": "0->1",
            "metrics": {
                "queue_ms": None,
                "ttft_ms": pytest.approx(100.0),
                "first_gap_ms": pytest.approx(100.0),
                "tpot_ms": pytest.approx(100.0),
                "e2e_ms": pytest.approx(1000.0),
                "num_prompt_tokens": 4,
                "num_cached_tokens": 0,
                "num_output_tokens": 3,
                "num_preemptions": 0,
            },
        }
    ]


def test_a_row_overrides_the_sampling_of_the_command_line() -> None:
    llm = EchoLLM()
    rows = [{"prompt": "a"}, {"prompt": "b", "temperature": 0.5, "stop": "x", "logit_bias": {"4": 1}, "min_p": 0.5}]
    serve(llm, map(json.dumps, rows), temperature=0.0, seed=3)
    assert llm.params == [
        SamplingParams(temperature=0.0, seed=3),
        SamplingParams(temperature=0.5, seed=3, stop=("x",), logit_bias={4: 1}, min_p=0.5),
    ]


def test_three_kinds_of_prompt() -> None:
    llm = EchoLLM()
    messages = [{"role": "user", "content": "hi"}]
    _, rows = serve(llm, map(json.dumps, [{"prompt": "a"}, {"prompt_token_ids": [4, 2]}, {"messages": messages}]))
    assert [handle.prompt for handle in llm.handles] == ["a", [4, 2], [0]]
    assert rows[1]["prompt_token_ids"] == [4, 2]
    assert rows[2]["messages"] == messages


BAD_ROWS = [
    (b"{", "JSON"),
    (b"prompt", "JSON"),
    (b'{"prompt": "\xff"}', "UTF-8"),
    (b'["a"]', "JSON object"),
    (b"{}", "exactly one of prompt, prompt_token_ids, messages"),
    (b'{"prompt": "a", "prompt_token_ids": [1]}', "exactly one"),
    (b'{"prompt": "a", "max_token": 1}', "max_tokens"),
    (b'{"prompt": "a", "max_tokens": 0}', "max_tokens=0"),
    (b'{"prompt": "a", "max_tokens": "many"}', "many"),
    (b'{"prompt": "a", "temperature": null}', "temperature"),
    (b'{"prompt": "a", "temperature": NaN}', "temperature=nan"),
    (b'{"prompt": "a", "stop": 3}', "stop"),
    (b'{"prompt": "a", "logit_bias": {"x": 1}}', "logit_bias"),
    (b'{"prompt": "a", "logits_processors": []}', "key='logits_processors'"),
    (b'{"prompt": ""}', "at least one token"),
    (b'{"prompt": "\\ud800"}', "surrogates not allowed"),
    (b'{"prompt": ["a"]}', "text"),
    (b'{"prompt_token_ids": ["a"]}', "list of int"),
    (b'{"prompt_token_ids": 5}', "list of int"),
    (b'{"messages": ["hi"]}', "list of dict"),
    (b'{"prompt": "a", "request_id": 7}', "request_id=7"),
]


@pytest.mark.parametrize(("line", "message"), BAD_ROWS, ids=[repr(line) for line, _ in BAD_ROWS])
def test_a_bad_row_is_reported_and_the_others_served(
    line: bytes, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    num_failed, rows = serve(EchoLLM(), [b'{"prompt": "a"}\n', b"\n", line, b'{"prompt": "b"}'], max_tokens=1)
    assert num_failed == 1
    assert [(row["line"], row.get("text")) for row in rows] == [(1, "A"), (3, None), (4, "B")]
    assert message in rows[1]["error"]
    assert "line 3: " in capsys.readouterr().err


def test_a_request_that_ends_with_an_error_fails_its_row() -> None:
    num_failed, rows = serve(EchoLLM(), map(json.dumps, [{"prompt": "crash"}, {"prompt": "a"}]))
    assert num_failed == 1
    assert (rows[0]["error"], rows[0]["text"]) == ("the worker is gone", "CRASH")
    assert "error" not in rows[1]


def test_endless_input_is_read_no_further_than_the_window() -> None:
    llm = EchoLLM(endless=True)
    num_read = 0

    def lines() -> Iterator[str]:
        nonlocal num_read
        while True:
            num_read += 1
            if num_read == 40:
                raise KeyboardInterrupt
            yield '{"prompt": "a"}'

    def finish_slowly() -> None:
        while num_read < 40:
            time.sleep(0.001)
            unfinished = [handle for handle in list(llm.handles) if not handle.done()]
            assert len(unfinished) <= 4 + 2  # the window, one being waited for, one being put
            if len(unfinished) >= 4:
                unfinished[0].is_done.set()

    finisher = threading.Thread(target=finish_slowly)
    finisher.start()
    rows: list[dict[str, Any]] = []
    with pytest.raises(KeyboardInterrupt):
        serve_rows(llm, lines(), {"max_tokens": 1}, rows.append, 4)
    finisher.join()
    assert [row["line"] for row in rows] == list(range(1, 40))
    assert {row["finish_reason"] for row in rows[:30]} == {"length"}
    assert rows[-1]["finish_reason"] == "abort"


def test_answers_are_written_while_input_is_awaited() -> None:
    written = threading.Event()

    def lines() -> Iterator[str]:
        yield '{"prompt": "a"}'
        assert written.wait(30)

    assert serve_rows(EchoLLM(), lines(), {}, lambda row: written.set(), 8) == 0


def test_an_error_in_writing_ends_serving() -> None:
    def write(row: dict[str, Any]) -> None:
        raise BrokenPipeError

    lines = itertools.repeat('{"prompt": "a"}')
    with pytest.raises(BrokenPipeError):
        serve_rows(EchoLLM(), lines, {"max_tokens": 1}, write, 4)


# ---------------------------------------------------------------------------------------------------- command


@pytest.fixture
def llm(monkeypatch: pytest.MonkeyPatch) -> EchoLLM:
    """What the command gets for an LLM."""
    llm = EchoLLM()
    monkeypatch.setitem(vars(nanopd), "LLM", lambda **_: llm)
    return llm


def test_rows_from_file_to_file(llm: EchoLLM, tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"prompt": "grüß"}\n{"prompt": "b", "seed": 1}\n', encoding="utf-8")
    args = ["--config", "cpu-demo", "--input", str(source), "--output", str(target), "--max-tokens", "2"]
    assert cli.main(args) == 0
    rows = [json.loads(line) for line in target.read_text(encoding="utf-8").splitlines()]
    assert [row["text"] for row in rows] == ["GRÜSS", "B"]
    assert llm.params[1] == SamplingParams(temperature=0.0, max_tokens=2, seed=1)
    assert llm.is_shut_down


def test_rows_from_standard_input(
    llm: EchoLLM, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b'{"prompt": "a"}\n{"prompt": 1')))
    monkeypatch.setattr(sys.stdin, "isatty", lambda: False, raising=False)
    assert cli.main(["--config", "cpu-demo", "--input", "-"]) == cli.FAILED
    out, err = capsys.readouterr()  # out holds nothing but rows
    assert [json.loads(line)["line"] for line in out.splitlines()] == [1, 2]
    assert "line 2" in err


def test_prompts_are_answered_for_people(llm: EchoLLM, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--config", "cpu-demo", "--prompt", "one", "--prompt", "two"]) == 0
    out, report = capsys.readouterr()
    assert out == "[0->1] one\nONE\n\n[0->1] two\nTWO\n\n"
    assert report.splitlines()[0].split("  ")[:2] == ["route", "completed"]
    row = " ".join(report.splitlines()[2].split())
    assert row == "0->1 2/2 100.0 / 100.0 100.0 / 100.0 100.0 / 100.0 1000.0 / 1000.0 256"
    assert report.splitlines()[-1].split() == ["1", "cpu", "mixed", "5", "0", "98"]


def test_decisions_are_explained(llm: EchoLLM, capsys: pytest.CaptureFixture[str]) -> None:
    llm.drift = {"prefill": 1.25, "step": 0.9}
    args = ["--config", "cpu-demo", "--set", "policy=adaptive", "--prompt", "why", "--prompt", "a"]
    assert cli.main([*args, "--output", "-", "--max-tokens", "1", "--explain"]) == 0
    out, report = capsys.readouterr()
    explained, plain = map(json.loads, out.splitlines())
    assert explained["decision"]["taken"] == {"route": "0->1", "ttft_ms": 90.0, "first_gap_ms": 30.0, "tpot_ms": 20.0}
    assert explained["decision"]["best_other"]["route"] == "1->1"
    assert "decision" not in plain
    table, *_, drift = report.split("\n\n")
    assert " ".join(table.splitlines()[2].split()) == "0 0->1 90.0 / 100.0 30.0 / - 20.0 / - 1->1 120 25.0 25.0"
    assert len(table.splitlines()) == 3
    assert [line.split() for line in drift.splitlines()[2:]] == [["prefill", "1.25"], ["step", "0.900"]]


def test_nothing_is_explained_where_nothing_is_predicted(llm: EchoLLM, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--config", "cpu-demo", "--prompt", "a", "--explain"]) == cli.BAD_USAGE
    assert "--explain='round_robin'" in capsys.readouterr().err


@pytest.mark.parametrize("chat_template", ["yes", None])
def test_demo_without_input(llm: EchoLLM, chat_template: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    llm.tokenizer.chat_template = chat_template
    assert cli.main(["--config", "cpu-demo"]) == 0
    assert DEMO_PROMPTS[-1] in capsys.readouterr().out
    assert len(llm.handles) == len(DEMO_PROMPTS)


def test_chat(llm: EchoLLM, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    said = iter(["hi", "", "again", "/reset", "new"])

    def ask(_: str) -> str:
        try:
            return next(said)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", ask)
    chat(llm, SamplingParams())
    assert capsys.readouterr().out.count("well, yes\n") == 3
    assert [len(handle.prompt) for handle in llm.handles] == [1, 3, 1]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--config", "nowhere"], "config='nowhere'"),
        (["--config", "cpu-demo", "--set", "polciy=x"], "did you mean policy?"),
        (["--config", "cpu-demo", "--set", "block_size=0"], "block_size=0"),
        (["--config", "cpu-demo", "--temperature", "-1"], "temperature=-1.0"),
        (["--config", "cpu-demo", "--input", "/nowhere.jsonl"], "/nowhere.jsonl"),
        (["--config", "cpu-demo", "--output", "/nowhere/out.jsonl"], "/nowhere/out.jsonl"),
    ],
)
def test_bad_arguments_are_one_line_and_status_2(
    args: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(vars(nanopd), "LLM", lambda **_: pytest.fail("nothing may be started"))
    assert cli.main(args) == cli.BAD_USAGE
    out, err = capsys.readouterr()
    assert not out
    assert message in err
    assert err.count("\n") == 1


def test_a_worker_that_cannot_start_is_told(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(**_: object) -> None:
        raise WorkerError(1, "killed while loading")

    monkeypatch.setitem(vars(nanopd), "LLM", fail)
    assert cli.main(["--config", "cpu-demo"]) == 1
    assert capsys.readouterr().err == "nanopd: worker 1: killed while loading\n"


def test_serving_needs_the_extra(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nanopd.serve", None)
    assert cli.main(["--config", "cpu-demo", "--serve"]) == 1
    assert "pip install nanopd[serve]" in capsys.readouterr().err


def test_sampling_options_are_fields_of_sampling_params() -> None:
    args = vars(cli.parse_args(["--config", "cpu-demo", "--top-k", "7", "--seed", "3", "--min-p", "0.5"]))
    params = SamplingParams(**{name: args[name] for name in SAMPLING_OPTIONS})
    assert params == SamplingParams(max_tokens=128, temperature=0.0, top_k=7, seed=3, min_p=0.5)


@pytest.mark.parametrize("option", ["--input", "--output", "--prompt"])
def test_serving_goes_with_no_rows(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["--config", "cpu-demo", "--serve", option, "x"])
    assert end.value.code == cli.BAD_USAGE
    assert "not allowed with argument" in capsys.readouterr().err


COMMAND = """
import sys
sys.path.insert(0, {tests!r})
import nanopd, test_cli
from nanopd import cli
nanopd.LLM = lambda **_: test_cli.EchoLLM(endless=True)
sys.exit(cli.main(["--config", "cpu-demo", "--input", "-"]))
"""


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_with_partial_answers_and_a_report(signum: signal.Signals) -> None:
    code = COMMAND.format(tests=str(Path(__file__).parent))
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, text=True, **pipes) as process:
        assert process.stdin and process.stdout and process.stderr
        process.stdin.write('{"prompt": ""}\n{"prompt": "a"}\n')
        process.stdin.flush()
        assert "at least one token" in process.stdout.readline()  # so the first row was read
        time.sleep(0.2)
        os.kill(process.pid, signum)
        assert json.loads(process.stdout.readline())["finish_reason"] == "abort"
        assert "0->1" in process.stderr.read()
        assert process.wait(30) == 128 + signum


def test_launch_is_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "launch.py", "--config", "nowhere"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == cli.BAD_USAGE
    assert "config='nowhere'" in done.stderr
