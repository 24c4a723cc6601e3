"""Chat templates of folders in Hugging Face's layout, and tokens without the special ones, which templates write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizer_files import byte_level, sentencepiece

from jax_paged_attn.serving import ByteTokenizer, FileTokenizer
from jax_paged_attn.serving.server import ChatTemplate

MESSAGES = [{"role": "user", "content": "Ünder <b>"}, {"role": "assistant", "content": "x"}]
# In the manner of ChatML, with most of what templates use.
SOURCE = """\
{{- bos_token }}
{%- for message in messages %}
    {%- if message['role'] not in ['user', 'assistant'] %}
        {{- raise_exception('no role ' ~ message['role']) }}
    {%- endif %}
    {%- if loop.index0 > 5 %}{% break %}{% endif %}
    {{- '<|' ~ message.role ~ '|>' ~ message.content | trim ~ eos_token }}
    {%- if message.role == 'assistant' %}{% generation %}!{% endgeneration %}{% endif %}
{%- endfor %}
{%- if add_generation_prompt and not tools %}
    {{- '<|assistant|>' }}
{%- endif %}"""
RENDERED = "<s><|user|>Ünder <b></s><|assistant|>x</s>!<|assistant|>"
TOKENS = {"bos_token": "<s>", "eos_token": {"content": "</s>", "special": True}}


def folder(path: Path, config: Any = None, source: str | None = None) -> Path:
    if config is not None:
        (path / "tokenizer_config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    if source is not None:
        (path / "chat_template.jinja").write_text(source)
    return path


@pytest.mark.parametrize(
    ("config", "source"),
    [
        ({**TOKENS, "chat_template": SOURCE}, None),
        ({**TOKENS, "chat_template": "{{ raise_exception('the file goes first') }}"}, SOURCE),
        (
            {**TOKENS, "chat_template": [{"name": "rag", "template": "x"}, {"name": "default", "template": SOURCE}]},
            None,
        ),
    ],
    ids=["a string", "a file", "a list"],
)
def test_templates_of_folders(tmp_path: Path, config: Any, source: str | None) -> None:
    template = ChatTemplate.from_folder(folder(tmp_path, config, source))
    assert template is not None
    assert template.render(MESSAGES) == RENDERED


@pytest.mark.parametrize("config", [None, {}, TOKENS, {"chat_template": [{"name": "rag", "template": "x"}]}])
def test_folders_without_a_template(tmp_path: Path, config: Any) -> None:
    assert ChatTemplate.from_folder(folder(tmp_path, config)) is None


@pytest.mark.parametrize(
    ("config", "source", "match"),
    [
        ("{", None, "tokenizer_config.json: not JSON"),
        ("[]", None, "tokenizer_config.json: expected a JSON object, got list"),
        ({"chat_template": 3}, None, "chat_template: expected a string, got int"),
        ({}, "{% for %}", "chat_template.jinja: source: expected a Jinja template, got an error in line 1"),
    ],
)
def test_broken_files_are_named(tmp_path: Path, config: Any, source: str | None, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        ChatTemplate.from_folder(folder(tmp_path, config, source))


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{{ raise_exception('no system role') }}", "no system role"),
        ("{{ messages[0].content.nothing.more }}", "has no attribute"),
        ("{{ messages.append(1) }}", "access to attribute 'append'"),
        ("{{ ''.__class__.__mro__ }}", "access to attribute '__class__'"),
        ("{{ 1 / 0 }}", "division"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "[Rr]ange too big"),
    ],
)
def test_templates_that_raise_refuse_the_messages(source: str, reason: str) -> None:
    with pytest.raises(ValueError, match=f"^messages: the chat template refuses them: .*({reason})"):
        ChatTemplate(source).render(MESSAGES)


def test_json_is_written_as_transformers_writes_it() -> None:
    template = ChatTemplate(
        "{{ messages[0] | tojson }} {{ {'a': 1} | tojson(indent=1) }} {{ strftime_now('%Y') | length }}"
    )
    assert template.render(MESSAGES) == '{"role": "user", "content": "Ünder <b>"} {\n "a": 1\n} 4'


@pytest.mark.parametrize("make", [byte_level, sentencepiece])
@pytest.mark.parametrize("text", [" P🦙é", "the France is <s>"])
def test_bytes_of_tokens_are_those_of_the_text(tmp_path: Path, make: Any, text: str) -> None:
    make().save(str(tmp_path / "tokenizer.json"))
    tokenizer = FileTokenizer(tmp_path / "tokenizer.json")
    tokens = tokenizer.encode(text)
    bos, *rest = tokens
    assert tokenizer.encode(text, add_special_tokens=False) == rest
    assert tokenizer.token_bytes(bos) == tokenizer.token_bytes(10**6) == b""
    data = b"".join(map(tokenizer.token_bytes, tokens)).decode()
    assert data in (whole := tokenizer.decode(tokens), f" {whole}")  # decoders may drop the text's first space


def test_bytes_are_their_own_tokens() -> None:
    tokenizer = ByteTokenizer(bos=0)
    assert tokenizer.encode("é", add_special_tokens=False) == [0xC3, 0xA9]
    assert [tokenizer.token_bytes(token) for token in tokenizer.encode("é")] == [b"", b"\xc3", b"\xa9"]
    with pytest.raises(ValueError, match=r"^token: expected bytes"):
        tokenizer.token_bytes(256)
