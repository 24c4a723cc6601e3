"""Each symbol of the vocabulary is a word of the sources, so that a rename cannot leave the page behind."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "vocabulary.md"
SOURCES = [ROOT / "cpp", ROOT / "jax_paged_attn"]


@pytest.mark.skipif(not PAGE.is_file() or not SOURCES[0].is_dir(), reason="needs a checkout's docs and sources")
def test_symbols_are_in_the_sources() -> None:
    files = [file for folder in SOURCES for file in folder.rglob("*") if file.suffix in {".py", ".h", ".cuh", ".cu"}]
    words = {word for file in files for word in re.findall(r"\w+", file.read_text())}
    rows = [line.split("|") for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    symbols = {
        word for row in rows if len(row) == 5 for code in re.findall(r"`(.*?)`", row[3]) for word in code.split("::")
    }
    assert len(symbols) > 20
    assert not {symbol for symbol in symbols if symbol.isidentifier()} - words
