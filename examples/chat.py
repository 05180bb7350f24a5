"""A chat on one device: the conversation so far goes through the model's chat template, the answer comes as a stream.

    python examples/chat.py
    python examples/chat.py --model Qwen/Qwen3-8B --device cuda:0

Earlier turns are found in the prefix cache, so only what is new is computed. An empty line or Ctrl-D ends the chat.
"""

from __future__ import annotations

import argparse

from nanopd import LLM, SamplingParams


def turns(llm: LLM, params: SamplingParams) -> None:
    messages: list[dict[str, str]] = []
    while text := _read("you: "):
        messages.append({"role": "user", "content": text})
        answer = ""
        for delta in llm.stream(llm.encode_chat(messages), params):
            print(delta.text, end="", flush=True)
            answer += delta.text
        print()
        messages.append({"role": "assistant", "content": answer})


def _read(prompt: str) -> str:
    try:
        return input(prompt).strip()
    except EOFError:
        return ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--max-tokens", type=int, default=128)
    args = parser.parse_args()
    with LLM(args.model, workers=[{"device": args.device}], max_num_seqs=4, show_progress=True) as llm:
        turns(llm, SamplingParams(temperature=args.temperature, max_tokens=args.max_tokens))


if __name__ == "__main__":
    main()
