"""Imports point one way: each module of the core may import only what stands above it."""

import ast
from pathlib import Path

import pytest

CORE = Path(__file__).parent.parent / "bilevel"
ORDER = [
    ["errors", "tree", "result", "fields", "evidence", "datasets", "picture", "cards", "storage"],
    ["markdown", "rewrite", "loops"],
    ["piped", "tracking"],
    ["votes", "linear", "spectrum", "projection", "trace"],
    ["compiled"],
    ["variable", "precision", "stepping", "offload", "blocks", "processes"],
    ["trunk", "quantized", "outline"],
    ["problem", "memory"],
    ["launch", "lora", "zero_config", "zero_package", "zero_engine", "zero_shards"],
    ["together"],
    ["oracle", "solver", "checkpoint", "plugins", "fsdp", "zero"],
    ["descent", "staged", "check", "resolve", "batch", "footprint"],
    ["looped"],
    ["hypergradient"],
    ["compare", "audit"],
    ["solve"],
    ["testing"],
    ["__init__"],
    ["options"],
    ["folder", "forecast"],
    ["remedies"],
    ["run", "plan", "export"],
]
RANK = {name: rank for rank, row in enumerate(ORDER) for name in row}


def imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            if node.module == "bilevel":
                found.update(f"bilevel.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
    return {name for name in found if name.split(".")[0] == "bilevel"}


@pytest.mark.parametrize("path", sorted(CORE.glob("*.py")), ids=lambda p: p.stem)
def test_core_imports_point_up(path):
    assert path.stem in RANK, f"place {path.name} in the order of imports"
    for name in imported(path):
        parts = name.split(".")
        target = parts[1] if len(parts) > 1 and parts[1] in RANK else None
        assert parts[1:2] not in (["problems"], ["solvers"]), f"{path.name} imports a plugin"
        if target:
            assert RANK[target] <= RANK[path.stem] and target != path.stem, (
                f"{path.stem} -> {target}"
            )


@pytest.mark.parametrize("kind", ["problems", "solvers"])
def test_plugins_do_not_import_each_other(kind):
    folder = CORE.parent / kind
    for path in folder.rglob("*.py"):
        family = path.relative_to(folder).parts[0].removesuffix(".py")
        for name in imported(path):
            if name.startswith(("bilevel.problems", "bilevel.solvers")):
                assert name.split(".")[1:3] == [kind, family], f"{path} imports {name}"
