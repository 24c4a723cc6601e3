"""Tokenizers: UTF-8 bytes, and tokenizer.json files by the `tokenizers` library of the extra `serve`."""

from __future__ import annotations

import codecs
import dataclasses
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from jax_paged_attn.serving._text import TextStream

if TYPE_CHECKING:
    import tokenizers

_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


class ByteTokenizer:
    """UTF-8 bytes as tokens 0 to 255.

    Args:
      bos: the byte that every text begins with; it has no text wherever it comes.

    Raises:
      ValueError: `bos`, or later a token, is no byte.

    Example:
      >>> from jax_paged_attn.serving import ByteTokenizer
      >>> tokenizer = ByteTokenizer(bos=0)
      >>> tokenizer.encode("aé")
      [0, 97, 195, 169]
      >>> tokenizer.decode([0, 97, 195, 169])
      'aé'
    """

    def __init__(self, bos: int):
        self._bos = _byte("bos", bos)[0]

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The bytes of the text after `bos`; without it if `add_special_tokens` is False."""
        return [self._bos, *text.encode()] if add_special_tokens else [*text.encode()]

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of the bytes that are not `bos`; U+FFFD for those that are no character."""
        return b"".join(_byte("tokens", t) for t in tokens if t != self._bos).decode(errors="replace")

    def stream(self, prompt: Sequence[int]) -> TextStream:
        """A stream of the text after the prompt, which may end inside of a character."""
        return _ByteStream(self._bos, prompt)

    def token_bytes(self, token: int) -> bytes:
        """The byte; none for `bos`."""
        return b"" if token == self._bos else _byte("token", token)


class FileTokenizer:
    """A tokenizer.json of Hugging Face's, run by the `tokenizers` library.

    Truncation and padding that the file asks for are off: they are for training, and would cut prompts silently.

    Args:
      path: the file.

    Raises:
      ValueError: the file is missing or is no tokenizer's; the message is one line that begins with the path.
      ModuleNotFoundError: `tokenizers` is not installed.

    Example:
      >>> import tempfile
      >>> from pathlib import Path
      >>> import tokenizers
      >>> from jax_paged_attn.serving import FileTokenizer
      >>> words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[?]": 0, "paged": 1, "cache": 2}, unk_token="[?]"))
      >>> words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     words.save(f"{folder}/tokenizer.json")
      ...     tokenizer = FileTokenizer(Path(folder, "tokenizer.json"))
      >>> tokenizer.encode("paged cache")
      [1, 2]
      >>> tokenizer.decode([1, 2])
      'paged cache'
    """

    def __init__(self, path: str | Path):
        library = _library()
        path = Path(path)
        try:
            self._tokenizer: tokenizers.Tokenizer = library.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises no class of its own
            reason = " ".join(str(error).split())
            raise ValueError(f"{path}: expected a tokenizer's JSON, got: {reason}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._vocabulary = _Vocabulary.of(self._tokenizer)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids; with those that the file puts around every text, unless `add_special_tokens` is False."""
        return self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, tokens: Sequence[int]) -> str:
        """Text without special tokens and without ids that the file does not have."""
        return self._tokenizer.decode(list(tokens), skip_special_tokens=True)

    def stream(self, prompt: Sequence[int]) -> TextStream:
        """A stream of the text after the prompt; special tokens and ids that the file does not have add no text."""
        return _FileStream(self._tokenizer, self._vocabulary, prompt)

    def token_bytes(self, token: int) -> bytes:
        """The bytes that a token adds to a text, which may be part of a character; none for special tokens."""
        spelling = self._tokenizer.id_to_token(token)
        if token in self._vocabulary.special or spelling is None:
            return b""
        if token in self._vocabulary.fallback:
            return self._vocabulary.fallback[token]
        if self._vocabulary.alphabet:
            return self._vocabulary.spelled(spelling)
        anchor = self._vocabulary.anchor
        return self.decode([*anchor, token])[len(self.decode(anchor)) :].encode()


class _Utf8:
    """Bytes to characters as they come; bytes that begin none become U+FFFD."""

    def __init__(self):
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, data: bytes) -> str:
        return self._decoder.decode(data)

    def end(self) -> str:
        """U+FFFD for a character that goes on no more."""
        text = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return text


class _ByteStream:
    def __init__(self, bos: int, prompt: Sequence[int]):
        self._bos = bos
        self._utf8 = _Utf8()
        for token in prompt:
            self.add(token)

    def add(self, token: int) -> str:
        return "" if token == self._bos else self._utf8.add(_byte("token", token))

    def rest(self) -> str:
        return ""  # a whole character is never held back


@dataclasses.dataclass(frozen=True)
class _Vocabulary:
    """How a tokenizer.json spells bytes.

    Attributes:
      special: ids of special tokens, which have no text.
      fallback: the byte of each token that stands for one, as <0x41> does in sentencepiece's vocabularies.
      alphabet: the byte of each character of a byte-level vocabulary's tokens; empty for other vocabularies.
      anchor: tokens to start a stream from whose beginning nothing is known: text after them keeps its first space.
    """

    special: frozenset[int]
    fallback: dict[int, bytes]
    alphabet: dict[str, int]
    anchor: tuple[int, ...]

    @classmethod
    def of(cls, tokenizer: tokenizers.Tokenizer) -> _Vocabulary:
        decoders = set(_types(json.loads(tokenizer.to_str())["decoder"]))
        fallback: dict[int, bytes] = {}
        if "ByteFallback" in decoders:
            matches = ((token_id, _BYTE_TOKEN.fullmatch(token)) for token, token_id in tokenizer.get_vocab().items())
            fallback = {token_id: bytes.fromhex(match[1]) for token_id, match in matches if match}
        return cls(
            special=frozenset(i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special),
            fallback=fallback,
            alphabet=_byte_level_alphabet() if "ByteLevel" in decoders else {},
            anchor=tuple(token_id for token_id, byte in fallback.items() if byte == b"a"),
        )

    def spelled(self, token: str) -> bytes:
        """The bytes of a byte-level vocabulary's token, or of one that was added to it."""
        if all(character in self.alphabet for character in token):
            return bytes(self.alphabet[character] for character in token)
        return token.encode()


class _FileStream:
    """`DecodeStream`, and beside it a decoder of bytes for the vocabularies that fall back on them.

    Three things are beyond `DecodeStream`. It decodes a run of byte tokens as a whole, so that a stray byte makes
    U+FFFD of all of them, even of characters that it gave before, and it raises. It cannot start from a prompt that
    ends with U+FFFD. And it holds back a text that ends with U+FFFD, be it half a character or that very one.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, vocabulary: _Vocabulary, prompt: Sequence[int]):
        self._tokenizer = tokenizer
        self._vocabulary = vocabulary
        self._utf8 = _Utf8()
        self._is_in_bytes = False
        self._held: list[int] = []  # tokens that DecodeStream took without giving text
        before = self._decode(prompt)
        self._is_at_start = not before  # of the text, where a decoder may drop a space
        self._start_after(vocabulary.anchor if before.endswith("\ufffd") else prompt)

    def add(self, token: int) -> str:
        text = self._add(token)
        self._is_at_start &= not text
        return text

    def rest(self) -> str:
        if not self._vocabulary.alphabet:
            return self._text_of(self._held)
        spellings = (self._tokenizer.id_to_token(token) or "" for token in self._held)
        return _Utf8().add(b"".join(map(self._vocabulary.spelled, spellings)))

    def _add(self, token: int) -> str:
        if token in self._vocabulary.special or self._tokenizer.id_to_token(token) is None:
            return ""
        byte = self._vocabulary.fallback.get(token)
        if byte is not None:
            text, self._held, self._is_in_bytes = self.rest(), [], True
            return text + self._utf8.add(byte)
        text = ""
        if self._is_in_bytes:
            text, self._is_in_bytes = self._utf8.end(), False
            self._start_after(self._vocabulary.anchor)
        return text + self._step(token)

    def _step(self, token: int) -> str:
        try:
            text = self._stream.step(self._tokenizer, token)
        except Exception:  # the library raises no class of its own
            # The decoder would rewrite what it gave before, as those do that clean up spaces: what was shown stays.
            text = self._text_of([*self._held, token])
            self._start_after([token])
        if text is None:
            self._held.append(token)
            return ""
        self._held = []
        return text

    def _start_after(self, context: Sequence[int]) -> None:
        self._stream = _library().decoders.DecodeStream(ids=list(context), skip_special_tokens=True)
        self._held = []

    def _text_of(self, tokens: Sequence[int]) -> str:
        """The text that tokens add to what there is; elsewhere than at its start, they keep a first space."""
        anchor = () if self._is_at_start else self._vocabulary.anchor
        return self._decode([*anchor, *tokens])[len(self._decode(anchor)) :]

    def _decode(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode(list(tokens), skip_special_tokens=True)


def _library() -> ModuleType:
    """The `tokenizers` library, imported when it is needed: the rest of the package works without it."""
    try:
        import tokenizers
    except ModuleNotFoundError as error:
        if error.name != "tokenizers":
            raise
        raise ModuleNotFoundError(
            'FileTokenizer needs the package "tokenizers", which is not installed: pip install "jax-paged-attn[serve]"',
            name=error.name,
        ) from error
    return tokenizers


def _byte(name: str, token: int) -> bytes:
    if not 0 <= token < 256:
        raise ValueError(f"{name}: expected bytes, integers in [0, 256), got {token}")
    return bytes([token])


def _types(decoder: dict[str, Any] | None) -> Iterator[str]:
    """The decoder's type, and those that it is a sequence of."""
    if decoder is not None:
        yield decoder["type"]
        for part in decoder.get("decoders", ()):
            yield from _types(part)


def _byte_level_alphabet() -> dict[str, int]:
    """The characters that stand for bytes in byte-level vocabularies (GPT-2's): printable ones for themselves."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(256) if byte not in printable)
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}
