"""Rows of JSON through an `LLM`: one line is one request, and one line of answer, in the same order.

A row holds one of `prompt`, `prompt_token_ids` and `messages`, any field of `SamplingParams` but functions, and perhaps
a `request_id`. A row that cannot be served becomes an answer with `error`; the others are served. Input may be endless:
the caller's thread submits a bounded number of rows, and a second thread waits for the answers and writes them.
Knows the public face of the library, but imports none of it: the `LLM` is given.
"""

from __future__ import annotations

import json
import sys
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from nanopd.errors import RequestError
from nanopd.request import PLAIN_FIELDS, SamplingParams

if TYPE_CHECKING:
    from nanopd.frontend.llm import LLM, RequestHandle
    from nanopd.frontend.outputs import RequestOutput
    from nanopd.routing.policy import Prediction

PROMPT_KEYS = ("prompt", "prompt_token_ids", "messages")
ROW_KEYS = (*PROMPT_KEYS, "request_id", *PLAIN_FIELDS)
PREDICTED_KEYS = ("ttft_ms", "first_gap_ms", "tpot_ms")
COUNT_KEYS = ("num_prompt_tokens", "num_cached_tokens", "num_output_tokens", "num_preemptions")
METRIC_KEYS = ("queue_ms", *PREDICTED_KEYS, "e2e_ms", *COUNT_KEYS)

Row = dict[str, Any]


def serve_rows(
    llm: LLM, lines: Iterable[str | bytes], sampling: Mapping[str, Any], write: Callable[[Row], None], window: int
) -> int:
    """Serve every line and `write` its answer, in order; returns how many failed.

    `sampling` holds for rows that do not say otherwise. At most `window` rows are submitted and not yet written. On an
    exception the running requests are aborted, their answers are written as far as they got, and it is raised again.
    """
    total = len(lines) if isinstance(lines, list) else None
    num_failed, under_way = 0, deque[tuple[_Job, Future[bool]]]()
    with (
        tqdm(total=total, desc="requests", unit="req", file=sys.stderr, disable=None) as progress,
        ThreadPoolExecutor(1, "nanopd-answers") as thread,
    ):

        def finish(job: _Job, before: Future[bool] | None) -> bool:
            """Write the answer; returns whether the row has failed."""
            row = job.answer()
            progress.update()
            if before is not None:
                before.result()  # raises if the row before could not be written; then no later one is
            write(row)
            return "error" in row

        try:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    job, before = _submit(llm, number, line, sampling), under_way[-1][1] if under_way else None
                    under_way.append((job, thread.submit(finish, job, before)))
                while under_way and (len(under_way) >= window or under_way[0][1].done()):
                    num_failed += under_way[0][1].result()
                    under_way.popleft()
            return num_failed + sum(future.result() for _, future in under_way)
        except BaseException:
            for job, _ in under_way:
                if job.handle is not None:
                    job.handle.abort()
            raise


def parse_row(line: str | bytes) -> Row:
    """The JSON object of a line, with only known keys and one prompt. Raises RequestError."""
    try:
        row = json.loads(line)
        json.dumps(row, ensure_ascii=False).encode()  # fails for an escaped lone surrogate, which is no text
    except ValueError as error:
        raise RequestError("row", line[:60], f"a JSON object in UTF-8 ({error})") from None
    if not isinstance(row, dict):
        raise RequestError("row", line[:60], "a JSON object")
    for key in row:
        if key not in ROW_KEYS:
            raise RequestError("key", key, ROW_KEYS)
    if sum(key in row for key in PROMPT_KEYS) != 1:
        raise RequestError("row", line[:60], f"exactly one of {', '.join(PROMPT_KEYS)}")
    _check_types(row)
    return row


def _check_types(row: Row) -> None:
    kinds = ("prompt", str, str), ("request_id", str, str), ("prompt_token_ids", list, int), ("messages", list, dict)
    for key, kind, item in kinds:
        value = row.get(key, kind())
        if not isinstance(value, kind) or not all(isinstance(element, item) for element in value):
            raise RequestError(key, value, "text" if kind is str else f"a list of {item.__name__}")


@dataclass(slots=True)
class _Job:
    """A row that was submitted, or refused with an error, and whose answer is not written yet."""

    line: int  # the number of its line, from 1
    row: Row
    handle: RequestHandle | None = None
    error: str | None = None

    def answer(self) -> Row:
        """Wait for the result, and return the row of the answer."""
        echo = {"line": self.line} | {key: self.row[key] for key in ("request_id", *PROMPT_KEYS) if key in self.row}
        return echo | ({"error": self.error} if self.handle is None else _answer(self.handle.result()))


def _submit(llm: LLM, number: int, line: str | bytes, sampling: Mapping[str, Any]) -> _Job:
    job = _Job(number, {})
    try:
        job.row = parse_row(line)
        params = SamplingParams(**{**sampling, **{key: job.row[key] for key in PLAIN_FIELDS if key in job.row}})
        prompt: Any = job.row.get("prompt", job.row.get("prompt_token_ids"))
        if "messages" in job.row:
            prompt = llm.encode_chat(job.row["messages"])
        job.handle = llm.submit(prompt, params, request_id=job.row.get("request_id"))
    except RequestError as error:
        job.error = str(error)
        tqdm.write(f"line {number}: {error}", file=sys.stderr)
    return job


def _answer(output: RequestOutput) -> Row:
    """The result of a request as a row; beside an error stands the text that was generated before it."""
    completion = output.outputs[0]
    row: Row = {
        "request_id": output.request_id,
        "prompt": output.prompt,
        "text": completion.text,
        "token_ids": list(completion.token_ids),
        "finish_reason": completion.finish_reason,
        "route": str(output.route) if output.route else None,
        "metrics": {key: getattr(output.metrics, key) for key in METRIC_KEYS},
    }
    if len(output.outputs) > 1:
        keys = ("text", "token_ids", "finish_reason", "cumulative_logprob")
        row["outputs"] = [{key: getattr(completion, key) for key in keys} for completion in output.outputs]
    if output.decision and output.decision.taken:
        row["decision"] = {name: _figures(getattr(output.decision, name)) for name in ("taken", "best_other")}
    return row | ({"error": output.error} if output.error else {})


def _figures(prediction: Prediction | None) -> Row | None:
    if prediction is None:
        return None
    return {"route": str(prediction.route)} | {key: getattr(prediction, key) for key in PREDICTED_KEYS}
