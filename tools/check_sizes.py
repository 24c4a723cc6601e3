"""Fails if a function is longer than a screen; with `--cpp` C++ is measured too, where files have a limit as well.

A function's lines run from its first decorator, or its template parameters, to its last line. Docstrings count.
"""

import argparse
import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FUNCTION_LINES = 80
CPP_FILE_LINES = 400
CPP_SUFFIXES = {".cc", ".h", ".cu", ".cuh"}
# Literals and comments, whose braces count for nothing.
CPP_TEXT = re.compile(r'"(?:\\.|[^"\\])*"|\'(?:\\.|[^\'\\])+\'|//.*')
CPP_NAME = re.compile(r"\b(?!__launch_bounds__|alignas|decltype|requires)[\w:~]+(?=\s*\()")
NO_FUNCTION = re.compile(r"\s*(template\s*<.*>\s*)?(namespace|struct|class|enum|union|extern)\b")


def python_functions(text: str) -> Iterator[tuple[str, int, int]]:
    """Name, first and last line of each function of a Python file."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            yield node.name, first, node.end_lineno or first


def cpp_functions(text: str) -> Iterator[tuple[str, int, int]]:
    """Likewise for a C++ file: outermost blocks with a parameter list in front of them."""
    blocks: list[tuple[str, int]] = []  # the open ones, each with its head and first line
    head, first = "", 0  # the text since the last block or statement, and where it begins
    for number, line in enumerate(text.splitlines(), 1):
        for token in re.split(r"([{};])", "" if line.startswith("#") else CPP_TEXT.sub("", line)):
            if token == "{":
                blocks.append((head, first))
            elif token == "}" and blocks:
                opening, start = blocks.pop()
                if _is_function(opening) and not any(_is_function(outer) for outer, _ in blocks):
                    yield _name(opening), start, number
            if token in ("{", "}", ";"):
                head, first = "", 0
            elif token.strip():
                head, first = f"{head} {token}", first or number


def _name(head: str) -> str:
    while (shorter := re.sub(r"\([^()]+\)", "()", head)) != head:  # parameters and bounds have names of their own
        head = shorter
    names = CPP_NAME.findall(head)
    return names[0] if names else "a block"


def _is_function(head: str) -> bool:
    return "(" in head and not NO_FUNCTION.match(head)


def complaints(path: Path) -> Iterator[str]:
    """One message per function, or file, that is too long."""
    text = (ROOT / path).read_text()
    if path.suffix in CPP_SUFFIXES:
        lines = len(text.splitlines())
        if lines > CPP_FILE_LINES:
            yield f"{path}: expected at most {CPP_FILE_LINES} lines, got {lines}"
    functions = python_functions(text) if path.suffix == ".py" else cpp_functions(text)
    for name, first, last in functions:
        if last - first >= FUNCTION_LINES:
            yield f"{path}:{first}: {name}: expected at most {FUNCTION_LINES} lines, got {last - first + 1}"


def main() -> int:
    """Prints what is too long, and returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", default=["jax_paged_attn", "benchmarks"], help="measured for Python")
    parser.add_argument("--cpp", action="store_true", help="measure cpp/ too")
    args = parser.parse_args()
    command = ["git", "ls-files", "--", *args.folders, *(["cpp"] if args.cpp else [])]
    names = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()
    paths = [Path(name) for name in names if Path(name).suffix in {".py", *(CPP_SUFFIXES if args.cpp else ())}]
    messages = [message for path in paths for message in complaints(path)]
    print("\n".join(messages) or f"{len(paths)} files: no function or file is too long")
    return 1 if messages else 0


if __name__ == "__main__":
    sys.exit(main())
