"""Text from token ids as they come, for sequences that stream or have stop strings.

`StoppableText` is the text of one sequence. It joins `IncrementalDetokenizer`, which gives out only text that no later
token can change (never a part of a UTF-8 character), and `StopStrings`, which holds text back while it may be the
beginning of a stop string. All sequences share one `TokenPieces`. None of them knows of requests or of the engine.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from tokenizers import Tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
MAX_CHARACTER_BYTES = 4  # of UTF-8
MAX_HELD_IDS = 8  # once as many ids are held, the text of the first ones is looked for that no later id can change


class TokenPieces(dict[int, "str | None"]):
    """The text of every token that stands for itself, looked up once: `pieces[token_id]`.

    It is None for a token whose text depends on its neighbours: a part of a character, or a byte token, since decoders
    take a run of byte tokens as one. The text is that of a token in the middle of others, where no decoder strips a
    leading space.

    Args:
        tokenizer: a fast tokenizer, transformers' or the `tokenizers` library's own
        skip_special_tokens: leave special tokens out of the text
    """

    def __init__(self, tokenizer: Tokenizer | PreTrainedTokenizerFast, skip_special_tokens: bool = True) -> None:
        super().__init__()
        self._tokenizer: Tokenizer = getattr(tokenizer, "backend_tokenizer", tokenizer)
        self._skip_special_tokens = skip_special_tokens
        byte_ids = (self._tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in range(256))
        self.byte_ids = frozenset(token_id for token_id in byte_ids if token_id is not None)
        plain = (i for i in range(self._tokenizer.get_vocab_size()) if i not in self.byte_ids)
        self._anchor = next(token_id for token_id in plain if self.decode([token_id]).isalnum())
        self._anchor_text = self.decode([self._anchor])

    def __missing__(self, token_id: int) -> str | None:
        text = self.decode_inside([token_id])
        self[token_id] = None if token_id in self.byte_ids or text.endswith(REPLACEMENT) else text
        return self[token_id]

    def decode(self, token_ids: list[int]) -> str:
        """The text of ids before which nothing stands."""
        return self._tokenizer.decode(token_ids, skip_special_tokens=self._skip_special_tokens)

    def decode_inside(self, token_ids: list[int]) -> str:
        """The text of ids before which other text stands."""
        return self.decode([self._anchor, *token_ids])[len(self._anchor_text) :]


class IncrementalDetokenizer:
    """Decodes the output of one sequence.

    The pieces together are what decoding the whole output gives. Some decoders (SentencePiece's) strip the space at the
    beginning of a text; that space is kept where the prompt has text.

    Args:
        pieces: the tokenizer's, shared by all sequences
        prompt_token_ids: the tokens before the output
    """

    def __init__(self, pieces: TokenPieces, prompt_token_ids: Sequence[int]) -> None:
        self._pieces = pieces
        self._held: list[int] = []  # ids whose text is not final yet
        # whether text stands before the held ids
        self._is_inside = any(pieces[token_id] != "" for token_id in reversed(prompt_token_ids))
        self._is_plain = self._is_inside  # and no ids are held, so that the next token's piece is its text

    def push(self, token_ids: Iterable[int]) -> str:
        """Take the next ids; returns the text that has become final, or "" if none has."""
        text = ""
        for token_id in token_ids:
            piece = self._pieces[token_id]
            text += piece if self._is_plain and piece is not None else self._push_held(token_id)
        return text

    def finish(self) -> str:
        """The text still held back when no more ids will come; broken characters become U+FFFD."""
        return self._give_out(len(self._held))

    def _push_held(self, token_id: int) -> str:
        if self._pieces[token_id] == "":
            return ""
        self._held.append(token_id)
        self._is_plain = False
        if token_id in self._pieces.byte_ids:
            return ""
        if self._decode(self._held).endswith(REPLACEMENT):
            return self._give_out(self._num_settled())
        return self._give_out(len(self._held))

    def _num_settled(self) -> int:
        """How many of the held ids have text that no later id can change: a character ends after the last of them."""
        if len(self._held) < MAX_HELD_IDS:
            return 0
        text = self._decode(self._held)
        for cut in range(len(self._held) - MAX_CHARACTER_BYTES, 0, -1):  # an id has at least one byte
            if self._decode(self._held[:cut]) + self._pieces.decode_inside(self._held[cut:]) == text:
                return cut
        return 0

    def _give_out(self, num_ids: int) -> str:
        text = self._decode(self._held[:num_ids])
        if text:
            self._held = self._held[num_ids:]
            self._is_inside = True
            self._is_plain = not self._held
        return text

    def _decode(self, token_ids: list[int]) -> str:
        return self._pieces.decode_inside(token_ids) if self._is_inside else self._pieces.decode(token_ids)


class StopStrings:
    """Cuts a text that comes in pieces before its first stop string.

    The first stop string is the one that ends first; of several with the same end it is the longest. So the result does
    not depend on how the text was cut into pieces.

    Args:
        stop: at least one string, none of them empty
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self.matched: str | None = None  # the stop string that was found
        self._stop = tuple(stop)
        self._held = ""
        self._first_characters = {text[0] for text in stop}
        self._max_held = max(map(len, stop)) - 1

    def push(self, piece: str, may_stop: bool = True) -> str:
        """Take the next piece; returns the text that is certainly before any stop string, or "" if there is none.

        With `may_stop` False, stop strings that end in this piece are not heeded; one that ends later may begin in it.
        """
        assert self.matched is None, "text after a stop string"
        if not self._held and self._first_characters.isdisjoint(piece):
            return piece  # the usual case
        text = self._held + piece
        ends = self._find_ends(text) if may_stop else []
        if ends:
            end, _, self.matched = min(ends)
            self._held = ""
            return text[: end - len(self.matched)]
        cut = self._first_possible_start(text)
        self._held = text[cut:]
        return text[:cut]

    def finish(self) -> str:
        """The text still held back when no more will come."""
        held, self._held = self._held, ""
        return held

    def _find_ends(self, text: str) -> list[tuple[int, int, str]]:
        """(end, -length, stop string) of each stop string's first occurrence that ends behind the held text."""
        new = len(self._held) + 1
        starts = [(text.find(stop, max(0, new - len(stop))), stop) for stop in self._stop]
        return [(start + len(stop), -len(stop), stop) for start, stop in starts if start >= 0]

    def _first_possible_start(self, text: str) -> int:
        """Where the longest suffix of `text` starts that is a prefix of a stop string; len(text) if there is none."""
        starts = range(max(0, len(text) - self._max_held), len(text))
        begun = (i for i in starts if any(s.startswith(text[i:]) and s != text[i:] for s in self._stop))
        return next(begun, len(text))


class StoppableText:
    """The text of one sequence's output, up to its first stop string.

    Args:
        pieces, prompt_token_ids: as for `IncrementalDetokenizer`
        stop: strings that end the text and are not part of it
    """

    def __init__(self, pieces: TokenPieces, prompt_token_ids: Sequence[int], stop: Sequence[str] = ()) -> None:
        self.stopped_by: str | None = None  # the stop string that was found
        self._detokenizer = IncrementalDetokenizer(pieces, prompt_token_ids)
        self._stop_strings = StopStrings(stop) if stop else None
        self._given_out: list[str] = []

    @property
    def text(self) -> str:
        """The text that was given out so far."""
        return "".join(self._given_out)

    def push(self, token_ids: Iterable[int], may_stop: bool = True) -> str:
        """Take the next ids; returns the text that has become final, "" after a stop string."""
        if self.stopped_by is not None:
            return ""
        piece = self._detokenizer.push(token_ids)
        if self._stop_strings is not None:
            piece = self._stop_strings.push(piece, may_stop)
            self.stopped_by = self._stop_strings.matched
        self._given_out.append(piece)
        return piece

    def finish(self) -> str:
        """The text still held back when no more ids will come."""
        if self.stopped_by is not None:
            return ""
        piece = self._detokenizer.finish()
        if self._stop_strings is not None:
            piece = self._stop_strings.push(piece, may_stop=False) + self._stop_strings.finish()
        self._given_out.append(piece)
        return piece
