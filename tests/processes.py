"""Processes that know of nothing but torch and transformers, as forks of one that imported those: seconds for each.

Each has its own memory, whose peak starts with what the imports take, and its own environment and limits.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

# Answers a line of JSON with the exit status of a fork that ran the code in it.
SERVER = """
import json, os, sys, traceback
import torch
import transformers.modeling_utils
from transformers import AutoModelForCausalLM, AutoTokenizer

torch.set_num_threads(1)
for line in sys.stdin:
    code, arguments, folder = json.loads(line)
    if child := os.fork():
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        continue
    status = 1
    for number, name in enumerate(("in", "out", "err")):
        os.dup2(os.open(f"{folder}/{name}", os.O_RDWR), number)
    try:
        sys.argv[1:] = arguments
        exec(compile(code, "<process>", "exec"), {"__name__": "__main__"})
        status = 0
    except SystemExit as end:
        status = end.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)
"""
# What `python -m vqcompress` runs.
VQCOMPRESS = "from vqcompress.cli.main import main; main()"


class Processes:
    """A context manager. What it starts runs on one thread, one after the other; `python` waits for the end."""

    def __init__(self, folder: Path):
        self.folder, self.server = folder, None

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *error: object) -> None:
        if self.server:
            self.server.stdin.close()
            self.server.wait()

    def python(self, code: str, *arguments: object, limit: int = 0) -> subprocess.CompletedProcess[str]:
        """What `python -c CODE ARGUMENTS` does; within so many bytes of address space it is a process of its own.

        A fork would begin with the heaps of its parent.
        """
        if limit:
            return subprocess.run(
                [sys.executable, "-c", code, *map(str, arguments)],
                preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                capture_output=True,
                text=True,
                check=False,
            )
        server: Any = self.server
        if server is None:
            pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "start_new_session": True}
            self.server = server = subprocess.Popen([sys.executable, "-c", SERVER], **pipes)
        files = [self.folder / name for name in ("in", "out", "err")]
        for file in files:
            file.write_text("")
        words = list(map(str, arguments))
        print(json.dumps([code, words, str(self.folder)]), file=server.stdin, flush=True)
        try:
            status = int(server.stdout.readline())
        except BaseException:
            # A test that ran out of time: the next one must not read the answer to this.
            os.killpg(server.pid, signal.SIGKILL)
            self.server = None
            raise
        return subprocess.CompletedProcess([code, *words], status, *(file.read_text() for file in files[1:]))
