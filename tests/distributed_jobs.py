"""What tests run in several processes: quantize each JSON line of standard input's file with the arguments it holds."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from vqcompress import blocks, cache_calibration
from vqcompress.quantize import quantize

# So that a few rows are several batches.
BATCH_TOKENS = 512

if __name__ == "__main__":
    torch.set_num_threads(1)
    blocks.BATCH_TOKENS = cache_calibration.BATCH_TOKENS = BATCH_TOKENS
    for line in Path(sys.argv[1]).read_text().splitlines():
        job = json.loads(line)
        quantize(job.pop("model"), Path(job.pop("out")), **job)
