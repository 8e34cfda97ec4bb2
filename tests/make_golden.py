"""Write the golden artifact of the present format version. Run once per version; what it wrote stays forever.

Usage: python tests/make_golden.py     (writes tests/golden/vN, N the format version; refuses if it is there)
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from toys import toy_checkpoint, toy_text

import vqcompress
from vqcompress.pipeline.quantize import QuantizeOptions, quantize
from vqcompress.storage.artifact import FORMAT_VERSION, REPORTS
from vqcompress.storage.writer import refresh_sums

GOLDEN = Path(__file__).parent / "golden"
RECIPE = """
rules:
  - {match: "*.o_proj", method: keep}
  - {match: "*.self_attn.*", method: int8, smoothing: {alpha: 0.5, norm: runtime}}
  - {match: "*.down_proj", method: vq, d: 2, bits: 3, stages: 2, iterations: 2, codebook_updates: 1}
  - {match: "*.up_proj", method: vq, d: 4, bits: 5, scope: target, entry_bits: 16, iterations: 2, codebook_updates: 1}
  - {match: "*", method: fp8}
"""


def main() -> None:
    """Quantize a toy with all that the format can hold, and keep its logits beside it."""
    out = GOLDEN / f"v{FORMAT_VERSION}"
    if out.exists():
        raise SystemExit(f"{out} is there already")
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "toy"
        toy_checkpoint(model, "llama", layers=2, hidden=64)
        (Path(folder) / "recipe.yaml").write_text(RECIPE)
        (Path(folder) / "text.txt").write_text(toy_text(4000, 1))
        quantize(QuantizeOptions(str(model), out, f"{folder}/recipe.yaml", [f"{folder}/text.txt"], 16, 64))
    for name in ("report.json", "report.html", "README.md"):
        # They name a folder that is gone.
        (out / name).unlink()
    refresh_sums(out, REPORTS)
    ids = torch.arange(48)[None] * 7 % 300
    with torch.inference_mode():
        save_file({"ids": ids, "logits": vqcompress.load(out)(ids).logits}, GOLDEN / f"v{FORMAT_VERSION}.safetensors")


if __name__ == "__main__":
    main()
