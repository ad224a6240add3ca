"""The harness's side of a worker: starts it, asks, reads the answer."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Any

from environments import FOLDER, ROOT, interpreter

ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false",
}
COMPILED = FOLDER / "inductor"
"""What PyTorch keeps of loops it has compiled; `run.py` empties it at the start of a run."""


class Fault(Exception):
    """A library cannot do what it was asked; the text says why."""


class Session:
    """One library in its own process; a context manager.

    Args:
        peer: The library.
    """

    def __init__(self, peer: str) -> None:
        self.peer = peer
        FOLDER.mkdir(parents=True, exist_ok=True)
        self._errors = FOLDER / f"{peer}.stderr"
        path = {"TORCHINDUCTOR_CACHE_DIR": str(COMPILED)}
        path |= {"PYTHONPATH": str(ROOT)} if peer == "ours" else {}
        kept = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        command = [str(interpreter(peer)), "-P", str(Path(__file__).parent / "worker.py"), peer]
        with self._errors.open("w") as errors:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=kept | ONE_THREAD | path,
            )

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """The answer to one command of `worker.Worker`.

        Raises:
            Fault: If the library failed, or its process ended.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            told = self._errors.read_text().strip().splitlines() or ["no word"]
            raise Fault(f"its process ended: {told[-1][:300]}")
        answer = json.loads(line)
        if "fault" in answer:
            raise Fault(answer["fault"])
        return answer

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        try:
            stdin.close()
            self._process.wait(timeout=20)
        except (BrokenPipeError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        stdout.close()
