"""The plan against runs on this machine: memory of the whole process, and time of the search.

Each configuration is planned, then run. Memory is the largest resident size that the kernel saw of
the run, or of the largest of its processes, against the plan's peak, which counts interpreter and
libraries too. Time is that of the search in one process, against the plan's seconds of three
timed steps times the steps.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import record

CASES = {
    "full": "batch=8 target_batch=4",
    "LISA": "memory=lisa gamma=2 batch=8 target_batch=4",
    "LoRA": "memory=lora batch=8 target_batch=4",
    "checkpointing": "checkpointing=true batch=16 target_batch=8",
}
SEVERAL = {
    "full": "launcher=fsdp2",
    "LISA": "launcher=fsdp2",
    "LoRA": "launcher=fsdp2",
    "checkpointing": "launcher=fsdp2",
    "LISA, replicas": "launcher=ddp",
}
"""Launchers of the runs in several processes, by configuration."""
WIDTH, LAYERS, VOCABULARY, LENGTH = 512, 8, 8192, 96
COLUMNS = ["configuration", "processes", "planned GB", "measured GB", "memory %"]
COLUMNS += ["planned s", "measured s", "time %"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--cases", nargs="*", default=list(CASES))
    parser.add_argument("--several", nargs="*", default=list(SEVERAL))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--results", type=Path, default=record.RESULTS)
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _write(folder)
        for case in options.cases:
            rows.append(check(folder, case, CASES[case].split(), options.steps))
            print(json.dumps(rows[-1]), flush=True)
        for case in options.several:
            words = [*CASES[case.partition(",")[0]].split(), SEVERAL[case]]
            rows.append(check_several(folder, case, words, options.steps, options.processes))
            print(json.dumps(rows[-1]), flush=True)
    load = os.getloadavg()[2]
    notes = [
        f"Llama of {LAYERS} blocks, width {WIDTH}, {VOCABULARY} entries, random; rows of at most "
        f"{LENGTH} tokens, {options.steps} steps, one thread, float32.",
        "Differences are those of the plan from the run, in %. The mean load of the machine was "
        f"{load:.1f}, which times suffer from and memory does not.",
    ]
    title = "The plan against runs"
    print(record.save("plan_check", title, notes, rows, COLUMNS, folder=options.results))


def check(folder: Path, case: str, words: list[str], steps: int) -> dict[str, Any]:
    """The plan of a configuration, and what its run took."""
    words = [*_words(words, steps), "launcher.threads=1"]
    out, _ = _process(folder, ["bilevel.plan", *words, "device=here", "--time", "--json"])
    plan = json.loads(out[out.index("{") :])
    _, peak = _process(folder, ["bilevel.run", *words, "verdict=false", f"out={case}"])
    last = (folder / case / "resources.jsonl").read_text().splitlines()[-1]
    planned = steps * plan["timed"]["step_seconds"]
    measured = json.loads(last)["seconds"]
    total = plan["footprint"]["total"]
    return {
        "configuration": case,
        "processes": 1,
        "planned GB": total / 1e9,
        "measured GB": peak / 1e9,
        "memory %": 100 * (total / peak - 1),
        "planned s": planned,
        "measured s": measured,
        "time %": 100 * (planned / measured - 1),
    }


def check_several(
    folder: Path, case: str, words: list[str], steps: int, count: int
) -> dict[str, Any]:
    """The plan of a configuration in several processes, and the most that one of them held."""
    words = _words(words, steps)
    out, _ = _process(folder, ["bilevel.plan", *words, f"devices={count}", "device=here", "--json"])
    total = json.loads(out[out.index("{") :])["footprint"]["total"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
    run = ["bilevel.run", *words, "verdict=false", f"out={case.replace(' ', '-')}-{count}"]

    def one(rank: int) -> int:
        return _process(folder, run, place | {"RANK": str(rank), "LOCAL_RANK": str(rank)})[1]

    with ThreadPoolExecutor(count) as pool:
        peak = max(pool.map(one, range(count)))
    return {
        "configuration": case,
        "processes": count,
        "planned GB": total / 1e9,
        "measured GB": peak / 1e9,
        "memory %": 100 * (total / peak - 1),
    }


def _words(words: list[str], steps: int) -> list[str]:
    words = ["problem=llm_reweight", "sources=a.jsonl b.jsonl", "target=target.jsonl", *words]
    return [*words, "model=model", f"max_length={LENGTH}", f"steps={steps}"]


def _process(
    folder: Path, words: list[str], place: dict[str, str] | None = None
) -> tuple[str, int]:
    """What a module of ours prints, and the most bytes that its process held."""
    place = os.environ | {"OMP_NUM_THREADS": "1"} | (place or {})
    command = [sys.executable, "-m", *words]
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, cwd=folder, env=place, stdout=out, stderr=errors)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        errors.seek(0)
        if process.returncode:
            raise RuntimeError(f"{' '.join(words)}: {errors.read()}")
        return out.read(), used.ru_maxrss * 1024


def _write(folder: Path) -> None:
    """A random model with its tokenizer, two sources and a target."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from bilevel.problems.llm_reweight.model import tiny_tokenizer

    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghij", k=draw.randint(2, 8))) for _ in range(2000)]
    for name, records in {"a": 300, "b": 400, "target": 200}.items():
        texts = (" ".join(draw.choices(words, k=draw.randint(10, 80))) for _ in range(records))
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (folder / f"{name}.jsonl").write_text(lines)
    tiny_tokenizer([" ".join(words)]).save_pretrained(folder / "model")
    shape = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "vocab_size": VOCABULARY}
    shape |= {"intermediate_size": 1376, "num_attention_heads": 8, "max_position_embeddings": 512}
    ends = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0)
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**shape, **ends)).save_pretrained(folder / "model")


if __name__ == "__main__":
    main()
