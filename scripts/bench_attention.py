"""Attention of one token to coded keys and values, against torch's in bfloat16. A GPU, or --interpret.

Usage: python scripts/bench_attention.py [--tokens N ...] [--json FILE] [--limit SECONDS]
       python scripts/bench_attention.py --interpret

Prints the time of a call, its ratio to `torch.nn.functional.scaled_dot_product_attention` on keys and values that are
not coded (above 1 is faster), and which share the codes are of what this GPU was measured to read. What does not agree
with the reference gets no time. With --interpret tiny caches run on the CPU in Triton's interpreter, for their
correctness alone. --json appends a line per figure.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from bench_kernels import Figures, error, parse
from gpu_clock import ROUND, copies, seconds
from kernel_cases import CACHES, TINY_CACHES, Cache

from vqcompress.kv_cache import codes as reference
from vqcompress.kv_cache import kernel as kv


class Bench(Figures):
    """Times of attention."""

    def torch_attention(self, cache: Cache) -> float:
        """Seconds of torch's attention to as many keys and values of 16 bits."""
        size = (cache.batch, cache.heads, cache.tokens, cache.channels)
        key = (cache.queries, *size)
        if key not in self.dense:
            q_BQ1D = torch.randn((cache.batch, cache.queries, 1, cache.channels), device=self.device, dtype=self.dtype)
            bytes_of_both, grouped = 4 * torch.Size(size).numel(), cache.queries != cache.heads
            # What is larger than any cache needs no copies.
            distinct = 1 if bytes_of_both > ROUND else copies(bytes_of_both)
            made = [torch.randn((2, *size), device=self.device, dtype=self.dtype) for _ in range(distinct)]
            call = lambda both: F.scaled_dot_product_attention(q_BQ1D, *both, enable_gqa=grouped)  # noqa: E731
            self.dense[key] = seconds(call, made * (copies(bytes_of_both) // distinct))
        return self.dense[key]

    def attention(self, cache: Cache) -> None:
        """Attention of one token: check it, then print its time."""
        turned = ", turned" if cache.turned else ""
        heads = f"{cache.queries} / {cache.heads} heads of {cache.channels}"
        label = f"attention, batch {cache.batch}, {cache.tokens} tokens, {heads}, d {cache.d}{turned}"
        parts = cache.parts(self.device, self.dtype)
        # The reference decodes everything, so it gets one row.
        q_BQD, codes, *others = parts
        expected_BQD = reference.attend(q_BQD[:1], [code[:1] for code in codes], *others)[0]
        if self.right(label, error(kv.attend(*parts)[0][:1], expected_BQD)) and not self.a.interpret:
            made = [cache.parts(self.device, self.dtype, seed) for seed in range(copies(cache.bytes()))]
            took = seconds(lambda given: kv.attend(*given), made)
            ratio, share = self.torch_attention(cache) / took, cache.bytes() / took / self.bandwidth
            print(f"{label}: {took * 1e6:.1f} µs, {ratio:.2f} × torch, {share:.0%} of bandwidth", flush=True)
            self.write({"figure": label, "microseconds": round(took * 1e6, 2), "ratio": round(ratio, 3)})

    def run(self) -> None:
        """Measure every cache."""
        caches = (
            TINY_CACHES if self.a.interpret else [c for c in CACHES if not self.a.tokens or c.tokens in self.a.tokens]
        )
        self.work([lambda c=c: self.attention(c) for c in caches])


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", nargs="+", type=int)
    a = parse(parser)
    with torch.inference_mode():
        Bench(a).run()


if __name__ == "__main__":
    main()
