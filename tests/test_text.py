"""The text of an output: cut at the stop string that is complete first, shown as soon as it can be."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizer_files import byte_level

from jax_paged_attn.serving._text import OutputText, Tokenizer
from jax_paged_attn.serving._tokenizers import ByteTokenizer, FileTokenizer

REPLACEMENT = "\ufffd"


@pytest.fixture(scope="module")
def by_name(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    path = tmp_path_factory.mktemp("tokenizers") / "tokenizer.json"
    byte_level().save(str(path))
    return {"bytes": ByteTokenizer(bos=0), "byte_level": FileTokenizer(path)}


def cut(text: str, stop: Sequence[str]) -> tuple[str, bool]:
    """The oracle: the shortest beginning that ends with a stop string, without it; True if there is one."""
    for end in range(len(text) + 1):
        found = [string for string in stop if text[:end].endswith(string)]
        if found:
            return text[: end - max(map(len, found))], True
    return text, False


def shown(text: str, stop: Sequence[str]) -> str:
    """As much of a text that goes on as will never be taken back."""
    before, stopped = cut(text, stop)
    beginnings = [string[:length] for string in stop for length in range(1, len(string))]
    held = max((len(beginning) for beginning in beginnings if text.endswith(beginning)), default=0)
    return before if stopped else text[: len(text) - held]


def check_pieces(tokenizer: Tokenizer, prompt: Sequence[int], tokens: Sequence[int], stop: list[str]) -> None:
    output, stream = OutputText(tokenizer, prompt, stop), tokenizer.stream(prompt)
    pieces, whole = [], ""
    for token in tokens:
        pieces.append(output.add(token))
        whole += stream.add(token)
        assert "".join(pieces) == output.text == shown(whole, stop)
        assert output.stopped == cut(whole, stop)[1]
    pieces += [output.end(), output.end()]  # the second one adds nothing
    assert ("".join(pieces), output.stopped) == cut(whole + stream.rest(), stop)
    assert output.text == "".join(pieces)


# Few characters, so that stop strings are found and overlap. In `byte_level`, " P" is one token, and another one is a
# space with half of the emoji; its stream gives U+FFFD at the end of an output only by `rest`.
ALPHABET = st.sampled_from("aab P😀é" + REPLACEMENT)
STOP = st.lists(st.text(ALPHABET, min_size=1, max_size=4), max_size=3)


@pytest.mark.parametrize("name", ["bytes", "byte_level"])
@settings(max_examples=400, deadline=None, derandomize=True)
@given(text=st.text(ALPHABET, max_size=16), stop=STOP, lost=st.integers(0, 3))
@example(text="aaab", stop=["aab"], lost=0)
@example(text="aabaaab", stop=["aabaaab", "baab"], lost=0)
@example(text="aabaab", stop=["aabaaab"], lost=0)
@example(text="b😀 😀", stop=["😀 😀"], lost=0)
@example(text="b P", stop=[" "], lost=0)
@example(text="abba", stop=["bba", "abb", "bb"], lost=0)
@example(text="aé" + REPLACEMENT, stop=["é" + REPLACEMENT], lost=0)
@example(text="ab😀", stop=["b😀"], lost=1)
def test_pieces_are_the_text_before_the_first_stop_string(
    by_name: dict[str, Tokenizer], name: str, text: str, stop: list[str], lost: int
):
    tokenizer = by_name[name]
    tokens = tokenizer.encode(text)
    prompt, tokens = tokens[:1], tokens[1 : max(1, len(tokens) - lost)]  # the end may be inside of a character
    check_pieces(tokenizer, prompt, tokens, stop)


@dataclasses.dataclass
class Spelled:
    """A tokenizer that is its own stream: its tokens have the given texts, and it always holds back `end`."""

    texts: list[str]
    end: str

    def stream(self, _: Sequence[int]) -> "Spelled":
        return self

    def add(self, token: int) -> str:
        return self.texts[token]

    def rest(self) -> str:
        return self.end


TEXTS = st.text(ALPHABET, max_size=5)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(texts=st.lists(TEXTS, max_size=4), end=TEXTS, stop=STOP)
@example(texts=["abcd"], end="", stop=["cd", "b"])  # in one token, the later one named first
@example(texts=["xabcd"], end="", stop=["abcd", "bc"])  # "bc" is complete first
@example(texts=["xabc"], end="abc", stop=["bc", "abc"])
def test_tokens_of_several_characters(texts: list[str], end: str, stop: list[str]):
    tokenizer: Any = Spelled(texts, end)
    check_pieces(tokenizer, [], range(len(texts)), stop)


def test_the_rest_of_the_stream_may_complete_a_stop_string(by_name: dict[str, Any]):
    tokenizer = by_name["byte_level"]
    bos, *tokens = tokenizer.encode("ab" + REPLACEMENT)
    output = OutputText(tokenizer, [bos], ["b" + REPLACEMENT])
    assert [output.add(token) for token in tokens] == ["a", *[""] * (len(tokens) - 1)]
    assert not output.stopped
    assert (output.end(), output.stopped) == ("", True)


def test_the_prompt_begins_no_stop_string():
    output = OutputText(ByteTokenizer(bos=0), [0, *b"en"], ["end"])
    assert output.add(ord("d")) == "d"
    assert not output.stopped


def test_an_output_ends_once():
    output = OutputText(ByteTokenizer(bos=0), [0], ["ab"])
    assert output.add(ord("a")) == ""
    assert [output.end(), output.end(), output.text] == ["a", "", "a"]
    with pytest.raises(ValueError, match=r"^add: expected no token after end\(\)$"):
        output.add(ord("b"))


@pytest.mark.parametrize(
    ("stop", "error", "message"),
    [
        ("end", TypeError, "stop: expected a list of strings, got 'end'"),
        (3, TypeError, "stop: expected a list of strings, got 3"),
        (["end", b"end"], TypeError, r"stop\[1\]: expected a string, got b'end'"),
        (["end", ""], ValueError, r"stop\[1\]: expected a string that is not empty, got ''"),
    ],
)
def test_stop_strings_that_are_none(stop: Any, error: type[Exception], message: str):
    with pytest.raises(error, match=f"^{message}$"):
        OutputText(ByteTokenizer(bos=0), [0], stop)
