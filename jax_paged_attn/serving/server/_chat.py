"""Chat templates: the Jinja source that a model's folder brings, run as `transformers` runs it."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from jinja2.ext import Extension
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class ChatTemplate:
    """Messages to the text that a model was trained on.

    The template is code of whoever made the model, so that it runs in Jinja's sandbox.

    Args:
      source: Jinja's.
      special_tokens: texts that the template may name, as "bos_token" and "eos_token".

    Raises:
      ValueError: `source` is no template.

    Example:
      >>> from jax_paged_attn.serving.server import ChatTemplate
      >>> template = ChatTemplate("{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\\n{% endfor %}")
      >>> ChatTemplate("{{ bos_token }}{{ messages[0].content }}", {"bos_token": "<s>"}).render([{"content": "hi"}])
      '<s>hi'
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str] | None = None):
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
        )
        environment.filters["tojson"] = _to_json
        environment.globals |= {"raise_exception": _raise, "strftime_now": _now}
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(
                f"source: expected a Jinja template, got an error in line {error.lineno}: {error}"
            ) from None
        self._special_tokens = dict(special_tokens or {})

    @classmethod
    def from_folder(cls, folder: str | Path) -> ChatTemplate | None:
        """The template of a folder in Hugging Face's layout; None if it has none.

        chat_template.jinja goes before the `chat_template` of tokenizer_config.json, of which the one that is named
        "default" counts where there are several.

        Raises:
          ValueError: a file cannot be read; the message is one line that begins with its path.
        """
        config_file, source_file = Path(folder, "tokenizer_config.json"), Path(folder, "chat_template.jinja")
        config = _config(config_file) if config_file.exists() else {}
        source, origin = config.get("chat_template"), config_file
        if isinstance(source, list):
            named = {item.get("name"): item.get("template") for item in source if isinstance(item, dict)}
            source = named.get("default")
        if source_file.exists():
            source, origin = _read(source_file), source_file
        if source is None:
            return None
        if not isinstance(source, str):
            raise ValueError(f"{origin}: chat_template: expected a string, got {type(source).__name__}")
        try:
            return cls(source, _special_tokens(config))
        except ValueError as error:
            raise ValueError(f"{origin}: {error}") from None

    def render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The text of the messages and the beginning of the answer.

        Raises:
          ValueError: the template refuses the messages.
        """
        try:
            return self._template.render(
                messages=messages, tools=None, documents=None, add_generation_prompt=True, **self._special_tokens
            )
        except Exception as error:  # the template's code, with whatever the messages hold
            reason = " ".join(str(error).split())
            raise ValueError(f"messages: the chat template refuses them: {reason or type(error).__name__}") from None


class _Generation(Extension):
    """The block `{% generation %}`, which marks what is trained on, and prints what is inside."""

    tags = {"generation"}  # noqa: RUF012 (as Jinja has it)

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
):
    """JSON without Jinja's escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """The texts of special tokens, which are strings, or objects with a string as content."""
    values = {name: config.get(name) for name in _SPECIAL_TOKENS}
    texts = {name: value.get("content") if isinstance(value, dict) else value for name, value in values.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}


def _config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(_read(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(config).__name__}")
    return config


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: expected a file of UTF-8 text, got: {error}") from None
