"""Text that streams: it continues the prompt, comes in whole characters, and is never taken back."""

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tokenizers
from generate import Stream
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizer import ByteTokenizer, FileTokenizer, Tokenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

REPLACEMENT = "\ufffd"


def with_bos(tokenizer: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    tokenizer.add_special_tokens(["<s>", "</s>"])
    bos = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    return tokenizer


def sentencepiece() -> tokenizers.Tokenizer:
    """As of Llama 2: ▁ for spaces, one of them before the text, bytes for characters that have no token."""
    vocab = {token: index for index, token in enumerate(["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))])}
    merges = []
    for word in ("▁the", "▁of", "▁France", "▁is", "▁Paris", "."):
        vocab.setdefault(word[0], len(vocab))
        for end in range(1, len(word)):
            vocab.setdefault(word[end], len(vocab))
            vocab.setdefault(word[: end + 1], len(vocab))
            merges.append((word[:end], word[end]))
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocab, list(dict.fromkeys(merges)), unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return with_bos(tokenizer)


def byte_level() -> tokenizers.Tokenizer:
    """As of GPT-2 and Llama 3: every token is a run of bytes, which may end inside of a character."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate([*alphabet, "ĠP", "Ġð", "ĠðŁ", "Ã©"])}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab, [("Ġ", "P"), ("Ġ", "ð"), ("Ġð", "Ł"), ("Ã", "©")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return with_bos(tokenizer)


def rewriting() -> tokenizers.Tokenizer:
    """Its decoder replaces what it gave before, once the next token is there."""
    vocab = {token: index for index, token in enumerate(["[UNK]", "a", "b", "x"])}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.decoder = decoders.Sequence([decoders.Fuse(), decoders.Replace("ab", "c")])
    return tokenizer


@pytest.fixture(scope="module")
def by_name(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("tokenizers")
    found: dict[str, Any] = {"bytes": ByteTokenizer(bos=0)}
    for make in (sentencepiece, byte_level, rewriting):
        make().save(str(folder / make.__name__))
        found[make.__name__] = FileTokenizer(folder / make.__name__)
    return found


def streamed(tokenizer: Tokenizer, prompt: list[int], output: list[int]) -> list[str]:
    """The text that each token adds, and that an end after the last adds."""
    stream = tokenizer.stream(prompt)
    return [*(stream.add(token) for token in output), stream.rest()]


TEXTS = st.text(st.sampled_from("the Paris é€😀\x00.\n" + REPLACEMENT), min_size=0, max_size=12)


@pytest.mark.parametrize("name", ["bytes", "sentencepiece", "byte_level"])
@settings(max_examples=150, deadline=None, derandomize=True)
@given(text=TEXTS, split=st.integers(0, 60))
@example(text="the is Paris.", split=2)
@example(text=REPLACEMENT + " Paris", split=4)
@example(text="😀 Paris", split=5)
def test_the_stream_continues_the_prompt(by_name: dict[str, Any], name: str, text: str, split: int):
    tokenizer = by_name[name]
    tokens = tokenizer.encode(text.replace("\x00", "") if name == "bytes" else text)  # 0 is its separator
    prompt, output = tokens[: split + 1], tokens[split + 1 :]
    before, whole = tokenizer.decode(prompt), tokenizer.decode(tokens)
    if before.endswith(REPLACEMENT) and tokenizer.encode(before) != prompt:
        return  # the split is inside of a character, which no prompt ends with
    assert before + "".join(streamed(tokenizer, prompt, output)) == whole


@pytest.mark.parametrize("name", ["bytes", "sentencepiece", "byte_level"])
@pytest.mark.parametrize(
    ("data", "shown"),
    [
        (REPLACEMENT.encode(), [REPLACEMENT]),
        (REPLACEMENT.encode() + b"a", [REPLACEMENT, "a"]),
        ("é€😀a".encode(), ["é", "€", "😀", "a"]),
        ("€😀".encode() + "é".encode()[:1], ["€", "😀"]),
        ("€".encode() + REPLACEMENT.encode() + "😀".encode()[:3], ["€", REPLACEMENT]),
        ("😀".encode() + b"\xffa", ["😀", REPLACEMENT, "a"]),
        ("中文".encode()[:5] + b"a" + "中".encode(), ["中", REPLACEMENT, "a", "中"]),
        (b"\xff" * 5, [REPLACEMENT] * 5),
        (b"\xc3", []),
    ],
)
def test_characters_come_once_and_whole(by_name: dict[str, Any], name: str, data: bytes, shown: list[str]):
    tokenizer = by_name[name]
    if name == "byte_level":
        characters = {byte: character for character, byte in tokenizer._vocabulary.alphabet.items()}
        tokens = [tokenizer._tokenizer.token_to_id(characters[byte]) for byte in data]
    else:
        tokens = [byte + (name == "sentencepiece") for byte in data]  # whose token 0 is <unk>
    pieces = streamed(tokenizer, tokenizer.encode("the"), tokens)
    assert "".join(pieces) == "".join(shown)
    if REPLACEMENT not in shown:  # nothing is held back that is whole
        assert [piece for piece in pieces[:-1] if piece] == shown


def test_a_token_with_half_a_character_shows_the_rest_of_it(by_name: dict[str, Any]):
    tokenizer = by_name["byte_level"]
    tokens = tokenizer.encode("é 😀")[1:]
    assert len(tokens) == 4  # é, then a space with half of the character, then its other half
    assert "".join(streamed(tokenizer, tokenizer.encode("P"), tokens[:2])) == "é "
    assert "".join(streamed(tokenizer, tokenizer.encode("P"), tokens)) == "é 😀"


def test_special_and_unknown_tokens_have_no_text(by_name: dict[str, Any]):
    tokenizer = by_name["sentencepiece"]
    bos, end = (tokenizer._tokenizer.token_to_id(token) for token in ("<s>", "</s>"))
    half, rest = tokenizer.encode("€")[-3:-1], tokenizer.encode("€")[-1:]
    assert streamed(tokenizer, [bos], [*half, end, 10**6, *rest, end]) == ["", "", "", "", "€", "", ""]


def test_a_decoder_that_rewrites_takes_nothing_back(by_name: dict[str, Any]):
    tokenizer = by_name["rewriting"]
    assert tokenizer.decode([1, 2, 3, 3]) == "cxx"
    assert streamed(tokenizer, [], [1, 2, 3, 3]) == ["a", "", "bx", "x", ""]


def test_a_word_after_bytes_at_the_start_keeps_its_space(by_name: dict[str, Any]):
    tokenizer = by_name["sentencepiece"]
    bos, paris = (tokenizer._tokenizer.token_to_id(token) for token in ("<s>", "▁Paris"))
    tokens = [*(1 + byte for byte in "😀".encode()), paris]
    assert "".join(streamed(tokenizer, [bos], tokens)) == tokenizer.decode([bos, *tokens]) == "😀 Paris"


def test_an_output_that_ends_with_a_replacement_character_shows_it(by_name: dict[str, Any]):
    tokenizer = by_name["byte_level"]
    generation: Any = SimpleNamespace(output=tokenizer.encode(REPLACEMENT)[1:], finish_reason=None)
    stream = Stream("P", tokenizer, generation)
    assert stream.text == ""
    generation.finish_reason = "length"
    assert stream.text == REPLACEMENT


def test_a_stream_takes_what_came_since_the_last_look(by_name: dict[str, Any]):
    tokenizer = by_name["sentencepiece"]
    prompt = "the of"
    tokens = tokenizer.encode(f"{prompt} Paris é")[len(tokenizer.encode(prompt)) :]
    generation: Any = SimpleNamespace(output=[], finish_reason=None)
    stream = Stream(prompt, tokenizer, generation)
    shown = []
    for count in range(len(tokens)):
        generation.output = tokens[:count]  # another list each time, as `Generation.output` is
        shown.append(stream.text)
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(shown))
    generation.output, generation.finish_reason = tokens, "length"
    assert prompt + stream.text == f"{prompt} Paris é"


@pytest.mark.parametrize("option", ["truncation", "padding"])
def test_truncation_and_padding_are_off(tmp_path: Path, option: str):
    tokenizer = sentencepiece()
    text = "the of " * 20
    expected = tokenizer.encode(text).ids
    if option == "truncation":
        tokenizer.enable_truncation(8)
    else:
        tokenizer.enable_padding(length=512, pad_id=2)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert FileTokenizer(tmp_path / "tokenizer.json").encode(text) == expected
