"""Pieces of text against decoding the whole output, and stop strings against a search character by character."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from profiles import examples
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from nanopd.checkpoints import demo_model
from nanopd.frontend.detokenizer import IncrementalDetokenizer, StoppableText, StopStrings, TokenPieces

CORPUS = [
    "The quick brown fox, the lazy dog.",
    "你好世界。今天天气很好。",
    "naïve café über",
    "🙂🤖 🙂🤖",
    "f(x):\n    x",
]
SPECIAL = ["<s>", "</s>"]


@pytest.fixture(scope="module")
def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=340, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


@pytest.fixture(scope="module")
def byte_fallback() -> Tokenizer:
    """Llama 2's kind: spaces as U+2581, one stripped at the beginning, unknown characters as byte tokens."""
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    words = ["<unk>", *SPECIAL, *bytes_, "▁", "▁▁", "▁the", "▁fox", "a", "b", "é", "你"]
    vocab = {word: token_id for token_id, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocab, [], byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    space, strip = decoders.Replace("▁", " "), decoders.Strip(" ", 1, 0)
    tokenizer.decoder = decoders.Sequence([space, decoders.ByteFallback(), decoders.Fuse(), strip])
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


@pytest.fixture(scope="module")
def demo() -> Tokenizer:
    return Tokenizer.from_file(str(demo_model.path() / "tokenizer.json"))


def check_pieces(tokenizer: Tokenizer, data: st.DataObject, skip_special_tokens: bool) -> None:
    """Random ids, cut anyhow: every piece is final, and all of them are the text of the whole."""
    id_lists = st.lists(st.integers(0, tokenizer.get_vocab_size() - 1), max_size=40)
    chunks = data.draw(st.lists(id_lists, max_size=8))
    detokenizer = IncrementalDetokenizer(TokenPieces(tokenizer, skip_special_tokens), [])
    text, ids = "", []
    for chunk in chunks:
        text += detokenizer.push(chunk)
        ids += chunk
    assert text + detokenizer.finish() == tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)


@pytest.mark.parametrize("skip_special_tokens", [True, False])
@given(data=st.data())
def test_random_ids_byte_level(byte_level: Tokenizer, skip_special_tokens: bool, data: st.DataObject) -> None:
    check_pieces(byte_level, data, skip_special_tokens)


@pytest.mark.parametrize("skip_special_tokens", [True, False])
@given(data=st.data())
def test_random_ids_byte_fallback(byte_fallback: Tokenizer, skip_special_tokens: bool, data: st.DataObject) -> None:
    check_pieces(byte_fallback, data, skip_special_tokens)


@given(data=st.data())
def test_random_ids_demo_model(demo: Tokenizer, data: st.DataObject) -> None:
    check_pieces(demo, data, True)


@given(text=st.text(max_size=60), prompt=st.text(max_size=10))
def test_text_comes_back_and_every_piece_is_whole(byte_level: Tokenizer, text: str, prompt: str) -> None:
    detokenizer = IncrementalDetokenizer(TokenPieces(byte_level), byte_level.encode(prompt).ids)
    pieces = [detokenizer.push([token_id]) for token_id in byte_level.encode(text).ids]
    so_far = "".join(pieces)
    assert text.startswith(so_far)
    assert so_far + detokenizer.finish() == text


@pytest.mark.parametrize("text", ["你好世界。", "🙂🤖", "👩\u200d👩\u200d👧 naïve"])
def test_a_piece_comes_as_soon_as_its_character_is_complete(byte_level: Tokenizer, text: str) -> None:
    detokenizer, ids = IncrementalDetokenizer(TokenPieces(byte_level), []), byte_level.encode(text).ids
    for end, token_id in enumerate(ids, start=1):
        piece = detokenizer.push([token_id])
        complete = not byte_level.decode(ids[:end]).endswith("\N{REPLACEMENT CHARACTER}")
        assert bool(piece) == complete
    assert detokenizer.finish() == ""


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [([], "the fox"), (["<s>"], "the fox"), (["<s>", "a"], " the fox"), (["<0x0A>"], " the fox")],
)
def test_leading_space_is_kept_after_a_prompt_with_text(
    byte_fallback: Tokenizer, prompt: list[str], expected: str
) -> None:
    prompt_token_ids = [byte_fallback.token_to_id(token) for token in prompt]
    detokenizer = IncrementalDetokenizer(TokenPieces(byte_fallback), prompt_token_ids)
    ids = [byte_fallback.token_to_id(token) for token in ("▁the", "▁fox")]
    assert detokenizer.push(ids) + detokenizer.finish() == expected


def test_prompt_that_ends_inside_a_character_does_not_reach_the_output(byte_level: Tokenizer) -> None:
    ids = byte_level.encode("🦊fox").ids
    detokenizer = IncrementalDetokenizer(TokenPieces(byte_level), ids[:1])
    assert detokenizer.push(ids[1:]) + detokenizer.finish() == byte_level.decode(ids[1:])


def test_endless_broken_characters_are_not_hoarded(byte_level: Tokenizer) -> None:
    """A model may repeat the first byte of a character for ever; no more than a few ids wait."""
    fragment = byte_level.encode("🦊").ids[0]
    detokenizer = IncrementalDetokenizer(TokenPieces(byte_level), [])
    text = "".join(detokenizer.push([fragment]) for _ in range(100))
    assert len(text) >= 90
    assert text + detokenizer.finish() == byte_level.decode([fragment] * 100)


def cut_by_characters(text: str, may_stop: list[bool], stop: list[str]) -> tuple[str, str | None]:
    for end in range(1, len(text) + 1):
        found = [string for string in stop if may_stop[end - 1] and text[:end].endswith(string)]
        if found:
            longest = max(found, key=len)
            return text[: end - len(longest)], longest
    return text, None


SHORT = st.text("ab\n", max_size=4)


@given(
    pieces=st.lists(SHORT, max_size=12),
    stop=st.lists(SHORT.filter(len), min_size=1, max_size=4),
    num_protected=st.integers(0, 4),
)
@examples(4)
def test_stop_strings_cut_where_the_first_is_complete(pieces: list[str], stop: list[str], num_protected: int) -> None:
    strings, out = StopStrings(stop), ""
    may_stop = [i >= num_protected for i, piece in enumerate(pieces) for _ in piece]
    expected, expected_stop = cut_by_characters("".join(pieces), may_stop, stop)
    for i, piece in enumerate(pieces):
        out += strings.push(piece, may_stop=i >= num_protected)
        if strings.matched:
            break
        assert expected.startswith(out), "text of a stop string was given out"
    assert (out + strings.finish(), strings.matched) == (expected, expected_stop)


def test_stop_strings_hold_back_no_more_than_a_beginning() -> None:
    strings = StopStrings(["\n\nUser:", "END"])
    assert strings.push("Hello\n") == "Hello"
    assert strings.push("\nUs") == ""
    assert strings.push("ually. EN") == "\n\nUsually. "
    assert strings.push("D of it") == ""
    assert strings.matched == "END"
    assert strings.finish() == ""


def test_stop_strings_may_hold_pattern_characters() -> None:
    strings = StopStrings([".*", "$$", "^a]", "-]", "\\"])
    assert strings.push("any text.") + strings.push(" costs ^") + strings.push("2 - 3 $") == "any text. costs ^2 - 3 "
    assert strings.push("$") == ""
    assert strings.matched == "$$"


# ------------------------------------------------------------------------------------------------- both together


@pytest.mark.parametrize("size", [1, 3, 100])
def test_stop_string_across_tokens(byte_level: Tokenizer, size: int) -> None:
    ids = byte_level.encode("The lazy 🙂 fox, the quick 🤖 dog").ids
    text = StoppableText(TokenPieces(byte_level), [], ("🤖", "x, the"))
    out = [text.push(ids[start : start + size]) for start in range(0, len(ids), size)]
    assert "".join(out) == text.text == "The lazy 🙂 fo"
    assert text.stopped_by == "x, the"
    assert text.push(ids) == text.finish() == ""


def test_tokenizers_of_transformers_are_taken_too(byte_level: Tokenizer) -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level)
    ids = byte_level.encode("naïve fox").ids
    text = StoppableText(TokenPieces(tokenizer), [], (" fox",))
    assert text.push(ids) == "naïve"


def test_text_without_a_match_is_whole(byte_level: Tokenizer) -> None:
    ids = byte_level.encode("The quick 🦊").ids
    text = StoppableText(TokenPieces(byte_level), [], ("quick 🤖", "🦊🦊"))
    for token_id in ids[:-1]:
        text.push([token_id])
    text.finish()
    assert text.stopped_by is None
    assert text.text == byte_level.decode(ids[:-1])


def test_stop_string_may_end_only_in_tokens_that_may_stop(byte_level: Tokenizer) -> None:
    ids = [byte_level.token_to_id(character) for character in "abab"]
    text = StoppableText(TokenPieces(byte_level), [], ("ab",))
    out = [text.push([token_id], may_stop=i >= 2) for i, token_id in enumerate(ids)]
    assert (text.text, text.stopped_by, out[1]) == ("ab", "ab", "ab")
