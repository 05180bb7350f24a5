"""Requests and answers of the OpenAI API, as far as nanopd serves them.

`CompletionBody` and `ChatBody` check what a client sends, turn it into prompts and `SamplingParams`, and give answers
their shape. Their sampling parameters are the fields of `SamplingParams`; JSON_TYPES and API_FIELDS say where the two
differ. Beyond the API are those that it does not have, `priority`, and `chat_template_kwargs` with `enable_thinking`.
A parameter that nanopd does not have is refused by name, unless its value asks for nothing.
Knows neither HTTP nor the event loop.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal, get_type_hints

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, create_model, model_validator

from nanopd.frontend.detokenizer import REPLACEMENT
from nanopd.frontend.llm import LLM, Prompt
from nanopd.frontend.outputs import CompletionOutput, RequestOutput, RequestOutputDelta
from nanopd.messages import MAX_LOGPROBS
from nanopd.request import PLAIN_FIELDS, SamplingParams

LEAST_LOGPROB = -9999.0  # stands for minus infinity, which JSON does not have
NO_EFFECT = {"user", "metadata", "safety_identifier", "prompt_cache_key"}  # taken and not looked at
# parameters that nanopd does not have, each with the values that ask for nothing; null asks for nothing everywhere
ASKS_NOTHING: dict[str, tuple] = {
    "echo": (False,),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
}

Text = Annotated[str, AfterValidator(lambda text: text.encode().decode())]  # refuses half surrogate pairs
Json = dict[str, Any]
TokenText = Callable[[int], str]
Piece = CompletionOutput | RequestOutputDelta


# sampling parameters whose types JSON does not have
JSON_TYPES: dict[str, tuple[Any, Any]] = {
    "stop": (Text | list[Text], []),
    "stop_token_ids": (list[int], []),
    "logit_bias": (dict[str, float] | None, None),
    "bad_words": (list[Text | list[int]], []),
    "allowed_token_ids": (list[int] | None, None),
}
# sampling parameters that the API has in another form for each kind of request, or not at all
API_FIELDS = {"max_tokens", "logprobs", "prompt_logprobs"}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _without_what_asks_nothing(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {
            key: value
            for key, value in values.items()
            if value is not None and key not in NO_EFFECT and value not in ASKS_NOTHING.get(key, ())
        }


def _sampling_fields() -> dict[str, Any]:
    """(type, default) of the fields that a body has in common with `SamplingParams`."""
    types = get_type_hints(SamplingParams)
    found = {name: (types[name], field.default) for name, field in PLAIN_FIELDS.items() if name not in API_FIELDS}
    return found | JSON_TYPES


class StreamOptions(_Strict):
    include_usage: bool = False


_Sampling: Any = create_model("_Sampling", __base__=_Strict, **_sampling_fields())


class _Body(_Sampling):
    """What both kinds of requests have in common: the sampling parameters, and what is no matter of sampling."""

    model: str | None = None
    priority: int = 0
    stream: bool = False
    stream_options: StreamOptions | None = None

    @model_validator(mode="after")
    def _check_stream_options(self) -> _Body:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is for stream=true")
        return self

    @property
    def includes_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def _params(self, max_tokens: int | None, logprobs: int | None) -> SamplingParams:
        others = self.model_dump(include=PLAIN_FIELDS.keys() - API_FIELDS)
        return SamplingParams(**others, max_tokens=max_tokens, logprobs=logprobs)


class CompletionBody(_Body):
    ID: ClassVar = "cmpl-"
    OBJECT: ClassVar = "text_completion"
    CHUNK_OBJECT: ClassVar = "text_completion"

    prompt: Text | list[Text] | list[int] | list[list[int]]
    max_tokens: int = 16
    logprobs: int | None = None

    def prompts(self, llm: LLM) -> list[Prompt]:
        is_one = isinstance(self.prompt, str) or not self.prompt or isinstance(self.prompt[0], int)
        prompts: list[Any] = [self.prompt] if is_one else list(self.prompt)
        return [llm.tokenizer.encode(p) if isinstance(p, str) and llm.tokenizer is not None else p for p in prompts]

    def params(self) -> SamplingParams:
        return self._params(self.max_tokens, self.logprobs)

    def choice(self, index: int, piece: Piece, token_text: TokenText, start: int = 0) -> Json:
        """The API's form of an answer, or of a part of it that begins at character `start`."""
        logprobs = None if piece.logprobs is None else _completion_logprobs(piece.logprobs, token_text, start)
        return {"index": index, "text": piece.text, "logprobs": logprobs, "finish_reason": piece.finish_reason}

    chunk = choice

    def opening(self, index: int) -> Json | None:
        """The first chunk of a choice, sent before there is text; None if there is none of the kind."""
        return None


class TextPart(_Strict):
    type: Literal["text"]
    text: Text


class Message(_Strict):
    role: Text
    content: Text | list[TextPart]

    def as_text(self) -> Json:
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": self.role, "content": content}


class TemplateArgs(_Strict):
    enable_thinking: bool | None = None


class ChatBody(_Body):
    ID: ClassVar = "chatcmpl-"
    OBJECT: ClassVar = "chat.completion"
    CHUNK_OBJECT: ClassVar = "chat.completion.chunk"

    messages: list[Message]
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    chat_template_kwargs: TemplateArgs = TemplateArgs()

    @model_validator(mode="after")
    def _check_pairs(self) -> ChatBody:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs is for logprobs=true")
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("max_tokens and max_completion_tokens are the same; give one of them")
        return self

    def prompts(self, llm: LLM) -> list[Prompt]:
        template_args = self.chat_template_kwargs.model_dump(exclude_none=True)
        return [llm.encode_chat([message.as_text() for message in self.messages], **template_args)]

    def params(self) -> SamplingParams:
        max_tokens = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        return self._params(max_tokens, (self.top_logprobs or 0) if self.logprobs else None)

    def choice(self, index: int, piece: Piece, token_text: TokenText) -> Json:
        message = {"role": "assistant", "content": piece.text, "refusal": None}
        return {"index": index, "message": message, **self._rest(piece, token_text)}

    def chunk(self, index: int, piece: Piece, token_text: TokenText, start: int) -> Json:
        return {"index": index, "delta": {"content": piece.text} if piece.text else {}, **self._rest(piece, token_text)}

    def opening(self, index: int) -> Json | None:
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def _rest(self, piece: Piece, token_text: TokenText) -> Json:
        num_best = self.top_logprobs or 0
        logprobs = None if piece.logprobs is None else _chat_logprobs(piece.logprobs, token_text, num_best)
        return {"logprobs": logprobs, "finish_reason": piece.finish_reason}


def usage(outputs: list[RequestOutput]) -> Json:
    """Counts of the tokens of all prompts and answers; a prompt with several choices counts once."""
    num_prompt_tokens = sum(len(output.prompt_token_ids) for output in outputs)
    num_output_tokens = sum(len(choice.token_ids) for output in outputs for choice in output.outputs)
    details = {"cached_tokens": sum(output.metrics.num_cached_tokens for output in outputs)}
    counts = {"prompt_tokens": num_prompt_tokens, "completion_tokens": num_output_tokens}
    return {**counts, "total_tokens": num_prompt_tokens + num_output_tokens, "prompt_tokens_details": details}


def _completion_logprobs(rows: list[dict[int, float]], token_text: TokenText, start: int) -> Json:
    tokens = [token_text(next(iter(row))) for row in rows]  # the chosen token stands first in its row
    chosen, best = [_finite(next(iter(row.values()))) for row in rows], [_by_text(row, token_text) for row in rows]
    offsets = list(itertools.accumulate(map(len, tokens), initial=start))[:-1]
    return {"tokens": tokens, "token_logprobs": chosen, "top_logprobs": best, "text_offset": offsets}


def _by_text(row: dict[int, float], token_text: TokenText) -> dict[str, float]:
    """Log probabilities by text; of tokens with the same text, such as parts of characters, the likeliest counts."""
    return {token_text(token): _finite(value) for token, value in sorted(row.items(), key=lambda item: item[1])}


def _chat_logprobs(rows: list[dict[int, float]], token_text: TokenText, num_best: int) -> Json:
    content = []
    for row in rows:
        chosen, *_ = tokens = [_chat_logprob(token_text(token), value) for token, value in row.items()]
        best = sorted(tokens, key=lambda token: -token["logprob"])[:num_best]
        content.append({**chosen, "top_logprobs": best})
    return {"content": content, "refusal": None}


def _chat_logprob(text: str, value: float) -> Json:
    is_whole = REPLACEMENT not in text  # else the token is a part of a character
    return {"token": text, "logprob": _finite(value), "bytes": list(text.encode()) if is_whole else None}


def _finite(logprob: float) -> float:
    return max(logprob, LEAST_LOGPROB)
