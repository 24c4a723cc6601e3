"""The text and the log probabilities of one choice as its tokens come, and how an answer writes them as JSON."""

from __future__ import annotations

import dataclasses
import json
import time
import uuid
from collections import deque
from collections.abc import Sequence
from typing import Any

from jax_paged_attn.serving._requests import Request, TokenLogprobs
from jax_paged_attn.serving._text import OutputText, Tokenizer
from jax_paged_attn.serving.server._forms import Form
from jax_paged_attn.serving.server._thread import News

_LEAST_LOGPROB = -9999.0  # for -inf, which JSON does not have
_json = json.JSONEncoder(separators=(",", ":")).encode


class Pieces:
    """The bytes of single tokens, each looked up once.

    Args:
      tokenizer: its `token_bytes` says them; if there is none, the bytes of its text are taken.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._bytes_of = getattr(tokenizer, "token_bytes", lambda token: tokenizer.decode([token]).encode())
        self._known: dict[int, bytes] = {}

    def data(self, token: int) -> bytes:
        """The token's bytes."""
        if token not in self._known:
            self._known[token] = self._bytes_of(token)
        return self._known[token]

    def text(self, token: int) -> str:
        """The token's text; bytes that are no text are spelled as OpenAI spells them."""
        data = self.data(token)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
    """A token with its log probabilities, and where its text begins in the choice's."""

    token: int
    logprobs: TokenLogprobs
    start: int


class Choice:
    """One of the outputs that a client asked for.

    Attributes:
      finish_reason: None while there is more to come.
      num_tokens: tokens so far.
    """

    def __init__(self, request: Request, tokenizer: Tokenizer):
        self._text = OutputText(tokenizer, list(request.prompt), request.stop)
        self._length = 0  # characters that were given
        self._held: deque[tuple[Entry, int]] = deque()  # entries and where they end, whose text was not given
        self.finish_reason: str | None = None
        self.num_tokens = 0

    def add(self, news: News) -> tuple[str, list[Entry]]:
        """What can be shown now: text that no stop string can take back, and the entries of its tokens."""
        self.num_tokens += len(news.tokens)
        if news.logprobs:
            given = "".join(map(self._add_with_entry, news.tokens, news.logprobs))
        else:
            given = "".join(map(self._text.add, news.tokens))
            self._length += len(given)
        self.finish_reason = news.finish_reason
        if news.finish_reason is not None:
            rest = self._text.end()
            self._length += len(rest)
            given += rest
        return given, self._shown_entries()

    def _add_with_entry(self, token: int, logprobs: TokenLogprobs) -> str:
        start = self._reached
        text = self._text.add(token)
        self._length += len(text)
        self._held.append((Entry(token, logprobs, start), self._reached))
        return text

    @property
    def _reached(self) -> int:
        """Characters so far, with those that are held back."""
        return self._length + len(self._text._held)

    def _shown_entries(self) -> list[Entry]:
        shown = []
        while self._held and self._held[0][1] <= self._length:
            shown.append(self._held.popleft()[0])
        if self.finish_reason is not None:
            # A stop string may end the text inside of a token.
            shown += [entry for entry, _ in self._held if entry.start < self._length or not self._text.stopped]
            self._held.clear()
        return shown


class Writer:
    """The JSON of an answer: as a whole, or in events.

    Args:
      form: what was asked for.
      model_name: what clients call the model.
      pieces: of the tokenizer.
    """

    def __init__(self, form: Form, model_name: str, pieces: Pieces):
        self._form = form
        self._pieces = pieces
        kind = "chatcmpl-" if form.is_chat else "cmpl-"
        self._head = {
            "id": kind + uuid.uuid4().hex,
            "object": "chat.completion" if form.is_chat else "text_completion",
            "created": int(time.time()),
            "model": model_name,
        }
        head = self._head | ({"object": "chat.completion.chunk"} if form.is_chat else {})
        # All events of an answer begin alike.
        self._start = "data: " + _json(head)[:-1]
        self._event = self._start + (',"usage":null' if form.includes_usage else "") + ',"choices":['

    def opening(self, index: int) -> str:
        """The event that comes before a choice's text."""
        if not self._form.is_chat:
            return ""
        return self._choice_event(index, '"delta":{"role":"assistant","content":""}', (), None)

    def event(self, index: int, text: str, entries: Sequence[Entry], finish_reason: str | None) -> str:
        """The event of a text; a chat's reason comes in an event of its own; "" if there is nothing to say."""
        events = ""
        if text or entries or (finish_reason and not self._form.is_chat):
            reason = None if self._form.is_chat else finish_reason
            content = f'"delta":{{"content":{_json(text)}}}' if self._form.is_chat else f'"text":{_json(text)}'
            events = self._choice_event(index, content, entries, reason)
        if finish_reason and self._form.is_chat:
            events += self._choice_event(index, '"delta":{}', (), finish_reason)
        return events

    def _choice_event(self, index: int, content: str, entries: Sequence[Entry], reason: str | None) -> str:
        logprobs = _json(self._logprobs(entries)) if entries else "null"
        ends = f'"logprobs":{logprobs},"finish_reason":{_json(reason)}'
        return f'{self._event}{{"index":{index},{content},{ends}}}]}}\n\n'

    def closing(self, choices: Sequence[Choice]) -> str:
        """The last events."""
        done = "data: [DONE]\n\n"
        if not self._form.includes_usage:
            return done
        return f'{self._start},"choices":[],"usage":{_json(self._usage(choices))}}}\n\n{done}'

    def whole(self, choices: Sequence[Choice], texts: Sequence[str], entries: Sequence[Sequence[Entry]]) -> bytes:
        """The answer that does not come in events."""
        answers = []
        for index, (choice, text, found) in enumerate(zip(choices, texts, entries, strict=True)):
            message = {"role": "assistant", "content": text, "refusal": None}
            content = {"message": message} if self._form.is_chat else {"text": text}
            logprobs = None if self._form.logprobs is None else self._logprobs(found)
            answers.append({"index": index, **content, "logprobs": logprobs, "finish_reason": choice.finish_reason})
        return _json(self._head | {"choices": answers, "usage": self._usage(choices)}).encode()

    def _usage(self, choices: Sequence[Choice]) -> dict[str, int]:
        prompt, output = self._form.prompt_tokens, sum(choice.num_tokens for choice in choices)
        return {"prompt_tokens": prompt, "completion_tokens": output, "total_tokens": prompt + output}

    def _logprobs(self, entries: Sequence[Entry]) -> dict[str, Any]:
        if self._form.is_chat:
            return {"content": [self._chat_entry(entry) for entry in entries], "refusal": None}
        text = self._pieces.text
        return {
            "tokens": [text(entry.token) for entry in entries],
            "token_logprobs": [_finite(entry.logprobs.chosen) for entry in entries],
            # The token itself is among them, however unlikely it was.
            "top_logprobs": [
                {
                    text(token): _finite(value)
                    for token, value in ((entry.token, entry.logprobs.chosen), *entry.logprobs.top)
                }
                for entry in entries
            ],
            "text_offset": [entry.start for entry in entries],
        }

    def _chat_entry(self, entry: Entry) -> dict[str, Any]:
        top = [self._likely(token, value) for token, value in entry.logprobs.top]
        return {**self._likely(entry.token, entry.logprobs.chosen), "top_logprobs": top}

    def _likely(self, token: int, value: float) -> dict[str, Any]:
        return {"token": self._pieces.text(token), "logprob": _finite(value), "bytes": [*self._pieces.data(token)]}


def _finite(value: float) -> float:
    return max(_LEAST_LOGPROB, value)
