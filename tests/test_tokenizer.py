"""Text that streams: it continues the prompt, comes in whole characters, and is never taken back."""

import itertools
from pathlib import Path
from typing import Any

import pytest
from harness import python
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizer_files import byte_level, rewriting, sentencepiece

from jax_paged_attn.serving import ByteTokenizer, FileTokenizer, Generation, OutputText, Request, Tokenizer

REPLACEMENT = "\ufffd"


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


def generation_of(tokenizer: Tokenizer, prompt: list[int]) -> Generation:
    return Generation(Request(prompt, 20), prompt.copy(), _text=OutputText(tokenizer, prompt), _decoded=len(prompt))


def test_an_output_that_ends_with_a_replacement_character_shows_it(by_name: dict[str, Any]):
    tokenizer = by_name["byte_level"]
    generation = generation_of(tokenizer, tokenizer.encode("P"))
    generation.tokens += tokenizer.encode(REPLACEMENT)[1:]
    assert generation.text == ""
    generation.finish_reason = "length"
    assert generation.text == generation.text == REPLACEMENT


@pytest.mark.parametrize("every", [1, 2, 5])
def test_the_text_of_a_generation_grows_with_its_tokens(by_name: dict[str, Any], every: int):
    tokenizer = by_name["sentencepiece"]
    prompt = "the of"
    generation = generation_of(tokenizer, tokenizer.encode(prompt))
    shown = []
    for index, token in enumerate(tokenizer.encode(f"{prompt} Paris é")[len(generation.tokens) :]):
        generation.tokens.append(token)
        if index % every == 0:
            shown.append(generation.text)
    generation.finish_reason = "cancelled"
    shown.append(generation.text)
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(shown))
    assert prompt + generation.text == f"{prompt} Paris é"


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


@pytest.mark.parametrize("call", ["ByteTokenizer(256)", "byte.decode([0, 256])", "byte.stream([0]).add(-1)"])
def test_a_token_that_is_no_byte_is_named(call: str):
    with pytest.raises(ValueError, match=r"^(bos|tokens?): expected bytes, integers in \[0, 256\), got (256|-1)$"):
        eval(call, {"ByteTokenizer": ByteTokenizer, "byte": ByteTokenizer(bos=0)})


def test_only_files_need_the_library(tmp_path: Path):
    sentencepiece().save(str(tmp_path / "tokenizer.json"))
    script = """
import sys
sys.modules["tokenizers"] = None  # as if it was not there
import jax_paged_attn.serving
from jax_paged_attn.serving import ByteTokenizer, FileTokenizer, OutputText
print(OutputText(ByteTokenizer(0), [0]).add(97))
try:
    FileTokenizer(sys.argv[1])
except ModuleNotFoundError as error:
    print(error.name, error)
"""
    assert python(script, str(tmp_path / "tokenizer.json")) == [
        "a",
        'tokenizers FileTokenizer needs the package "tokenizers", which is not installed: '
        'pip install "jax-paged-attn[serve]"',
    ]
