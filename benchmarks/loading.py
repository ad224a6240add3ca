"""Host memory of every process while a model is loaded: whole in each, and by parts.

A random Llama is saved in files, then two processes make the variables of a bilevel run on it:
weights of both copies, no pass. Memory is what the kernel counts of each process above what it had
before: anonymous (its own) and of files (pages of the mapped files, which it may take back).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import record

PROCESSES = 2
WIDTH, LAYERS, VOCABULARY = 1024, 6, 16384
RUNS = [
    ("fsdp2", "full", "bfloat16"),
    ("fsdp2", "lisa", "bfloat16"),
    ("fsdp2", "lora", "bfloat16"),
    ("fsdp2", "lora", "float32"),
    ("ddp", "lisa", "bfloat16"),
]
CASES = [(*run, way) for run in RUNS for way in ("whole", "files", "sent")]
COLUMNS = ["launcher", "memory", "dtype", "loaded", "held MB", "peak MB", "of files MB", "s"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", nargs=5, help="of a process: folder, launcher, memory, dtype, way")
    parser.add_argument("--results", type=Path, default=record.RESULTS)
    options = parser.parse_args()
    if options.one:
        _one(*options.one)
        return
    rows = []
    with tempfile.TemporaryDirectory() as name:
        count = _write(Path(name))
        for case in CASES:
            rows.append(_both(name, *case))
            print(json.dumps(rows[-1]), flush=True)
    notes = [
        f"Llama of {LAYERS} blocks, width {WIDTH}, {VOCABULARY} entries: {count / 1e6:.1f} M "
        f"numbers, in float32 in files of at most 100 MB; {PROCESSES} processes on one machine.",
        "Held: when both copies are there. Peak: the most that a process had of its own. Of files: "
        "the most pages of mapped files, which processes share and the kernel may take back. Each "
        "is that of the larger process.",
        "Whole: as before, every process loads all. Files: each reads its shards. Sent: the first "
        "loads all, and sends it.",
    ]
    title = "Host memory while a model is loaded"
    print(record.save("loading", title, notes, rows, COLUMNS, folder=options.results))


def _both(folder: str, *case: str) -> dict[str, Any]:
    """A case in all processes."""
    starter = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={PROCESSES}"]
    words = [__file__, "--one", folder, *case]
    place = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *starter, *words], capture_output=True, text=True, env=place
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    largest = {key: max(one[key] for one in found) for key in found[0]}
    return dict(zip(COLUMNS, case, strict=False)) | largest


def _one(folder: str, launcher: str, memory: str, dtype: str, way: str) -> None:
    """What one process holds of a case, as a line of JSON."""
    import torch

    import bilevel
    from bilevel.fsdp import DDP, FSDP2
    from bilevel.problems.llm_reweight import parts
    from bilevel.problems.llm_reweight.problem import LLMReweight, from_records
    from bilevel.solvers.penalty import scalebio

    torch.set_num_threads(1)
    rows = [{"text": f"one two three {i}"} for i in range(24)]
    size = {"batch": 4, "target_batch": 4, "verdict": False, "dtype": dtype}
    sources = {"a": rows[:8], "b": rows[8:16]}
    problem = from_records(sources, rows[16:], model=f"{folder}/model", **size)
    if way == "whole":  # as it was before there were outlines
        LLMReweight.outline = LLMReweight.init
    elif way == "sent":
        parts._places = lambda model, name: {}
    kinds = {"full": bilevel.Full(), "lisa": bilevel.LISA(), "lora": bilevel.LoRA()}
    own = FSDP2() if launcher == "fsdp2" else DDP()
    own.open()
    problem.prepare()
    import accelerate  # noqa: F401 - both are part of what is there before
    import peft  # noqa: F401
    import torch.distributed.fsdp
    import torch.distributed.tensor
    import transformers.models.llama.modeling_llama  # noqa: F401

    torch.manual_seed(0)
    before, begun = _status(), time.perf_counter()
    with _Watched() as watched:
        generator = torch.Generator().manual_seed(0)
        state = scalebio().init(problem, kinds[memory], own, generator)
    seconds = time.perf_counter() - begun
    after = _status()
    line = {
        "held MB": (after["RssAnon"] - before["RssAnon"]) / 1e6,
        "peak MB": (watched.most["RssAnon"] - before["RssAnon"]) / 1e6,
        "of files MB": (watched.most["RssFile"] - before["RssFile"]) / 1e6,
        "s": seconds,
    }
    print(json.dumps(line), flush=True)
    del state
    own.close()


class _Watched:
    """The most that the process holds, looked at every 2 ms by a thread."""

    def __enter__(self) -> _Watched:
        self.most, self.over = _status(), False
        self.thread = threading.Thread(target=self._look)
        self.thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.over = True
        self.thread.join()

    def _look(self) -> None:
        while not self.over:
            now = _status()
            self.most = {key: max(now[key], most) for key, most in self.most.items()}
            time.sleep(0.002)


def _status() -> dict[str, int]:
    """Bytes of memory of this process by kind."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    pairs = (line.split(":") for line in lines)
    return {k: int(v.split()[0]) * 1024 for k, v in pairs if k in ("RssAnon", "RssFile")}


def _write(folder: Path) -> int:
    """A random model with its tokenizer; returns how many numbers it has."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from bilevel.problems.llm_reweight.model import tiny_tokenizer

    tiny_tokenizer(["one two three four"]).save_pretrained(folder / "model")
    shape = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "vocab_size": VOCABULARY}
    shape |= {"intermediate_size": 2816, "num_attention_heads": 16}
    ends = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**shape, **ends))
    model.save_pretrained(folder / "model", max_shard_size="100MB")
    return sum(p.numel() for p in model.parameters())


if __name__ == "__main__":
    main()
