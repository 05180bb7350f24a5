"""What a request must be for a model to be able to serve it, whatever the workers are. Any thread may call it."""

from __future__ import annotations

from nanopd.config import ModelConfig
from nanopd.errors import RequestError
from nanopd.request import Request


def check_request(request: Request, model: ModelConfig, max_model_len: int, has_tokenizer: bool) -> None:
    """Raise RequestError if the model can never serve the request."""
    params = request.params
    if not request.prompt_token_ids:
        raise RequestError("prompt", "", "at least one token")
    bad_words = [word for word in params.bad_words if not isinstance(word, str)]
    if len(bad_words) < len(params.bad_words):
        raise RequestError("bad_words", params.bad_words, "token ids, as the model has no tokenizer")
    for name, ids in (
        ("prompt_token_ids", request.prompt_token_ids),
        ("stop_token_ids", params.stop_token_ids),
        ("logit_bias", params.logit_bias),
        ("allowed_token_ids", params.allowed_token_ids),
        ("bad_words", [token for word in bad_words for token in word]),
    ):
        if ids and not 0 <= min(ids) <= max(ids) < model.vocab_size:
            bad = next(i for i in ids if not 0 <= i < model.vocab_size)
            raise RequestError(name, bad, f"token ids from 0 to {model.vocab_size - 1}")
    num_prompt, max_tokens = len(request.prompt_token_ids), params.max_tokens or max(1, params.min_tokens)
    if num_prompt + max_tokens > max_model_len:
        what = f"{num_prompt} prompt tokens + {max_tokens} output tokens"
        name = "max_tokens" if num_prompt < max_model_len else "prompt"
        raise RequestError(name, what, f"max_model_len={max_model_len} in all")
    if params.stop and not has_tokenizer:
        raise RequestError("stop", params.stop, "nothing, as the model has no tokenizer")
