"""Train the Gaussian codebooks of a KV cache and write vqcompress/kv_cache/gaussian.bin.

Usage: python scripts/train_codebooks.py [--samples N] [--rounds N]

k-means on fresh samples each round; about ten minutes of one core. The file is committed: decoding must not depend on
the arithmetic of the machine that runs this.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from vqcompress.kv_cache import gaussian
from vqcompress.methods.vq.kmeans import means, seed_entries
from vqcompress.methods.vq.learned import nearest


def train(d: int, bits: int, samples: int, rounds: int) -> torch.Tensor:
    """Entries (2**bits, d) with nearly the least error on the unit Gaussian, most used first."""
    generator = torch.Generator().manual_seed(0)
    count = 1 << bits
    ones_N = torch.ones(samples, dtype=torch.float64)
    book_Kd = seed_entries(
        torch.randn(1, 32 * count, d, generator=generator), ones_N[None, : 32 * count], count, generator
    )[0]
    total_Kd, mass_K = torch.zeros(count, d), torch.zeros(count)
    for round_number in range(rounds):
        x_Nd = torch.randn(samples, d, generator=generator)
        code_N = nearest(x_Nd, book_Kd[None], 1)[:, 0]
        if round_number < rounds // 2:
            book_Kd = means(x_Nd[None], ones_N[None], code_N[None], book_Kd[None])[0]
            continue
        # The second half averages over rounds, so that the last sample does not show.
        total_Kd = 0.9 * total_Kd + torch.zeros(count, d).index_add_(0, code_N, x_Nd)
        mass_K = 0.9 * mass_K + torch.bincount(code_N, minlength=count)
        book_Kd = total_Kd / mass_K[:, None]
    x_Nd = torch.randn(1 << 18, d, generator=generator)
    code_N = nearest(x_Nd, book_Kd[None], 1)[:, 0]
    error = (x_Nd - book_Kd[code_N]).square().mean().item()
    print(
        f"VQ<{d},{bits},1>: {bits / d:g} bits, error {error:.5f}, {error * 4 ** (bits / d):.3f} of the bound",
        flush=True,
    )
    return book_Kd[torch.bincount(code_N, minlength=count).argsort(descending=True, stable=True)]


def main() -> None:
    """Train every size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1 << 18)
    parser.add_argument("--rounds", type=int, default=80)
    a = parser.parse_args()
    data = b""
    for d in gaussian.DIMENSIONS:
        integers_Kd = (train(d, 8, a.samples, a.rounds) / gaussian.STEP).round().to(torch.int16)
        data += integers_Kd.numpy().astype("<i2").tobytes()
    (Path(gaussian.__file__).parent / gaussian.FILE).write_bytes(data)


if __name__ == "__main__":
    main()
