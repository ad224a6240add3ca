"""Memory and time to the first step with a source of several gigabytes of JSON Lines.

    python benchmarks/large_file.py --gigabytes 5

makes the file, runs the command line on it in a process of its own and on a small file of the same
kind, and writes benchmarks/results/large_file.json and .md.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
WORDS = ["wave", "tide", "salt", "ship", "court", "judge", "claim", "bread", "oil", "flour"]

DRIVER = """
import json, resource, sys, time
start = float(sys.argv[1])
from bilevel import run, solve
from bilevel.problems.llm_reweight import LLMReweight
first = []
before = LLMReweight.headline
def headline(self, record):
    first.append((time.time() - start, time.process_time()))
    return before(self, record)
LLMReweight.headline = headline
code = run.main(sys.argv[2:])
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print("MEASURED", json.dumps({"code": code, "first_step": first[:1], "peak": peak}))
"""


def make(path: Path, size: int, *, seed: int) -> int:
    """Write records of 60 to 600 bytes until the file has `size` bytes; returns how many."""
    draw = random.Random(seed)
    texts = [" ".join(draw.choices(WORDS, k=draw.randint(8, 100))) for _ in range(5000)]
    records, written = 0, 0
    with path.open("w", encoding="utf-8") as file:
        while written < size:
            block = [
                f'{{"id": {records + i}, "text": "{draw.choice(texts)} {records + i}"}}\n'
                for i in range(5000)
            ]
            records += len(block)
            written += file.write("".join(block))
    return records


def measure(folder: Path, large: Path, *, steps: int) -> dict[str, Any]:
    """Run the command line with one source; returns its peak of memory and time to a step."""
    out = folder / f"out-{large.stem}"
    options = [
        "problem=llm_reweight",
        f"problem.sources=large={large} small={folder / 'small.jsonl'}",
        f"problem.target={folder / 'target.jsonl'}",
        "verdict=false",
        f"steps={steps}",
        f"out={out}",
    ]
    began = time.time()
    command = [sys.executable, "-c", DRIVER, str(began), *options]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    found = re.search(r"MEASURED (.*)", run.stdout)
    if found is None:
        raise RuntimeError(f"the run ended without a measurement:\n{run.stdout}\n{run.stderr}")
    measured = json.loads(found[1])
    lines = [line for line in run.stdout.splitlines() if line.startswith(("source", "large"))]
    return {
        "bytes": os.path.getsize(large),
        "exit_code": measured["code"],
        "first_step_seconds": round(measured["first_step"][0][0], 1),
        "first_step_cpu_seconds": round(measured["first_step"][0][1], 1),
        "all_seconds": round(time.time() - began, 1),
        "peak_gigabytes": round(measured["peak"] / 1e9, 2),
        "steps": steps,
        "said": lines,
    }


def table(rows: dict[str, dict[str, Any]]) -> str:
    """The results as Markdown."""
    head = "| source | bytes | records | to a step, s | of it CPU, s | peak memory, GB |"
    lines = [head, "|" + " --- |" * 6]
    lines += [
        f"| {name} | {row['bytes']:,} | {row['records']:,} | {row['first_step_seconds']} | "
        f"{row['first_step_cpu_seconds']} | {row['peak_gigabytes']} |"
        for name, row in rows.items()
    ]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> dict[str, dict[str, Any]]:
    """Make the files, measure, and write the results unless --dry."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=5.0)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--dry", action="store_true", help="write no results")
    options = parser.parse_args(arguments)
    rows = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make(folder / "small.jsonl", 2_000_000, seed=1)
        make(folder / "target.jsonl", 200_000, seed=2)
        for kind, size in (("small", 3_000_000), ("large", int(options.gigabytes * 1e9))):
            file = folder / f"{kind}-source.jsonl"
            records = make(file, size, seed=3)
            rows[kind] = measure(folder, file, steps=options.steps) | {"records": records}
            file.unlink()
    more = rows["large"]["peak_gigabytes"] - rows["small"]["peak_gigabytes"]
    text = table(rows) + f"\n\nMore memory than with the small source: {more:.2f} GB.\n"
    print(text)
    if not options.dry:
        (RESULTS / "large_file.json").write_text(json.dumps(rows, indent=1))
        head = (
            "# A source of several gigabytes\n\nTwo x86-64 cores shared with other work, CPU.\n\n"
        )
        (RESULTS / "large_file.md").write_text(head + text)
    return rows


if __name__ == "__main__":
    main()
