"""What is asked of the engine: `Request` and how to choose its tokens, both checked when they are made.

Parent process only. Knows no model: what depends on the model, `Engine.check` looks at.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from numbers import Real
from typing import Any, cast

from nanopd.errors import RequestError
from nanopd.messages import (
    MAX_ANSWERS,
    MAX_BAD_WORD_TOKENS,
    MAX_BAD_WORDS,
    MAX_LOGPROBS,
    MAX_PROCESSOR_BYTES,
    MAX_STOP_TOKEN_IDS,
    LogitsProcessor,
    Route,
)
from nanopd.rules import BOOLEAN, SEED, Rule, check, integer, list_of, number, one_of, optional, positive, ruled, text


def _is_word(value: object) -> bool:
    if isinstance(value, str):
        return bool(value.strip())
    return isinstance(value, tuple) and 0 < len(value) <= MAX_BAD_WORD_TOKENS and all(map(TOKEN_ID.allows, value))


def _is_bias(value: object) -> bool:
    return isinstance(value, dict) and all(map(TOKEN_ID.allows, value)) and all(map(BIAS_VALUE.allows, value.values()))


TOKEN_ID = integer(0)
BIAS_VALUE = number(-100, 100)
LOGPROBS = integer(0, MAX_LOGPROBS)
# What callers compute: numpy's numbers too, infinity as a limit that never passes, and any order of priorities.
DUE = Rule(lambda value: isinstance(value, Real) and math.isfinite(value), "a finite number")
POSITIVE = Rule(lambda value: isinstance(value, Real) and cast(float, value) > 0, "more than 0 seconds")
TIMEOUT = Rule(lambda value: value is None or POSITIVE.allows(value), f"None, or {POSITIVE.text}")
PRIORITY = Rule(lambda value: isinstance(value, int), "an integer")
BAD_WORDS = list_of(Rule(_is_word, f"text, or 1 to {MAX_BAD_WORD_TOKENS} token ids"), most=MAX_BAD_WORDS)
FUNCTIONS = list_of(Rule(callable, "a function"))
COUNT = integer(1, MAX_ANSWERS)
BIASES = Rule(_is_bias, f"a mapping of token ids, each to {BIAS_VALUE.text}")


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to choose a request's tokens. Names and defaults are vLLM's.

    Raises:
        RequestError: a value out of range; names field, value and what is allowed.
    """

    temperature: float = ruled(1.0, number(0), "the logits are divided by it; below 1e-5 is greedy")
    top_p: float = ruled(1.0, positive(1), "draw from the smallest set of best tokens with this share of the mass")
    top_k: int = ruled(0, integer(-1, 2**31 - 1), "draw from this many best tokens; 0 or -1: off")
    seed: int | None = ruled(None, optional(SEED), "None: derived from the engine's seed and the request's number")
    max_tokens: int | None = ruled(16, optional(integer(1)), "most tokens of an answer; None: up to max_model_len")
    min_tokens: int = ruled(0, integer(0, 2**31 - 1), "nothing ends an answer with fewer; at most max_tokens")
    stop: tuple[str, ...] = ruled((), list_of(text("a non-empty text")), "end the answer and are not part of its text")
    stop_token_ids: tuple[int, ...] = ruled((), list_of(TOKEN_ID, most=MAX_STOP_TOKEN_IDS), "ids that end the answer")
    ignore_eos: bool = ruled(False, BOOLEAN, "the answer goes on after the model's end tokens")
    logprobs: int | None = ruled(None, optional(LOGPROBS), "log probabilities of the chosen and of so many best tokens")
    prompt_logprobs: int | None = ruled(None, optional(LOGPROBS), "the same of the prompt's tokens but the first")
    min_p: float = ruled(0.0, number(0, 1), "tokens below this share of the best one's likelihood are not drawn")
    presence_penalty: float = ruled(0.0, number(-2, 2), "subtracted from the logits of generated tokens")
    frequency_penalty: float = ruled(0.0, number(-2, 2), "subtracted for each time that a token was generated")
    repetition_penalty: float = ruled(
        1.0, number(1e-6, 10**6), "divides logits > 0 and multiplies others of tokens seen before, prompt included"
    )
    logit_bias: Mapping[int, float] | None = ruled(None, optional(BIASES), "added to the logits of these tokens")
    bad_words: tuple[str | tuple[int, ...], ...] = ruled((), BAD_WORDS, "never generated; LLM makes token ids of texts")
    allowed_token_ids: tuple[int, ...] | None = ruled(
        None, optional(list_of(TOKEN_ID, least=1)), "no other tokens are generated; None: all are allowed"
    )
    logits_processors: tuple[LogitsProcessor, ...] = ruled((), FUNCTIONS, "run in the worker, to which they go pickled")
    n: int = ruled(1, COUNT, "number of answers; answer i of a seeded request has the seed + i")
    best_of: int | None = ruled(None, optional(COUNT), "number of answers to choose the n likeliest from; None: n")

    def __post_init__(self) -> None:
        for name in ("stop", "stop_token_ids", "bad_words", "logits_processors"):
            object.__setattr__(self, name, _as_tuple(getattr(self, name) or ()))
        object.__setattr__(self, "allowed_token_ids", _as_tuple(self.allowed_token_ids))
        if isinstance(self.logit_bias, dict):  # the keys of a JSON object are text
            bias = {int(k) if isinstance(k, str) and k.isdecimal() else k: v for k, v in self.logit_bias.items()}
            object.__setattr__(self, "logit_bias", bias)
        check(self, RequestError)
        if self.min_tokens > (self.max_tokens or math.inf):
            raise RequestError("min_tokens", self.min_tokens, f"at most max_tokens, {self.max_tokens}")
        if self.best_of is not None and self.best_of < self.n:
            raise RequestError("best_of", self.best_of, f"n to {MAX_ANSWERS}, or null")
        if len(self.pickled_processors()) > MAX_PROCESSOR_BYTES:
            allowed = f"at most {MAX_PROCESSOR_BYTES} bytes when pickled"
            raise RequestError("logits_processors", self.logits_processors, allowed)

    def split(self) -> list[SamplingParams]:
        """The parameters of each sequence that is to be generated for these, all with n = 1."""
        count = self.best_of or self.n
        if count == 1:
            return [self]
        logprobs = 0 if self.logprobs is None and count > self.n else self.logprobs  # `best_of` chooses by them
        seeds = [None if self.seed is None else (self.seed + i) % 2**64 for i in range(count)]
        first = replace(self, n=1, best_of=None, logprobs=logprobs)
        return [first, *(replace(first, seed=seed, prompt_logprobs=None) for seed in seeds[1:])]

    def pickled_processors(self) -> bytes:
        """`logits_processors` pickled; b"" if there are none. Raises RequestError if one cannot be pickled."""
        try:
            return pickle.dumps(self.logits_processors) if self.logits_processors else b""
        except Exception as error:
            allowed = f"callables that can be pickled ({error})"
            raise RequestError("logits_processors", self.logits_processors, allowed) from None

    @property
    def changes_logits(self) -> bool:
        """Whether the logits are changed before a token is drawn from them."""
        penalties = self.presence_penalty, self.frequency_penalty, self.repetition_penalty
        others = self.logit_bias, self.bad_words, self.allowed_token_ids, self.logits_processors
        return penalties != (0, 0, 1) or any(others)


# The sampling parameters that are plain data. Rows of JSONL, bodies of HTTP requests and the options of the command are
# made of them.
PLAIN_FIELDS = {f.name: f for f in fields(SamplingParams) if f.name != "logits_processors"}


@dataclass(frozen=True, slots=True)
class BeamSearchParams:
    """How to search for the likeliest answers. Names, defaults and meanings are those of transformers.

    Raises:
        RequestError: a value out of range; names field, value and what is allowed.
    """

    num_beams: int = ruled(4, integer(1, MAX_LOGPROBS // 2), "answers, and candidates for them")
    max_tokens: int = ruled(16, integer(1), "of an answer")
    length_penalty: float = ruled(1.0, number(-1e3, 1e3), "scores are log probabilities / length ** length_penalty")
    early_stopping: bool | str = ruled(
        False, one_of(False, True, "never"), "True: as soon as there are enough; never: when none can get better"
    )
    ignore_eos: bool = ruled(False, BOOLEAN, "go on after the model's end tokens")

    def __post_init__(self) -> None:
        check(self, RequestError)


def _as_tuple(value: Any) -> Any:
    """A tuple of the values of a list, or of one text; lists among the values become tuples too.

    What is no collection is returned as it is, and refused by the field's rule.
    """
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, Iterable):
        return value
    return tuple(tuple(item) if isinstance(item, list) else item for item in value)


@dataclass(frozen=True, slots=True)
class Request:
    """One request as the caller made it. Each sequence that is generated for it holds it.

    Raises:
        RequestError: a number that is out of range; names field, value and what is allowed.
    """

    request_id: str
    prompt_token_ids: list[int]  # must not be changed
    params: SamplingParams
    arrival_s: float = ruled(0.0, DUE, "when it was due, on the engine's clock")
    prompt: str | None = None  # None where token ids were given
    is_streamed: bool = False  # each token is delivered as it comes
    deadline_s: float | None = ruled(None, TIMEOUT, "after arrival, when it is aborted")
    queue_timeout_s: float | None = ruled(None, TIMEOUT, "the same if its prefill has not started")
    # Who was submitted first goes first among equals.
    priority: int = ruled(0, PRIORITY, "lower goes first and is preempted last")
    route: Route | None = None  # asked for in place of one of the policy's
    beams: BeamSearchParams | None = None  # None: sample; else `params` are those of the search's sequences

    def __post_init__(self) -> None:
        check(self, RequestError)

    @property
    def limits_s(self) -> dict[str, float]:
        """The time limits that the request has, by the names of their fields."""
        limits = {"deadline_s": self.deadline_s, "queue_timeout_s": self.queue_timeout_s}
        return {name: limit_s for name, limit_s in limits.items() if limit_s is not None}

    @property
    def max_num_tokens(self) -> int | None:
        """Prompt and answer together; None: as many as the engine allows."""
        max_tokens = self.params.max_tokens
        return None if max_tokens is None else len(self.prompt_token_ids) + max_tokens
