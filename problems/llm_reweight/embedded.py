"""Real text that every Python carries, cut into sources, a target and a test set."""

from __future__ import annotations

import ast
import base64
import gc
import hashlib
import inspect
import random
import re
import sysconfig
import textwrap
import unicodedata
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

SKIPPED = {"test", "tests", "idlelib", "turtledemo", "lib2to3", "site-packages", "pydoc_data"}
C_MODULES = ("builtins", "os", "math", "itertools", "sys", "time", "array", "zlib", "select")


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Paragraphs by source, and the names of the sources that are relevant to the target."""

    sources: dict[str, tuple[str, ...]]
    target: tuple[str, ...]
    test: tuple[str, ...]
    relevant: tuple[str, ...]
    notes: tuple[str, ...] = ()


def corpus(
    *,
    source_bytes: int = 300_000,
    target_bytes: int = 150_000,
    stdlib: Path | None = None,
) -> Corpus:
    """Docstrings of held-out modules as target and test; related and unrelated text as sources.

    Top-level modules are split among train, target and test by a hash of their names.
    """
    folder = stdlib or Path(sysconfig.get_path("stdlib"))
    modules = _modules(folder)
    notes = []
    if not modules:
        notes.append(f"no library sources in {folder}: docstrings of compiled modules instead")
    docs, code = _collected(modules, source_bytes)
    for texts in docs.values():
        random.Random(0).shuffle(texts)
    train = _cap(docs["train"], source_bytes)
    rest = docs["train"][len(train) :] or docs["train"]
    sources = {
        "docstrings": train,
        "reference": _cap(_reference(), source_bytes),
        "code": _cap(code, source_bytes),
        "unicode": _cap(_unicode_names(), source_bytes),
        "scrambled": _cap(scramble(rest, 1.0, seed=1), source_bytes),
        "base64": _cap([base64.b64encode(t.encode()).decode() for t in rest], source_bytes),
    }
    for name in [n for n, texts in sources.items() if not texts]:
        notes.append(f"source {name} left out: its text is missing from this Python")
        del sources[name]
    notes += [
        "fewer bytes than asked for in " + name
        for name, texts in sources.items()
        if sum(len(t.encode()) for t in texts) < source_bytes // 2
    ]
    return Corpus(
        sources=sources,
        target=_cap(docs["target"], target_bytes),
        test=_cap(docs["test"], target_bytes),
        relevant=tuple(n for n in ("docstrings", "reference") if n in sources),
        notes=tuple(notes),
    )


def scramble(paragraphs: Sequence[str], share: float, seed: int) -> tuple[str, ...]:
    """The paragraphs, a `share` of them (drawn at random) with their characters shuffled."""
    draw = random.Random(seed)
    chosen = set(draw.sample(range(len(paragraphs)), round(share * len(paragraphs))))
    result = []
    for i, text in enumerate(paragraphs):
        letters = list(text)
        if i in chosen:
            draw.shuffle(letters)
        result.append("".join(letters))
    return tuple(result)


def halves(paragraphs: Sequence[str], n: int = 2) -> tuple[tuple[str, ...], ...]:
    """`n` interleaved cuts of one source."""
    return tuple(tuple(paragraphs[i::n]) for i in range(n))


def _collected(modules: dict[str, list[str]], most: int) -> tuple[dict[str, list[str]], list[str]]:
    """Docstrings by part, every one once, and code of training modules, about `most` letters."""
    docs: dict[str, list[str]] = {"train": [], "target": [], "test": []}
    code: list[str] = []
    seen: set[str] = set()
    for name, texts in modules.items():
        part = _part(name)
        for text in texts:
            if (tree := _parse(text)) is None:
                continue
            docs[part] += [d for d in _docstrings(tree) if not (d in seen or seen.add(d))]
            if part == "train" and sum(map(len, code)) < most:
                code += _pieces(_without_docstrings(text, tree))
    if not modules:
        for name in C_MODULES:
            found = [d for d in _runtime_docstrings(name) if not (d in seen or seen.add(d))]
            for i, text in enumerate(found):
                docs[("train", "train", "target", "test")[i % 4]].append(text)
    return docs, code


def _modules(folder: Path) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for top in sorted(folder.iterdir()) if folder.is_dir() else []:
        if top.name.startswith("_") or top.name in SKIPPED:
            continue  # not to be walked at all: site-packages holds more files than the library
        name = top.name.removesuffix(".py")
        for path in sorted(top.rglob("*.py")) if top.is_dir() else [top]:
            if path.suffix == ".py" and not SKIPPED & set(path.relative_to(folder).parts):
                text = path.read_text(encoding="utf-8", errors="replace")
                found.setdefault(name, []).append(text)
    return found


def _part(name: str) -> str:
    bucket = hashlib.sha256(name.encode()).digest()[0] % 16
    return "target" if bucket < 3 else "test" if bucket < 6 else "train"


def _parse(text: str) -> ast.AST | None:
    collects = gc.isenabled()
    gc.disable()  # it takes more than half of the time to build so many nodes, and frees nothing
    try:
        with warnings.catch_warnings(action="ignore"):  # of a library's own escapes in strings
            return ast.parse(text)
    except (SyntaxError, ValueError):
        return None
    finally:
        if collects:
            gc.enable()


def _statements(tree: ast.AST) -> Iterator[ast.AST]:
    """The nodes of `ast.walk` without expressions, which are most of them and hold no docstring."""
    nodes = [tree]
    for node in nodes:  # grows while it is walked
        nodes += [c for c in ast.iter_child_nodes(node) if not isinstance(c, ast.expr)]
        yield node


def _docstrings(tree: ast.AST) -> Iterator[str]:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in _statements(tree):
        text = ast.get_docstring(node) if isinstance(node, kinds) else None
        if text and len(text) >= 200 and text.count(">>>") < 3:
            yield text


def _runtime_docstrings(name: str) -> Iterator[str]:
    import importlib

    module = importlib.import_module(name)
    for value in [module, *vars(module).values()]:
        members = [value, *vars(value).values()] if isinstance(value, type) else [value]
        for member in members:
            text = inspect.cleandoc(getattr(member, "__doc__", None) or "")
            if len(text) >= 100:
                yield text


def _without_docstrings(text: str, tree: ast.AST) -> str:
    lines = text.splitlines()
    for node in _statements(tree):
        if not isinstance(node, ast.Expr) or not isinstance(node.value, ast.Constant):
            continue
        if isinstance(node.value.value, str):
            for line in range(node.lineno - 1, node.end_lineno or node.lineno):
                lines[line] = ""
    return "\n".join(line for line in lines if line.strip())


def _pieces(text: str, size: int = 800) -> list[str]:
    return [text[i : i + size] for i in range(0, len(text) - size // 2, size)]


def _reference() -> list[str]:
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return []
    paragraphs = [p for t in topics.values() for p in re.split(r"\n\s*\n", t)]
    prose = [textwrap.dedent(p) for p in paragraphs if not p.startswith("   ") and "::=" not in p]
    unique = list(dict.fromkeys(p for p in prose if len(p) >= 100))
    random.Random(0).shuffle(unique)
    return unique


def _unicode_names() -> list[str]:
    names = [unicodedata.name(chr(c), "") for c in range(0x3000)]
    names = [n for n in names if n]
    random.Random(0).shuffle(names)
    return ["\n".join(names[i : i + 20]) for i in range(0, len(names), 20)]


def _cap(texts: Sequence[str], limit: int) -> tuple[str, ...]:
    kept, size = [], 0
    for text in texts:
        size += len(text.encode())
        if size > limit:
            break
        kept.append(text)
    return tuple(kept)
