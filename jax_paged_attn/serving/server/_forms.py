"""Bodies of requests, checked: what of OpenAI's interface is served, and a clear answer to what is not."""

from __future__ import annotations

import asyncio
import dataclasses
import random
from collections.abc import Collection, Mapping
from typing import Any

from jax_paged_attn.serving._requests import Request, integer
from jax_paged_attn.serving._text import Tokenizer
from jax_paged_attn.serving.server._chat import ChatTemplate
from jax_paged_attn.serving.server._errors import ApiError, shown, wrong

_MOST_CHOICES = 128
_MOST_STOP_STRINGS = 16
_SHORT_TEXT = 4096  # characters that are encoded without leaving the event loop

_COMMON = frozenset(
    {
        *("model", "stream", "stream_options", "n", "stop", "seed", "temperature", "top_p", "top_k", "min_p"),
        *("max_tokens", "logprobs", "user"),
    }
)
_COMPLETION = _COMMON | {"prompt", "best_of"}
_CHAT = _COMMON | {"messages", "max_completion_tokens", "top_logprobs"}
# Fields of OpenAI's that do nothing here, with the values that ask for nothing.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "echo": (False,),
    "suffix": ("",),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "store": (False,),
    "metadata": ({},),
    "service_tier": ("auto", "default"),
}


@dataclasses.dataclass(frozen=True)
class Served:
    """What is served.

    Attributes:
      model_name: what clients call it.
      tokenizer: between texts and tokens.
      max_len: tokens of a prompt and its output together.
      max_prompt_tokens: tokens of a prompt.
      stop_tokens: ids that end every output.
      chat_template: None if there are no chats.
    """

    model_name: str
    tokenizer: Tokenizer
    max_len: int
    max_prompt_tokens: int
    stop_tokens: Collection[int]
    chat_template: ChatTemplate | None


@dataclasses.dataclass(frozen=True)
class Form:
    """A checked body.

    Attributes:
      is_chat: True for a chat, False for completions.
      requests: one per choice: all choices of the first prompt, then those of the second.
      prompt_tokens: tokens of the prompts, each of which counts once.
      streams: True if the answer comes in events.
      includes_usage: True if the last event says how many tokens there were.
    """

    is_chat: bool
    requests: list[Request]
    prompt_tokens: int
    streams: bool
    includes_usage: bool

    @property
    def logprobs(self) -> int | None:
        """See `Request.logprobs`."""
        return self.requests[0].logprobs

    def refusal(self, message: str) -> ApiError:
        """The engine's refusal of a request, with the field that its message begins with under the client's name."""
        name, colon, rest = message.partition(":")
        name = {"logprobs": "top_logprobs", "prompt": "messages"}.get(name, name) if self.is_chat else name
        return ApiError(400, f"{name}{colon}{rest}", param=name.partition("[")[0])


async def completion_form(body: Mapping[str, Any], served: Served) -> Form:
    """The body of `/v1/completions`.

    Raises:
      ApiError: what is wrong with it.
    """
    fields = _known(body, _COMPLETION, served)
    number = _integer(fields, "n", 1, least=1, most=_MOST_CHOICES)
    if _integer(fields, "best_of", number) != number:
        raise wrong("best_of", f"expected the same as n, which is {number}, got {fields['best_of']}")
    prompts = await _prompts(fields.get("prompt"), served)
    if len(prompts) * number > _MOST_CHOICES:
        raise wrong("n", f"expected at most {_MOST_CHOICES} choices of all prompts, got {len(prompts)} times {number}")
    max_tokens = _integer(fields, "max_tokens", 16, least=1)
    options: dict[str, Any] = {**_options(fields, served), "logprobs": fields.get("logprobs")}
    seed = _seed(fields)
    requests = []
    for prompt in prompts:
        _check_length("prompt", prompt, "max_tokens", max_tokens, served)
        requests += [Request(prompt, max_tokens, seed=(seed + i) % 2**32, **options) for i in range(number)]
    return Form(False, requests, sum(map(len, prompts)), *_stream_options(fields))


async def chat_form(body: Mapping[str, Any], served: Served) -> Form:
    """The body of `/v1/chat/completions`.

    Raises:
      ApiError: what is wrong with it, or that the model has no chat template.
    """
    fields = _known(body, _CHAT, served)
    if served.chat_template is None:
        message = f"the model {served.model_name!r} has no chat template; use /v1/completions"
        raise ApiError(400, message, param="messages", code="no_chat_template")
    number = _integer(fields, "n", 1, least=1, most=_MOST_CHOICES)
    wants = fields.get("logprobs", False)
    if not isinstance(wants, bool):
        raise wrong("logprobs", f"expected true or false, got {shown(wants)}")
    if "top_logprobs" in fields and not wants:
        raise wrong("top_logprobs", "expected logprobs to be true beside it")
    logprobs = fields.get("top_logprobs", 0) if wants else None
    options: dict[str, Any] = {**_options(fields, served), "logprobs": logprobs}
    try:
        text = served.chat_template.render(_messages(fields.get("messages")))
    except ValueError as error:
        raise ApiError(400, str(error), param="messages") from None
    prompt = await _encoded(_text("messages", text), served.tokenizer, add_special_tokens=False)
    length = "max_completion_tokens" if "max_completion_tokens" in fields else "max_tokens"
    max_tokens = _integer(fields, length, max(served.max_len - len(prompt), 1), least=1)
    _check_length("messages", prompt, length, max_tokens, served)
    seed = _seed(fields)
    requests = [Request(prompt, max_tokens, seed=(seed + i) % 2**32, **options) for i in range(number)]
    return Form(True, requests, len(prompt), *_stream_options(fields))


def _known(body: Mapping[str, Any], names: Collection[str], served: Served) -> dict[str, Any]:
    """The fields that are there and not null, once it is sure that each of them can be served."""
    fields = {name: value for name, value in body.items() if value is not None}
    for name, value in fields.items():
        if name in _UNSUPPORTED:
            if value not in _UNSUPPORTED[name]:
                allowed = " or ".join(map(shown, _UNSUPPORTED[name]))
                raise wrong(name, f"is not supported: expected {allowed}, got {shown(value)}", "unsupported_parameter")
        elif name not in names:
            raise wrong(name[:60], "is no field that is served here", "unknown_parameter")
    if "model" not in fields:
        raise wrong("model", f"expected {served.model_name!r}, got no such field")
    if fields["model"] != served.model_name:
        message = f"model: expected {served.model_name!r}, got {shown(fields['model'])}"
        raise ApiError(404, message, param="model", code="model_not_found")
    if not isinstance(fields.get("user", ""), str):
        raise wrong("user", f"expected a string, got {shown(fields['user'])}")
    return fields


def _options(fields: Mapping[str, Any], served: Served) -> dict[str, Any]:
    """What a `Request` is told about sampling and stops. The engine checks numbers, and says what is wrong."""
    top_p = fields.get("top_p", 1.0)
    return {
        "temperature": fields.get("temperature", 1.0),
        "top_p": 1e-9 if top_p == 0 else top_p,  # the likeliest token alone, which the engine has no 0 for
        "top_k": 0 if fields.get("top_k") == -1 else fields.get("top_k", 0),  # both stand for all, among clients
        "min_p": fields.get("min_p", 0.0),
        "stop": _stop(fields.get("stop", [])),
        "stop_tokens": served.stop_tokens,
    }


def _stop(value: Any) -> tuple[str, ...]:
    strings = [value] if isinstance(value, str) else value
    if not isinstance(strings, list) or not all(isinstance(string, str) and string for string in strings):
        raise wrong("stop", f"expected a string or a list of strings, none of them empty, got {shown(value)}")
    if len(strings) > _MOST_STOP_STRINGS:
        raise wrong("stop", f"expected at most {_MOST_STOP_STRINGS} strings, got {len(strings)}")
    return tuple(strings)


def _seed(fields: Mapping[str, Any]) -> int:
    """Seeds of 64 bits, also negative ones, as clients send them; the engine has 32."""
    return _integer(fields, "seed", random.getrandbits(32), least=-(2**63), most=2**64 - 1) % 2**32


def _stream_options(fields: Mapping[str, Any]) -> tuple[bool, bool]:
    streams, options = fields.get("stream", False), fields.get("stream_options")
    if not isinstance(streams, bool):
        raise wrong("stream", f"expected true or false, got {shown(streams)}")
    if options is None:
        return streams, False
    if not streams:
        raise wrong("stream_options", "expected stream to be true beside it")
    usage = options.get("include_usage") if isinstance(options, dict) else options
    if not isinstance(options, dict) or not (set(options) <= {"include_usage"} and isinstance(usage, bool | None)):
        raise wrong("stream_options", f'expected {{"include_usage": true or false}}, got {shown(options)}')
    return streams, bool(usage)


async def _prompts(value: Any, served: Served) -> list[list[int]]:
    """Token ids of a text, of texts, of token ids, or of several lists of those."""
    several = value if isinstance(value, list) and value and not isinstance(value[0], int) else [value]
    if len(several) > _MOST_CHOICES:
        raise wrong("prompt", f"expected at most {_MOST_CHOICES} prompts, got {len(several)}")
    prompts = []
    for prompt in several:
        if isinstance(prompt, str):
            prompts.append(await _encoded(_text("prompt", prompt), served.tokenizer))
        elif isinstance(prompt, list) and prompt and all(type(token) is int for token in prompt):
            prompts.append(prompt)
        else:
            raise wrong("prompt", f"expected a text, token ids, or a list of such prompts, got {shown(value)}")
    return prompts


def _messages(value: Any) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value:
        raise wrong("messages", f"expected a list of at least one message, got {shown(value)}")
    messages = []
    for index, message in enumerate(value):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise wrong("messages", f"expected objects with a role and a content, got {shown(message)} at {index}")
        messages.append({**message, "content": _content(message.get("content"), index)})
    return messages


def _content(value: Any, index: int) -> str | None:
    """A message's text, which may come in parts."""
    if value is None or isinstance(value, str):
        return value
    parts = value if isinstance(value, list) else [value]
    for part in parts:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise wrong("messages", f"expected a content of text, got {shown(part)} at {index}")
    return "\n".join(part["text"] for part in parts)


def _text(name: str, value: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError:
        raise wrong(name, "expected text, got half of a surrogate pair") from None
    return value


async def _encoded(text: str, tokenizer: Tokenizer, *, add_special_tokens: bool = True) -> list[int]:
    """Tokens of a text; a long one is encoded in a thread, beside what the event loop does for others."""
    if len(text) <= _SHORT_TEXT:
        return tokenizer.encode(text, add_special_tokens=add_special_tokens)
    return await asyncio.to_thread(tokenizer.encode, text, add_special_tokens=add_special_tokens)


def _check_length(name: str, prompt: list[int], length: str, max_tokens: int, served: Served) -> None:
    code = "context_length_exceeded"
    if len(prompt) > served.max_prompt_tokens:
        raise wrong(name, f"expected at most {served.max_prompt_tokens} tokens, got {len(prompt)}", code)
    if len(prompt) + max_tokens > served.max_len:
        message = f"expected at most {served.max_len} tokens together with {length}, got {len(prompt)} + {max_tokens}"
        raise wrong(name, message, code)


def _integer(
    fields: Mapping[str, Any], name: str, default: int, least: int | None = None, most: int | None = None
) -> int:
    try:
        return integer(name, fields.get(name, default), least=least, most=most)
    except (TypeError, ValueError) as error:
        raise ApiError(400, str(error), param=name) from None
