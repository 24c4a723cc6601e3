"""The text of an output as its tokens come, cut at stop strings. Text that was given is never taken back."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol


class TextStream(Protocol):
    """The text of tokens that come one by one.

    Example:
      >>> from jax_paged_attn.serving import ByteTokenizer, TextStream
      >>> stream: TextStream = ByteTokenizer(bos=0).stream([0])
      >>> [stream.add(byte) for byte in "aé".encode()]
      ['a', '', 'é']
    """

    def add(self, token: int) -> str:
        """The text that `token` completes; "" where a character is still incomplete."""
        ...

    def rest(self) -> str:
        """The whole characters that `add` holds back, for an output that ends here; changes nothing."""
        ...


class Tokenizer(Protocol):
    """Text to token ids and back; `ByteTokenizer` and `FileTokenizer` are two.

    Example:
      >>> from jax_paged_attn.serving import ByteTokenizer, Tokenizer
      >>> def length(tokenizer: Tokenizer, text: str) -> int:
      ...     return len(tokenizer.encode(text))
      >>> length(ByteTokenizer(bos=0), "page")
      5
    """

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids; with the one that every text begins with, unless `add_special_tokens` is False."""
        ...

    def decode(self, tokens: Sequence[int]) -> str:
        """Text without special tokens; U+FFFD where a character is incomplete."""
        ...

    def stream(self, prompt: Sequence[int]) -> TextStream:
        """A stream of the text after the prompt, so that decode(prompt) + text is decode(prompt + tokens)."""
        ...


class OutputText:
    """The text of an output as its tokens come. It ends before the stop string that is complete first.

    The result does not depend on how the text is cut into tokens. If several stop strings are complete at the same
    character, the text ends before the longest. The prompt is not searched, not even for the beginning of a stop
    string.

    Args:
      tokenizer: turns tokens into text.
      prompt: token ids that the output continues.
      stop: strings that end the text, none of them empty.

    Raises:
      TypeError: `stop` is one string, or holds something else than strings.
      ValueError: a stop string is empty.

    Example:
      >>> from jax_paged_attn.serving import ByteTokenizer, OutputText
      >>> output = OutputText(ByteTokenizer(bos=0), prompt=[0], stop=["end"])
      >>> [output.add(byte) for byte in b"ten ends"]
      ['t', '', '', 'en ', '', '', '', '']
      >>> output.text, output.stopped
      ('ten ', True)
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stop: Iterable[str] = ()):
        self._searches = [_Search(string) for string in _checked(stop)]
        self._stream = tokenizer.stream(prompt)
        self._given: list[str] = []
        self._held = ""  # could still become a stop string
        self._stopped = False
        self._ended = False

    @property
    def text(self) -> str:
        """All text that was given so far."""
        return "".join(self._given)

    @property
    def stopped(self) -> bool:
        """True once a stop string was complete."""
        return self._stopped

    def add(self, token: int) -> str:
        """The text that can be shown now; without its end, where that could still become a stop string.

        After a stop string every token's text is "", so a step may hand over all of its tokens.

        Raises:
          ValueError: `end` was called.
        """
        if self._ended:
            raise ValueError("add: expected no token after end()")
        return "" if self._stopped else self._take(self._stream.add(token))

    def end(self) -> str:
        """The text that was held back, for an output that ends here; "" after a stop string, and when called again.

        Characters that the stream held back may complete a stop string. The text ends before that one, too.
        """
        was_ended, self._ended = self._ended, True
        if was_ended or self._stopped:
            return ""
        text = self._take(self._stream.rest())
        held, self._held = self._held, ""
        self._given.append(held)
        return text + held

    def _take(self, new: str) -> str:
        """Gives what was held back and `new`, up to a stop string or to what could become one."""
        text = self._held + new
        found = [(end, end - len(search.string)) for search in self._searches if (end := search.end_in(new))]
        if found:
            _, start = min(found)
            until = len(self._held) + start
            self._stopped, self._held = True, ""
        else:
            until = len(text) - max((search.matched for search in self._searches), default=0)
            self._held = text[until:]
        self._given.append(text[:until])
        return text[:until]


class _Search:
    """The search for a string in a text that comes in pieces, by the algorithm of Knuth, Morris and Pratt.

    A character costs the same number of comparisons on average, however long the string is.

    Attributes:
      string: the string, not empty.
      matched: how many characters of it the text so far ends with.
    """

    def __init__(self, string: str):
        self.string = string
        self.matched = 0
        # The string searched in itself: after n characters of it, the longest shorter match is _shorter[n - 1].
        self._shorter = [0]
        for character in string[1:]:
            self._add(character)
            self._shorter.append(self.matched)
        self.matched = 0

    def end_in(self, piece: str) -> int | None:
        """Where in the next piece of the text the string is complete, as the index after it; None if nowhere."""
        for index, character in enumerate(piece):
            self._add(character)
            if self.matched == len(self.string):
                return index + 1
        return None

    def _add(self, character: str) -> None:
        while self.matched and self.string[self.matched] != character:
            self.matched = self._shorter[self.matched - 1]
        self.matched += self.string[self.matched] == character


def _checked(stop: Iterable[str]) -> list[str]:
    if isinstance(stop, str) or not isinstance(stop, Iterable):
        raise TypeError(f"stop: expected a list of strings, got {stop!r}")
    strings = list(stop)
    for index, string in enumerate(strings):
        if not isinstance(string, str):
            raise TypeError(f"stop[{index}]: expected a string, got {string!r}")
        if not string:
            raise ValueError(f"stop[{index}]: expected a string that is not empty, got ''")
    return strings
