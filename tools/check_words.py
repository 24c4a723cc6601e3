"""Fails where a text has a private word for what the field has a word for, or a sentence to decode.

docs/vocabulary.md says the words.

Usage: tools/check_words.py [FILE ...]   (all tracked files that people read, if none are named)
"""

import argparse
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SUFFIXES = {".py", ".pyi", ".h", ".cuh", ".cu", ".cc", ".in", ".md", ".toml", ".cmake", ".txt", ".yml"}
# This file has to name the words.
EXCEPT = {Path("tools/check_words.py")}

_COUNTED = (
    r"(?:tokens?|pages?|keys?|rows?|bytes?|tiles?|slots?|heads?|elements?|launches|scales?|softmax|entries|times|us)"
)
_UNIT = r"(?:page|sequence|token|row|head|step|call|layer|tile|CTA|warp|lane|thread|second|multiprocessor|word|kernel)"
# What not to write, and what to write in its place.
WORDS = {
    r"tensor memory accelerator": "TMA",
    r"images? of (?:key )?tiles?": "tile cache",
    r"(?:copying|multiplying|loading) warps?": "producer, or consumer warps",
    r"thin kernels?|thick kernels?|thin\.h|thick\.h": "decode, or prefill",
    r"lanes? of heads|heads? lanes?": "head queue",
    r"items? of (?:prefill|the plan)|prefill items?|\bMakeItem\b|\bItemPlace\b": "work tile",
    r"shares? of (?:the )?keys|\bShareCursor\b|\bTilesPerShare\b": "KV split, or CTA range",
    r"\bUnitRows\b|\bSharedUnit\b|parts? of (?:a )?units?": "row block, KV split",
    r"\bJobMaker\b|\bkJobBytes\b": "tile descriptor",
    r"\bkBoxes\b|by_boxes|prefill_by_rows": "TMA loads (Loader::kTma), cp.async loads (Loader::kCpAsync)",
    r"static constexpr bool kBytes\b|bool bytes\b": "kIs8Bit, is_8bit",
    r"\bWarpRows\b|\bProductRows\b": "ConsumerWarp, ConsumerWarpgroup",
    r"rooms? of the tree": "directory, or module",
    # "The keys a row sees" is another thing.
    rf"\b{_COUNTED} an? {_UNIT}\b(?!'s| (?:has|sees|reads|takes|may|can|needs|gets|counts|attends))": "per",
}
PATTERNS = [(re.compile(pattern, re.IGNORECASE if " " in pattern else 0), word) for pattern, word in WORDS.items()]
# A comment is a sentence, or a noun phrase that names the thing.
OPENING = re.compile(r"^\s*(?://|#) (Of|What|Whether)\b")
COMMENT = re.compile(r"^\s*(//|#)( |$)")
MAX_SENTENCE = 40


def complaints(path: Path, text: str) -> Iterator[str]:
    """One message per private word, per comment that opens as a riddle, and per sentence that is too long."""
    before_is_comment = False
    for number, line in enumerate(text.splitlines(), 1):
        for pattern, word in PATTERNS:
            if match := pattern.search(line):
                yield f"{path}:{number}: {match.group(0)!r}: say {word}"
        is_comment = path.suffix not in {".md", ".yml", ".toml"} and COMMENT.match(line) is not None
        if is_comment and not before_is_comment and (match := OPENING.match(line)):
            yield f"{path}:{number}: a comment opens with {match.group(1)!r}"
        before_is_comment = is_comment
    if path.suffix == ".md":
        yield from long_sentences(path, text)


def long_sentences(path: Path, text: str) -> Iterator[str]:
    """Sentences of Markdown prose that nobody can read in one breath; code, tables and lists of links aside."""
    prose = re.sub(r"```.*?```|<!--.*?-->|^---\n.*?\n---\n", "", text, flags=re.DOTALL)
    for paragraph in re.split(r"\n\s*\n", prose):
        is_code = all(line.startswith("    ") for line in paragraph.splitlines() if line)
        if is_code or re.match(r"\s*(\||#|```|:::|\{)", paragraph):
            continue
        for block in re.split(r"\n\s*(?:[-*]|\d+\.) ", "\n" + paragraph):
            # A full stop ends a sentence, also behind code or a link.
            for sentence in re.split(r"(?<=[.!?:;])[)`*\"]*\s", block):
                words = [word for word in sentence.split() if re.search(r"\w", word)]
                if len(words) > MAX_SENTENCE:
                    yield f"{path}: {len(words)} words in one sentence: {' '.join(words[:8])} ..."


def tracked() -> list[Path]:
    """The tracked files that people read."""
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\n")
    return [Path(name) for name in names if Path(name).suffix in SUFFIXES and Path(name) not in EXCEPT]


def main() -> int:
    """Prints what to mend, and returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path)
    paths = parser.parse_args().files or tracked()
    messages = [m for path in paths if (ROOT / path).is_file() for m in complaints(path, (ROOT / path).read_text())]
    print("\n".join(messages) or f"{len(paths)} files: the field's words")
    return 1 if messages else 0


if __name__ == "__main__":
    sys.exit(main())
