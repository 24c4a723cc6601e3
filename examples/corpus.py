"""The text that the example model is trained on: the language reference that CPython carries in `pydoc_data.topics`.

It differs between Python versions, and topics quote each other at length. Therefore the held-out text is a committed
file, `heldout.txt` (topics `integers` to `return` of CPython 3.11.7, in alphabetical order), and whatever text the
running Python has is cleaned of it: a paragraph is dropped if it shares any run of eight words with the held-out
text, and so are paragraphs that occurred before. The validation text, for choices made in training, is a few other
topics, cleaned out of the training text in the same way.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path
from pydoc_data import topics

import numpy as np

HELDOUT_FILE = Path(__file__).parent / "heldout.txt"
HELDOUT_SHA256 = "ab04a0a22b8307dfbfbd6e54019406e5737782d5bc416315f41eb779cf547204"
VALIDATION_TOPICS = ("assignment", "booleans", "calls", "continue", "slicings", "unary")

# Byte 0 stands between documents: it begins and ends each of them, and occurs in none.
SEPARATOR = 0
_SHINGLE_WORDS = 8


def heldout_documents() -> list[bytes]:
    """The documents of `heldout.txt`, which a form feed separates.

    Raises:
      ValueError: the file is not the committed one.
    """
    data = HELDOUT_FILE.read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    if digest != HELDOUT_SHA256:
        raise ValueError(f"{HELDOUT_FILE}: expected sha256 {HELDOUT_SHA256}, got {digest}")
    return data.split(b"\f")


def training_and_validation_documents() -> tuple[list[bytes], list[bytes]]:
    """This Python's documents without any held-out paragraph, and without repetitions."""
    heldout = [document.decode() for document in heldout_documents()]
    validation = _without_overlap([topics.topics[name] for name in VALIDATION_TOPICS if name in topics.topics], heldout)
    names = sorted(set(topics.topics) - set(VALIDATION_TOPICS))
    training = _without_overlap([topics.topics[name] for name in names], [*heldout, *validation])
    return [d.encode() for d in training], [d.encode() for d in validation]


def token_stream(documents: Iterable[bytes]) -> np.ndarray:
    """uint8: the documents one after the other, a separator before, between and after them."""
    edge = bytes([SEPARATOR])
    return np.frombuffer(edge + edge.join(documents) + edge, np.uint8)


def _without_overlap(documents: Iterable[str], excluded: Iterable[str]) -> list[str]:
    forbidden = set().union(*(_shingles(text) for text in excluded))
    seen: set[tuple[str, ...]] = set()
    cleaned = []
    for document in documents:
        kept = []
        for paragraph in re.split(r"\n\s*\n", document):
            words = tuple(paragraph.split())
            if words and words not in seen and not _shingles(paragraph) & forbidden:
                seen.add(words)
                kept.append(paragraph)
        if kept:
            cleaned.append("\n\n".join(kept))
    return cleaned


def _shingles(text: str) -> set[tuple[str, ...]]:
    """Every run of eight words; of each shorter paragraph, all its words."""
    found: set[tuple[str, ...]] = set()
    words = text.split()
    found.update(tuple(words[i : i + _SHINGLE_WORDS]) for i in range(len(words) - _SHINGLE_WORDS + 1))
    for paragraph in re.split(r"\n\s*\n", text):
        words = paragraph.split()
        if 0 < len(words) < _SHINGLE_WORDS:
            found.add(tuple(words))
    return found
