"""Requests of tests, in fewer words."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from nanopd.core.sequence import Chooser, Sequence
from nanopd.engine.beam_search import BeamSearch, sampling_params
from nanopd.engine.engine import Engine
from nanopd.request import BeamSearchParams, Request, SamplingParams


def submit(
    engine: Engine,
    request_id: str,
    prompt_token_ids: list[int],
    params: SamplingParams,
    *,
    parent: Sequence | None = None,
    chooser: Chooser | None = None,
    **fields: object,
) -> Sequence:
    """`fields` of Request; it arrives now if they do not say when."""
    request = Request(request_id, prompt_token_ids, params, **{"arrival_s": engine.clock(), **fields})
    return engine.submit(request, parent=parent, chooser=chooser)


def start_search(
    engine: Engine, request_id: str, prompt: list[int], beams: BeamSearchParams, on_end: Callable[[BeamSearch], None]
) -> BeamSearch:
    params = sampling_params(beams, () if beams.ignore_eos else engine.model.eos_token_ids)
    return BeamSearch(engine, replace(Request(request_id, prompt, params, engine.clock()), beams=beams), on_end)
