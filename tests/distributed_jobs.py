"""What tests run in several processes: `SIZE JOBS …`, each a file of the arguments of quantize, a JSON object a line.

Every rank is a fork of this process, with the environment that `torchrun` gives it, so that torch is imported once for
all of them; under `torchrun` itself there is no SIZE. Writes the exit status of each rank of each run as JSON.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import traceback
from pathlib import Path

import torch

from vqcompress.kv_cache import calibrate as cache_calibration
from vqcompress.model import stream as blocks
from vqcompress.pipeline.quantize import QuantizeOptions, quantize

# So that a few rows are several batches.
BATCH_TOKENS = 512


def run(jobs: str) -> None:
    """Quantize with the arguments of each line."""
    torch.set_num_threads(1)
    blocks.BATCH_TOKENS = cache_calibration.BATCH_TOKENS = BATCH_TOKENS
    for line in Path(jobs).read_text().splitlines():
        job = json.loads(line)
        quantize(QuantizeOptions(job.pop("model"), Path(job.pop("out")), **job))


def rank(number: int, size: int, port: int, jobs: str) -> int:
    """Start one of the processes of a run; returns its id."""
    if child := os.fork():
        return child
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(size)}
    status = 1
    try:
        run(jobs)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


if __name__ == "__main__":
    if len(sys.argv) == 2:
        run(sys.argv[1])
    else:
        statuses = []
        for size, jobs in zip(map(int, sys.argv[1::2]), sys.argv[2::2], strict=True):
            with socket.create_server(("localhost", 0)) as free:
                port = free.getsockname()[1]
            ranks = [rank(number, size, port, jobs) for number in range(size)]
            statuses.append([os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in ranks])
        print(json.dumps(statuses))
