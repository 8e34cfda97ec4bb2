"""AQLM: W[o, g·d : (g + 1)·d] = scales[o] · Σ_r codebooks[r, codes[o, g, r]], with codebooks for each layer.

Source: arXiv 2401.06118 and the package aqlm. Codes are signed: those from 2^(bits - 1) on are stored minus 2^bits.
Codebooks and scales are float32, so that weights equal the artifact's bit for bit; readers cast them to their compute
dtype. That costs 16 bits more than the usual float16 for each row and each number of a codebook.
Shape legend: O output rows, G groups of d columns, R codebooks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vqcompress.export.rewrite import Export, mixture_of, mixtures, one_method
from vqcompress.export.stays_dense import dense_modules
from vqcompress.export.verify import Reader
from vqcompress.methods import PackedTensors
from vqcompress.methods.packing import unpack
from vqcompress.methods.vq.codebook import Codebook
from vqcompress.model.stream import BlockStream
from vqcompress.storage.artifact import Artifact, Entry

# aqlm's CPU kernel has a data race: threads add to one output at once and may lose a summand.
REFERENCE = """
from aqlm import QuantizedLinear
from aqlm.utils import _dequantize_weight, unpack_int_data
def forward(self, x):
    codes = unpack_int_data(self.codes, self.nbits_per_codebook)
    weight = _dequantize_weight(codes, self.codebooks, self.scales)
    return torch.nn.functional.linear(x, weight, self.bias)
QuantizedLinear.forward = forward
"""
READER = Reader("aqlm[cpu]>=1.1.7", setup=REFERENCE)


def export(stream: BlockStream, artifact: Artifact) -> Export:
    """`X.codes`, `X.codebooks` and `X.scales`. All compressed layers must have the same options."""
    experts = mixtures(stream)

    def why(entry: Entry) -> str:
        if isinstance(entry.method, Codebook) and entry.method.rotation:
            return "is rotated at run time"
        if isinstance(entry.method, Codebook) and entry.target.shape[1] % entry.method.d:
            return f"has {entry.target.shape[1]} inputs, no multiple of d = {entry.method.d}"
        if mixture_of(entry.target.name) in experts:
            return "is an expert's, which transformers does not build as a linear layer"
        return ""

    method = one_method(stream, artifact, (Codebook,), "aqlm needs vq-2bit-aqlm or a recipe like it", why)
    assert isinstance(method, Codebook)
    dense = dense_modules(stream, artifact.entries)
    config = {
        "quant_method": "aqlm",
        "in_group_size": method.d,
        "out_group_size": 1,
        "num_codebooks": method.stages,
        "nbits_per_codebook": method.bits,
        # transformers 5 looks for module names; AQLM's own files use tensor names.
        "linear_weights_not_to_quantize": [*dense, *(f"{name}.weight" for name in dense)],
    }
    return Export(config, _write, artifact.entries.keys(), {})


def _write(entry: Entry, parts: PackedTensors) -> dict[str, Tensor]:
    method, (rows, columns) = entry.method, entry.target.shape
    assert isinstance(method, Codebook)
    codes_OGR = unpack(parts["codes"], method.bits, columns // method.d * method.stages)
    codes_OGR = codes_OGR.view(rows, -1, method.stages)
    signed = torch.where(codes_OGR >= 1 << (method.bits - 1), codes_OGR - (1 << method.bits), codes_OGR)
    return {
        "codes": signed.to(torch.int8 if method.bits <= 8 else torch.int16),
        "codebooks": (parts["codebook"].float() * parts["step"][:, None, None])[:, :, None],
        "scales": parts["scale"].float()[:, None, None, None],
    }
