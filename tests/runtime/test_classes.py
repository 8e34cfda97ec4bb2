"""An artifact loads in every class that loads its checkpoint, with what that checkpoint has beside its text blocks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from toys import rewritten, toy_tokenizer
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText

from vqcompress.errors import VQCompressError
from vqcompress.export import export
from vqcompress.model.stream import BlockStream
from vqcompress.pipeline.quantize import QuantizeOptions, quantize
from vqcompress.runtime.load import load
from vqcompress.storage.artifact import SUMS, Artifact
from vqcompress.storage.checkpoint import Checkpoint

Make = Callable[..., Path]
IDS = torch.randint(3, 380, (2, 24), generator=torch.Generator().manual_seed(7))
# Codes without activations in few bits, so that the dense export computes the same.
RULE = "rules:\n  - {match: '*', method: vq, d: 2, bits: 4, iterations: 2, codebook_updates: 0}\n"
TEXT: dict[str, Any] = {
    "vocab_size": 384, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
# Larger than the text part.
TOWER = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4,
         "image_size": 28, "patch_size": 14}  # fmt: skip
QWEN = {"depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64, "patch_size": 14}
IMAGES = {"image_token_id": 380, "video_token_id": 381, "vision_start_token_id": 382, "vision_end_token_id": 383}
LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 16,
          "linear_value_head_dim": 16, "layer_types": ["linear_attention", "full_attention"]}  # fmt: skip
MULTIMODAL: dict[str, tuple[str, dict[str, Any]]] = {
    # AutoModelForCausalLM gives the class with the tower,
    "gemma3": ("Gemma3Config", {"text_config": TEXT, "vision_config": TOWER, "mm_tokens_per_image": 4,
                                "image_token_index": 380}),
    # the text part alone, whose names are others,
    "qwen3_5": ("Qwen3_5Config", {"text_config": {**TEXT, **LINEAR}, "vision_config": QWEN, **IMAGES}),
    # or nothing.
    "llava": ("LlavaConfig", {"text_config": {"model_type": "llama", **TEXT}, "image_token_index": 380,
                              "vision_config": {"model_type": "clip_vision_model", "projection_dim": 64, **TOWER}}),
}  # fmt: skip


def multimodal(name: str, path: Path) -> Path:
    torch.manual_seed(0)
    config, fields = MULTIMODAL[name]
    model = AutoModelForImageTextToText.from_config(getattr(transformers, config)(**fields), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    model.save_pretrained(path)
    toy_tokenizer(384).save_pretrained(path)
    return path


@pytest.fixture
def compress(recipe_file: Callable[[str], str], text: Path, tmp_path: Path) -> Callable[..., Path]:
    """compress(model, recipe) → its artifact."""

    def run(model: Path, recipe: str = RULE) -> Path:
        options = QuantizeOptions(str(model), tmp_path / "out", recipe_file(recipe), [str(text)], samples=8, seqlen=64)
        quantize(options)
        return tmp_path / "out"

    return run


@torch.inference_mode()
def logits(model: Any) -> torch.Tensor:
    out = model(IDS, return_dict=True)
    found: torch.Tensor = out.logits if "logits" in out else out.last_hidden_state
    return found


@torch.inference_mode()
def streamed(source: Checkpoint) -> torch.Tensor:
    stream = BlockStream(source, torch.device("cpu"), torch.float32)
    states = [stream.embed(IDS)]
    for i in range(len(stream.blocks)):
        stream.forward(stream.load_block(i), i, states)
    return stream.logits(states[0])


@pytest.mark.parametrize("name", ["qwen3_5", *(pytest.param(n, marks=pytest.mark.slow) for n in ("gemma3", "llava"))])
def test_a_multimodal_checkpoint_loads_in_every_class(name: str, compress: Make, tmp_path: Path) -> None:
    model = multimodal(name, tmp_path / "model")
    artifact = compress(model)
    # The check starts a process, which takes seconds.
    export(str(artifact), "dense", tmp_path / "dense", verify=name == "llava")
    before, after = Checkpoint(model), Artifact(artifact)
    layers = {name.split(".layers.")[0] for name in before.tensors if name.endswith("q_proj.weight")}
    text = [part for part in layers if "vision" not in part and "visual" not in part]
    kept = [n for n in before.tensors if not n.startswith(f"{text[0]}.layers.")]
    was, now = before.read(kept), after.read(kept)
    assert any("vis" in n for n in kept)
    assert all(torch.equal(was[n], now[n]) for n in kept)
    assert Checkpoint(tmp_path / "dense").tensors.keys() == before.tensors.keys()
    classes: list[Any] = [AutoModel, AutoModelForImageTextToText]
    classes += [getattr(transformers, before.config["architectures"][0])]
    classes += [] if name == "llava" else [AutoModelForCausalLM]
    for kind in classes:
        ours, dense = (kind.from_pretrained(p, dtype=torch.float32).eval() for p in (artifact, tmp_path / "dense"))
        assert len([m for m in ours.modules() if hasattr(m, "view_part")]) == len(after.entries)
        torch.testing.assert_close(logits(ours), logits(dense), atol=2e-4, rtol=1e-4)
        if kind is not AutoModel:
            assert ours.generate(IDS[:1], max_new_tokens=2, do_sample=False).shape == (1, 26)
    torch.testing.assert_close(logits(load(artifact)), logits(dense), atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(streamed(after), logits(dense), atol=2e-4, rtol=1e-4)


# One weight is compressed, almost without loss.
ONE = "rules:\n  - {match: '*.0.*.k_proj', method: vq, d: 1, bits: 10, entry_bits: 16, feedback: false}\n"
FOLD = f"rotation: fold\n{ONE}"


@pytest.mark.parametrize("recipe", [ONE, FOLD], ids=["plain", "rotated"])
@pytest.mark.parametrize(
    "stored", ["another head", *(pytest.param(f"the {x}", marks=pytest.mark.slow) for x in ("same head", "head alone"))]
)
def test_tied_weights_are_tied_as_transformers_does(
    stored: str, recipe: str, toy: Make, compress: Make, tmp_path: Path
) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        embedding = tensors["model.embed_tokens.weight"]
        tensors["lm_head.weight"] = embedding.flip(0) if stored == "another head" else embedding.clone()
        if stored == "the head alone":
            del tensors["model.embed_tokens.weight"]

    model = rewritten(toy("llama", tie_word_embeddings=True), tmp_path / "model", change)
    original = logits(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32))
    assert torch.allclose(original, logits(load(toy("llama", tie_word_embeddings=True)))) == (stored != "another head")
    torch.testing.assert_close(streamed(Checkpoint(model)), original, atol=1e-4, rtol=1e-4)
    artifact = compress(model, recipe)
    ends = Artifact(artifact).tensors.keys() & {"lm_head.weight", "model.embed_tokens.weight"}
    assert len(ends) == 1 + (recipe == FOLD or stored == "another head")
    export(str(artifact), "dense", tmp_path / "dense")
    ours = logits(load(artifact))
    assert (ours - original).norm() < 0.01 * original.norm()
    for found in (
        logits(AutoModelForCausalLM.from_pretrained(artifact, dtype=torch.float32)),
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)),
        streamed(Artifact(artifact)),
    ):
        torch.testing.assert_close(found, ours, atol=1e-4, rtol=1e-4)


def test_a_model_with_a_tower_is_not_rotated(compress: Make, tmp_path: Path) -> None:
    """What its projector adds to the hidden states would not be rotated, and no text would show it."""
    with pytest.raises(VQCompressError, match=r"multi_modal_projector|vision_tower"):
        compress(multimodal("gemma3", tmp_path / "model"), FOLD)


@pytest.mark.parametrize("damage", ["missing", "shape", "bytes"])
def test_load_and_from_pretrained_refuse_the_same(damage: str, quantized: Make, tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        norm = tensors.pop("model.norm.weight")
        if damage != "missing":
            tensors["model.norm.weight"] = norm[:-1].clone() if damage == "shape" else norm + 1

    artifact = quantized()
    shard = Artifact(artifact).tensors["model.norm.weight"].file
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in artifact.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    tensors = {n: t for n, t in Artifact(artifact).read(Artifact(artifact).tensors).items()
               if Artifact(artifact).tensors[n].file == shard}  # fmt: skip
    change(tensors)
    save_file(tensors, broken / shard, metadata={"format": "pt"})
    if damage != "bytes":
        # As `save_pretrained` leaves it: without checksums.
        (broken / SUMS).unlink()
        (broken / "report.json").unlink()
    named = shard if damage == "bytes" else "model.norm.weight"
    for read in (load, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(VQCompressError, match=named):
            read(broken)


def test_a_config_that_asks_for_tuples_gives_logits(toy: Make, compress: Make, tmp_path: Path) -> None:
    model = rewritten(toy("llama"), tmp_path / "model", lambda tensors: None)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "return_dict": False}))
    artifact = compress(model)
    assert load(artifact)(IDS).logits.shape == load(model)(IDS).logits.shape
