"""What callers hear of their sequences: tokens and text of streams, and every end.

Engine's thread. Where there is a tokenizer, text is made while tokens come for streams and for stop strings alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from nanopd.core.sequence import Sequence, TextStream

MakeText = Callable[[list[int], tuple[str, ...]], TextStream]  # of prompt_token_ids and stop strings


@dataclass(slots=True)
class Update:
    """News of a sequence: new tokens of a streamed one, or the end of any."""

    seq: Sequence
    token_ids: list[int]
    text: str
    is_finished: bool


class Answers:
    """Updates that have not been handed out."""

    def __init__(self, make_text: MakeText | None) -> None:
        """`make_text`: None: there is no tokenizer."""
        self._make_text = make_text
        self._updates: list[Update] = []

    @property
    def have_text(self) -> bool:
        return self._make_text is not None

    def begin(self, seq: Sequence) -> None:
        """Make ready for the tokens of a new sequence."""
        request = seq.request
        if (request.is_streamed or seq.params.stop) and self._make_text is not None:
            seq.text = self._make_text(request.prompt_token_ids, seq.params.stop)

    def push(self, seq: Sequence) -> bool:
        """Take the newest token of a watched sequence; whether a stop string has been found."""
        new, stream, text = seq.token_ids[-1:], seq.text, ""
        if stream is not None and new[0] not in seq.stop_ids:  # a stop token is not part of the text
            text = stream.push(new, len(seq.token_ids) >= seq.min_len)
        if seq.request.is_streamed:
            self._updates.append(Update(seq, new, text, False))
        if stream is None or stream.stopped_by is None:
            return False
        seq.stop_reason = stream.stopped_by
        return True

    def end(self, seq: Sequence) -> None:
        """A sequence has finished."""
        self._updates.append(Update(seq, [], seq.text.finish() if seq.text is not None else "", is_finished=True))

    def take(self) -> list[Update]:
        """All updates since the last call."""
        updates, self._updates = self._updates, []
        return updates
