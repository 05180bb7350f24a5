"""A conversation with the model at the terminal; what the job `run` does where there is a person and no input."""

from __future__ import annotations

import nanopd
from nanopd.errors import RequestError
from nanopd.request import SamplingParams


def chat(llm: nanopd.LLM, params: SamplingParams) -> None:
    """Talk with the model until /exit or the end of input."""
    print("/reset starts over, /exit leaves, Ctrl-C stops an answer.")
    messages: list[dict[str, str]] = []
    while (text := _ask()) != "/exit":
        if text == "/reset":
            messages = []
        elif text:
            asked = [*messages, {"role": "user", "content": text}]
            try:
                messages = [*asked, {"role": "assistant", "content": _print_answer(llm, asked, params)}]
            except RequestError as error:
                print(f"nanopd: {error}")


def _ask() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        return "/exit"


def _print_answer(llm: nanopd.LLM, messages: list[dict[str, str]], params: SamplingParams) -> str:
    handle = llm.submit(llm.encode_chat(messages), params, stream=True)
    pieces = []
    try:
        for delta in handle:
            pieces.append(delta.text)
            print(delta.text, end="", flush=True)
    except KeyboardInterrupt:
        handle.abort()
    print()
    return "".join(pieces)
