"""The documentation is true: its code runs, its output is what is printed, its links resolve."""

import contextlib
import dataclasses
import doctest
import importlib
import io
import json
import pkgutil
import re
import shlex
import sys
import tomllib
import types
from pathlib import Path

import pytest

import bilevel
from bilevel.problems.llm_reweight import LLMReweight
from bilevel.problems.llm_reweight.records import read_source
from bilevel.run import main

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(
    r"(?:<!-- (?P<note>run[^>]*?) -->\n)?^```(?P<head>\S.*)\n(?P<body>(?s:.*?))^```$", re.MULTILINE
)
SNIPPET = re.compile(r'^--8<-- "(.+)"\n', re.MULTILINE)
NUMBER = re.compile(r"[-+]?\d[\d,]*\.?\d*(?:e[-+]?\d+)?")


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block: `language`, its `title` (a file's name), the `note` in front of it."""

    language: str
    title: str
    note: str
    body: str
    line: int
    output: str | None
    """The text block that follows directly: what this one prints."""


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    matches = list(BLOCK.finditer(text))
    found = []
    for match, after in zip(matches, [*matches[1:], None], strict=False):
        language, _, rest = match["head"].partition(" ")
        title = re.search(r'title="([^"]+)"', rest)
        follows = (
            after and after["head"] == "text" and not text[match.end() : after.start()].strip()
        )
        found.append(
            Block(
                language=language,
                title=title[1] if title else "",
                note=match["note"] or "",
                body=SNIPPET.sub(included, match["body"]),
                line=text.count("\n", 0, match.start("body")) + 1,
                output=after["body"] if follows else None,
            )
        )
    return found


def included(match: re.Match) -> str:
    """The text of a script that mkdocs puts into a page."""
    return (ROOT / "docs" / "worked" / match[1]).read_text(encoding="utf-8")


def commands(block: Block) -> list[list[str]]:
    """The arguments of each `python -m bilevel.run` in a shell block."""
    lines = block.body.replace("\\\n", " ").splitlines()
    words = [shlex.split(line, comments=True) for line in lines]
    return [w[3:] for w in words if w[:3] == ["python", "-m", "bilevel.run"]]


def call(arguments: list[str]) -> tuple[int, str]:
    """The exit code of the command line, and what it printed."""
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
        try:
            code = main(arguments)
        except SystemExit as ended:
            code = ended.code
    return code, text.getvalue()


def same(shown: str, printed: str) -> bool:
    """Whether words are equal and numbers within 5 %; a line `...` stands for any lines.

    5 %: few digits are shown, and what a trained model ends with differs between machines.
    """
    pattern, wanted = "", []
    for line in shown.strip().splitlines():
        if line == "...":
            pattern += r"(?:.*\n)*?"
            continue
        pattern += f"({NUMBER.pattern})".join(map(re.escape, NUMBER.split(line))) + r"\n"
        wanted += NUMBER.findall(line)
    match = re.fullmatch(pattern, printed.strip() + "\n")
    return match is not None and all(
        number(got) == pytest.approx(number(want), rel=0.05, abs=0.02)
        for want, got in zip(wanted, match.groups(), strict=True)
    )


def number(text: str) -> float:
    return float(text.replace(",", ""))


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty current folder whose modules and plugins can be imported, and are then forgotten."""
    before = set(sys.modules)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", None)):
            del sys.modules[name]


def run_page(page: Path, folder: Path, monkeypatch) -> None:
    """Write the page's files, run its code in order in one namespace, compare what is printed."""
    module = types.ModuleType(f"page_{page.stem.replace('-', '_')}")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for block in blocks(page):
        where = f"{page.name}:{block.line}"
        if block.title:
            (folder / block.title).write_text(block.body, encoding="utf-8")
            if block.title == "pyproject.toml":
                install(folder)
            continue
        printed = None
        if block.language == "python":
            text = io.StringIO()
            with contextlib.redirect_stdout(text):
                exec(compile("\n" * (block.line - 1) + block.body, str(page), "exec"), vars(module))
            printed = text.getvalue()
        elif block.language == "sh" and block.note:
            codes, texts = zip(*map(call, commands(block)), strict=True)
            printed = "".join(texts)
            assert set(codes) == {int(block.note.partition("exit ")[2] or 0)}, f"{where}: {printed}"
        elif block.language == "sh":
            for arguments in commands(block):
                check_arguments(arguments, folder, where)
        if block.output is not None:
            assert printed is not None, f"{where}: shows output of a block that is not run"
            assert same(block.output, printed), f"{where} prints:\n{printed}"


def check_arguments(arguments: list[str], folder: Path, where: str) -> None:
    """The keys are right: the only complaints are about files that exist for a user, not here."""
    file = folder / "a_file"
    file.touch()
    code, text = call([*(a for a in arguments if not a.startswith("out=")), f"out={file}"])
    absent = ("is a file", "expected an existing file", "found no such folder")
    faults = [f for f in text.splitlines() if not any(words in f for words in absent)]
    assert code == 2 and not faults, f"{where}: {text}"


def install(folder: Path) -> None:
    """What an installer would leave of the page's package: its name and its entry points."""
    body = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    info = folder / f"{body['name']}-{body['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Name: {body['name']}\nVersion: {body['version']}\n")
    rows = [
        f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in points.items())
        for group, points in body["entry-points"].items()
    ]
    (info / "entry_points.txt").write_text("".join(rows))


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_code_runs_and_prints_what_is_shown(page, here, monkeypatch):
    run_page(page, here, monkeypatch)
    weights = here / "runs" / "mine" / "weights.json"
    if page.stem == "getting-started":  # its run has a verdict: look at every field it wrote
        body = json.loads(weights.read_text(encoding="utf-8"))
        text = (ROOT / "docs" / "llm-reweight.md").read_text(encoding="utf-8")
        fields = {*body, *body["target"], *body["sources"][0], *body["verdict"]}
        assert not sorted(f for f in fields if f"`{f}`" not in text)


def test_record_formats_shown_are_read_as_named(here):
    shown = [b for b in blocks(ROOT / "docs" / "llm-reweight.md") if b.title.endswith(".jsonl")]
    for block in shown:
        stem = block.title.removesuffix(".jsonl")
        if stem != "broken":
            (here / block.title).write_text(block.body, encoding="utf-8")
            assert read_source(stem, here / block.title).format == stem
    assert len(shown) == 5


def test_keys_named_in_the_text_exist():
    pages = [ROOT / "docs" / name for name in ("llm-reweight.md", "weighting.md")]
    text = "".join(page.read_text(encoding="utf-8") for page in pages)
    named = set(re.findall(r"`problem\.(\w+)", text))
    fields = {f.name for f in dataclasses.fields(LLMReweight)}
    assert named <= fields
    assert fields - named <= {"verdict"}, "document the new options of llm_reweight"


def test_public_names_are_in_the_interface_page():
    text = (ROOT / "docs" / "interface.md").read_text(encoding="utf-8")
    assert not [n for n in bilevel.__all__ if not re.search(rf"\b{n}\b", text)]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_relative_links_resolve(page):
    text = re.sub(r"(?s)<!--.*?-->|^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name}: {link}"
        if anchor:
            heads = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.M)
            slugs = {re.sub(r"[^\w\- ]", "", h).strip().lower().replace(" ", "-") for h in heads}
            assert anchor in slugs, f"{page.name}: {link}"


def test_pages_are_in_the_navigation():
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert {p.name for p in PAGES[1:]} == set(re.findall(r"^  - .*?: (\S+\.md)$", text, re.M))


MODULES = [m.name for m in pkgutil.walk_packages(bilevel.__path__, "bilevel.")]


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0
