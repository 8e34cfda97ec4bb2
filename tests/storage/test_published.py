"""Checkpoints that other tools have compressed, as inputs: made here by hand, and compared with their dense form."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from safetensors.torch import load_file, save_file
from torch import Tensor
from toys import toy_checkpoint
from transformers import AutoModelForCausalLM

from vqcompress.errors import VQCompressError
from vqcompress.evaluate.doctor import examine
from vqcompress.evaluate.verify import verify
from vqcompress.model.expert_layout import UnfusedCheckpoint
from vqcompress.model.projections import TransposedCheckpoint
from vqcompress.model.stream import BlockStream
from vqcompress.pipeline.options import QuantizeOptions
from vqcompress.pipeline.quantize import dry_run, quantize
from vqcompress.runtime.load import load
from vqcompress.storage.artifact import open_checkpoint
from vqcompress.storage.checkpoint import Checkpoint

IDS = torch.arange(3, 35)[None]
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
# A weight → what is stored in its place, by the end of its name, and the weight that this stands for.
Pack = Callable[[Tensor], tuple[dict[str, Tensor], Tensor]]


def spread(scale: Tensor, shape: torch.Size, rows: int, columns: int) -> Tensor:
    return scale.repeat_interleave(rows, -2)[..., : shape[-2], :].repeat_interleave(columns, -1)[..., : shape[-1]]


def grid(weight: Tensor, rows: int, columns: int) -> Tensor:
    """The largest magnitude of each block, written as a loop."""
    starts = range(0, weight.shape[0], rows), range(0, weight.shape[1], columns)
    return torch.tensor([[weight[i : i + rows, j : j + columns].abs().max() for j in starts[1]] for i in starts[0]])


def fp8(rows: int = 128, columns: int = 128, kind: torch.dtype = torch.float32, end: str = "weight_scale_inv") -> Pack:
    """E4M3 in blocks; columns = 0 is one scale for all. kind: of the scales; E8M0 makes them powers of two."""

    def pack(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        height, width = (rows, columns) if columns else weight.shape
        scale = grid(weight, height, width) / 448
        scale = (scale.log2().ceil().exp2() if kind == torch.float8_e8m0fnu else scale).to(kind)
        every = spread(scale.float(), weight.shape, height, width)
        codes = (weight / every).clamp(-448, 448).to(torch.float8_e4m3fn)
        return {"weight": codes, end: scale if columns else scale[0, 0]}, codes.float() * every

    return pack


def integers(bits: int, group: int, symmetric: bool = True, order: bool = False) -> Pack:
    """Packed integers in groups of columns, as AutoGPTQ and llm-compressor make them; order: groups of any columns."""

    def pack(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        width = weight.shape[1]
        of_column = torch.arange(width) // group
        of_column = of_column[torch.randperm(width, generator=torch.Generator().manual_seed(0))] if order else of_column
        columns = [weight[:, of_column == g] for g in range(width // group)]
        low, high = (torch.stack([f(c, 1) for c in columns], 1) for f in (torch.amin, torch.amax))
        top = 2 ** (bits - 1)
        scale = torch.maximum(-low, high) / (top - 0.5) if symmetric else (high - low) / (2 * top - 1)
        scale = scale.bfloat16()
        zero = torch.zeros_like(low) if symmetric else (-top - low / scale.float()).round().clamp(-top, top - 1)
        codes = (weight / scale.float()[:, of_column] + zero[:, of_column]).round().clamp(-top, top - 1)
        decoded = (codes - zero[:, of_column]) * scale.float()[:, of_column]
        parts = {"weight_packed": pack_to_int32(codes.to(torch.int8), bits), "weight_scale": scale}
        parts["weight_shape"] = torch.tensor(weight.shape)
        if not symmetric:
            parts["weight_zero_point"] = pack_to_int32(zero.to(torch.int8), bits, packed_dim=0).contiguous()
        if order:
            parts["weight_g_idx"] = of_column.int()
        return parts, decoded

    return pack


def int8(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    scale = (weight.abs().amax(1, keepdim=True) / 127).bfloat16()
    codes = (weight / scale.float()).round().clamp(-127, 127)
    return {"weight": codes.to(torch.int8), "weight_scale": scale}, codes * scale.float()


def nibbles(ratio: Tensor) -> tuple[Tensor, Tensor]:
    """Two E2M1 codes per byte, the first in the low half; and their numbers."""
    codes = (ratio.abs()[..., None] - E2M1).abs().argmin(-1)
    signed = torch.where(ratio < 0, -E2M1[codes], E2M1[codes])
    codes = codes + 8 * (ratio < 0)
    return (codes[..., ::2] + 16 * codes[..., 1::2]).to(torch.uint8), signed


def nvfp4(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    largest = grid(weight, 1, 16)
    whole = 448 * 6 / weight.abs().max().reshape(1)
    scale = (largest / 6 * whole).to(torch.float8_e4m3fn)
    every = spread(scale.float() / whole, weight.shape, 1, 16)
    packed, numbers = nibbles(weight / every)
    # The package rounds to bfloat16.
    return {"weight_packed": packed, "weight_scale": scale, "weight_global_scale": whole}, (numbers * every).bfloat16()


def group(bits: int, kind: str, strategy: str, activations: Any = None, **more: Any) -> dict[str, Any]:
    weights = {"num_bits": bits, "type": kind, "symmetric": True, "strategy": strategy, "dynamic": False, **more}
    return {"targets": ["Linear"], "weights": weights, "input_activations": activations}


def tensors_config(format: str, *groups: dict[str, Any]) -> dict[str, Any]:
    named = {f"group_{i}": group for i, group in enumerate(groups)}
    return {"quant_method": "compressed-tensors", "format": format, "config_groups": named, "ignore": ["lm_head"]}


BLOCKS = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
TOKEN = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
SLICES = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "group", "group_size": 128, "dynamic": True}
FP8_BLOCK = group(8, "float", "block", SLICES, block_structure=[128, 128])
CT_BLOCKS = fp8(kind=torch.bfloat16, end="weight_scale")
FP4 = group(4, "float", "tensor_group", group_size=16)
# Name → family and its fields, how weights are stored, the quantization_config.
CASES: dict[str, tuple[tuple[str, dict[str, Any]], Pack, dict[str, Any]]] = {
    "fp8": (("llama", {}), fp8(), BLOCKS),
    # No multiples of 128: transformers 5.24 takes a tile of 192 rows for one of 96.
    "fp8 partial": (("llama", {"intermediate_size": 192}), fp8(kind=torch.bfloat16), BLOCKS),
    "fp8 powers": (("qwen3_moe", {}), fp8(kind=torch.float8_e8m0fnu), {**BLOCKS, "scale_fmt": "ue8m0"}),
    "fp8 tensor": (("llama", {}), fp8(0, 0), {**BLOCKS, "weight_block_size": None}),
    "fp8 scale": (("deepseek_v3", {}), fp8(end="scale"), BLOCKS),
    "float-quantized": (("llama", {}), CT_BLOCKS, tensors_config("float-quantized", FP8_BLOCK)),
    "int-quantized": (("qwen3_moe", {}), int8, tensors_config("int-quantized", group(8, "int", "channel", TOKEN))),
    "int4": (("llama", {}), integers(4, 32), tensors_config("pack-quantized", group(4, "int", "group", group_size=32))),
    "int4 zero": (
        ("qwen3_moe", {}),
        integers(4, 32, False),
        tensors_config("pack-quantized", group(4, "int", "group", group_size=32, symmetric=False)),
    ),
    "int8 order": (
        ("llama", {}),
        integers(8, 64, False, True),
        tensors_config("pack-quantized", group(8, "int", "group", group_size=64, symmetric=False, actorder="group")),
    ),
    "nvfp4": (("llama", {}), nvfp4, tensors_config("nvfp4-pack-quantized", FP4)),
}  # fmt: skip
Both = tuple[Path, dict[str, Tensor]]


def publish(folder: Path, change: Callable[[str, Tensor], Any], settings: dict[str, Any], dense: Path) -> Both:
    """Write `dense` compressed; returns the directory and the dense tensors. change: name, weight → stored, decoded."""
    shutil.copytree(dense, folder, dirs_exist_ok=True)
    stored: dict[str, Tensor] = {}
    wanted: dict[str, Tensor] = {}
    for name, tensor in load_file(dense / "model.safetensors").items():
        made = change(name, tensor) if ".layers." in name else None
        parts, wanted[name] = made or ({name: tensor}, tensor)
        stored |= parts
    save_file({name: tensor.contiguous() for name, tensor in stored.items()}, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    return folder, wanted


@pytest.fixture
def published(tmp_path: Path) -> Callable[[str], Both]:
    def make(name: str) -> Both:
        (family, fields), pack, settings = CASES[name]
        dense = toy_checkpoint(tmp_path / "dense", family, dtype="bfloat16", **fields)

        def change(name: str, weight: Tensor) -> Any:
            module, _, last = name.rpartition(".")
            if last != "weight" or weight.dim() != 2 or module.endswith("gate"):
                return None
            parts, decoded = pack(weight.float())
            return {f"{module}.{end}": tensor for end, tensor in parts.items()}, decoded

        return publish(tmp_path / "published", change, settings, dense)

    return make


def logits(model: Any) -> Tensor:
    with torch.inference_mode():
        return model(IDS).logits


def reference(folder: Path, tensors: dict[str, Tensor]) -> Tensor:
    """Logits of the dense tensors in float32."""
    (folder / "ref").mkdir()
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "ref" / "config.json").write_text(json.dumps(config))
    save_file(
        {n: t.float().contiguous() for n, t in tensors.items()}, folder / "ref" / "model.safetensors", {"format": "pt"}
    )
    return logits(AutoModelForCausalLM.from_pretrained(folder / "ref", dtype=torch.float32))


@pytest.mark.parametrize("name", CASES)
def test_a_published_checkpoint_is_its_dense_one(name: str, published: Callable[[str], Both]) -> None:
    folder, wanted = published(name)
    source = open_checkpoint(str(folder))
    found = source.read(source.tensors)
    assert found.keys() == wanted.keys()
    for key, tensor in wanted.items():
        assert found[key].shape == source.tensors[key].shape == tensor.shape
        torch.testing.assert_close(found[key].float(), tensor.float(), rtol=2e-7, atol=0, msg=key)
    assert "quantization_config" not in source.config
    assert torch.allclose(logits(load(folder, "cpu")), reference(folder, wanted), atol=1e-4)


def test_mxfp4_of_gpt_oss(tmp_path: Path) -> None:
    dense = toy_checkpoint(tmp_path / "dense", "gpt_oss", dtype="bfloat16")

    def change(name: str, weight: Tensor) -> Any:
        if not name.endswith(("gate_up_proj", "down_proj")):
            return None
        blocks = weight.float().transpose(1, 2).unflatten(2, (-1, 32))
        powers = (blocks.abs().amax(-1) / 6).log2().ceil()
        codes, numbers = nibbles(blocks / powers.exp2()[..., None])
        decoded = (numbers * powers.exp2()[..., None]).flatten(2).transpose(1, 2)
        return {f"{name}_blocks": codes, f"{name}_scales": (powers + 127).to(torch.uint8)}, decoded

    settings = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
    folder, wanted = publish(tmp_path / "published", change, settings, dense)
    source = open_checkpoint(str(folder))
    found = source.read(source.tensors)
    assert {n: t.shape for n, t in found.items()} == {n: t.shape for n, t in wanted.items()}
    assert all(torch.equal(found[name].float(), tensor.float()) for name, tensor in wanted.items())
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert torch.allclose(logits(load(folder, "cpu")), logits(theirs), atol=1e-5)


@pytest.mark.parametrize("name", ["fp8 partial", "float-quantized", "fp8 powers"])
def test_fp8_tiles_pass_through(name: str, published: Callable[[str], Both], tmp_path: Path) -> None:
    folder, _ = published(name)
    report = quantize(QuantizeOptions(model=str(folder), recipe="fp8-tile", out=tmp_path / "out"))
    assert verify(str(tmp_path / "out"))["targets"] > 0
    assert {row["relative_error"] for row in report["targets"]} == {0.0}
    assert report["source_format"] == CASES[name][2].get("format", "fp8")
    ours, theirs = Checkpoint(tmp_path / "out"), Checkpoint(folder)
    assert ours.config["quantization_config"]["quant_method"] == "vqcompress"
    for row in report["targets"]:
        packed = ours.read([f"{row['name']}.weight_codes", f"{row['name']}.weight_scale"])
        end = "weight_scale" if "format" in CASES[name][2] else "weight_scale_inv"
        stored = theirs.read([f"{row['name']}.weight", f"{row['name']}.{end}"])
        for mine, other in zip(packed.values(), stored.values(), strict=True):
            other = other if other.dtype == mine.dtype else other.float()
            assert torch.equal(mine.view(torch.uint8), other.view(torch.uint8))


def test_every_recipe_takes_a_published_checkpoint(
    published: Callable[[str], Both], tmp_path: Path, text: Path
) -> None:
    folder, wanted = published("int4")
    options = QuantizeOptions(
        model=str(folder), recipe="smoothquant-int8", out=tmp_path / "out", texts=[str(text)], samples=4, seqlen=32
    )
    quantize(options)
    found = logits(load(tmp_path / "out", "cpu"))
    assert (found - reference(folder, wanted)).norm() < 0.05 * found.norm()
    assert examine(str(folder))["ok"]
    assert dry_run(options)["model"] == str(folder)


@pytest.mark.parametrize("family", ["granitemoe", "gpt2"])
def test_other_settings_are_another_checkpoint_however_it_is_read(
    family: str, toy: Callable[..., Path], tmp_path: Path
) -> None:
    """As with experts apart, or with weights (O, I)."""
    found = set()
    for k in range(2):
        folder, _ = publish(tmp_path / str(k), lambda name, weight: None, {**BLOCKS, "scale_fmt": k}, toy(family))
        source = BlockStream(open_checkpoint(str(folder)), torch.device("cpu"), torch.float32).source
        assert isinstance(source, UnfusedCheckpoint | TransposedCheckpoint)
        found.add(source.fingerprint())
    assert len(found) == 2


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "aqlm", "hqq", "exl3", "modelopt"])
def test_other_methods_are_refused_by_name(method: str, toy: Callable[..., Path], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(toy(), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": method}}))
    with pytest.raises(VQCompressError, match=method):
        open_checkpoint(str(folder))


@pytest.mark.parametrize("settings", [None, {}])
def test_an_empty_quantization_config_is_dense(settings: Any, toy: Callable[..., Path], tmp_path: Path) -> None:
    folder, _ = publish(tmp_path / "model", lambda name, weight: None, settings, toy())
    assert type(open_checkpoint(str(folder))) is Checkpoint
    assert load(folder, "cpu").config.model_type == "llama"


@pytest.mark.parametrize("settings", ["fp8", [], 4])
def test_a_quantization_config_that_is_no_mapping(settings: Any, toy: Callable[..., Path], tmp_path: Path) -> None:
    folder, _ = publish(tmp_path / "model", lambda name, weight: None, settings, toy())
    for job in (open_checkpoint, load):
        with pytest.raises(VQCompressError, match="quantization_config"):
            job(str(folder))
