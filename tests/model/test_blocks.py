"""A model run block by block gives what its own forward gives, for architectures that nobody wrote a table for."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from toys import toy_checkpoint, toy_config

from vqcompress.errors import UsageError, VQCompressError
from vqcompress.model.calls import Calls
from vqcompress.model.stream import BlockStream
from vqcompress.runtime.load import load
from vqcompress.storage.checkpoint import INDEX, SINGLE, Checkpoint
from vqcompress.storage.hidden_states import keep

Make = Callable[..., Path]
CPU = torch.device("cpu")
COMMON: dict[str, Any] = {
    "vocab_size": 384,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
# Architectures beside those of `toys`: name → config class and its fields.
OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma2": ("Gemma2Config", {"head_dim": 16, "sliding_window": 8, "layer_types": None}),
    "falcon": ("FalconConfig", {"new_decoder_architecture": False, "multi_query": True, "alibi": False}),
    "falcon_alibi": ("FalconConfig", {"alibi": True}),
    "gpt2": ("GPT2Config", {"n_embd": 64, "n_layer": 2, "n_head": 4}),
}
FAMILIES = ["llama", "qwen3", "mixtral", "qwen3_moe", "deepseek_v3", "gemma", "opt", "gpt_neox", *OTHERS]


def save(path: Path, family: str, shard: str = "1GB") -> Path:
    """A random checkpoint whose norms and biases are not the ones and zeros they start as."""
    torch.manual_seed(0)
    if family in OTHERS:
        name, fields = OTHERS[family]
        config = getattr(transformers, name.removesuffix("_alibi"))(**{**COMMON, **fields})
    else:
        config = toy_config(family, layers=3, hidden=64)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn_like(parameter) * 0.1
    model.save_pretrained(path, max_shard_size=shard)
    return path


def streamed(stream: BlockStream, batches: list[Tensor]) -> list[Tensor]:
    """Logits of every batch, block by block."""
    states = [stream.embed(batch) for batch in batches]
    for i in range(len(stream.blocks)):
        stream.forward(stream.load_block(i), i, states)
    return [stream.logits(state) for state in states]


def batches() -> list[Tensor]:
    """Two full batches of one shape, and a smaller last one."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 384, (rows, 24), generator=generator) for rows in (2, 2, 1)]


@torch.inference_mode()
def assert_equals_forward(path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    found = streamed(BlockStream(Checkpoint(path), CPU, torch.float32), batches())
    for batch, logits in zip(batches(), found, strict=True):
        expected = model(batch, use_cache=False).logits
        assert expected.std() > 0.01
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_block_by_block_equals_forward(family: str, tmp_path: Path) -> None:
    assert_equals_forward(save(tmp_path, family))


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_checkpoint_in_several_files_reads_like_one(family: str, tmp_path: Path) -> None:
    save(tmp_path, family, shard="150kB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_equals_forward(tmp_path)


def test_a_checkpoint_without_the_prefix_of_its_model_reads_like_one_with_it(tmp_path: Path) -> None:
    """As GPT-2 and many older checkpoints are stored: `layers.0…` for what the model calls `model.layers.0…`."""
    save(tmp_path, "llama")
    tensors = {name.removeprefix("model."): tensor for name, tensor in load_file(tmp_path / SINGLE).items()}
    save_file(tensors, tmp_path / SINGLE, metadata={"format": "pt"})
    assert_equals_forward(tmp_path)


@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight", "model.embed_tokens.weight"]
)
def test_a_missing_tensor_is_named(name: str, tmp_path: Path) -> None:
    save(tmp_path, "llama")
    tensors = load_file(tmp_path / SINGLE)
    del tensors[name]
    save_file(tensors, tmp_path / SINGLE, metadata={"format": "pt"})
    with pytest.raises(VQCompressError, match=name):
        streamed(BlockStream(Checkpoint(tmp_path), CPU, torch.float32), batches())


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    save(tmp_path, "llama", shard="150kB")
    gone = sorted(tmp_path.glob("*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(VQCompressError, match=gone.name):
        Checkpoint(tmp_path)


def test_a_tensor_of_another_shape_is_named(tmp_path: Path) -> None:
    save(tmp_path, "llama")
    tensors = load_file(tmp_path / SINGLE)
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(128, 65)
    save_file(tensors, tmp_path / SINGLE, metadata={"format": "pt"})
    with pytest.raises(VQCompressError, match=r"layers.1.mlp.up_proj.weight.*128, 65.*128, 64"):
        streamed(BlockStream(Checkpoint(tmp_path), CPU, torch.float32), batches())


def test_a_file_outside_of_the_directory_is_refused(tmp_path: Path) -> None:
    save(tmp_path, "llama", shard="150kB")
    index = json.loads((tmp_path / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = "../elsewhere.safetensors"
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(VQCompressError, match="outside of its directory"):
        Checkpoint(tmp_path)


def test_a_block_that_gives_nan_is_named(tmp_path: Path) -> None:
    save(tmp_path, "llama")
    tensors = load_file(tmp_path / SINGLE)
    tensors["model.layers.1.mlp.up_proj.weight"] *= 1e38
    save_file(tensors, tmp_path / SINGLE, metadata={"format": "pt"})
    with pytest.raises(VQCompressError, match=r"model.layers.1 puts out NaN or Inf"):
        streamed(BlockStream(Checkpoint(tmp_path), CPU, torch.float32), batches())


@pytest.fixture
def blocks_read_the_embeddings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Llama whose blocks are also given each token's embedding, as some architectures do."""
    forward = transformers.LlamaModel.forward

    def with_embeddings(self: Any, input_ids: Tensor, **kwargs: Any) -> Any:
        # What it is given beyond its own arguments, the model hands on to every layer.
        return forward(self, input_ids, token_embeddings=self.embed_tokens(input_ids), **kwargs)

    monkeypatch.setattr(transformers.LlamaModel, "forward", with_embeddings)


def test_blocks_that_read_the_tokens_get_those_of_their_row(blocks_read_the_embeddings: None, toy: Make) -> None:
    assert not BlockStream(Checkpoint(toy()), CPU, torch.float32).learn().plain
    assert_equals_forward(toy())


def test_a_model_without_a_list_of_layers_is_refused() -> None:
    from vqcompress.model.targets import blocks_of

    with pytest.raises(VQCompressError, match="no list of layers"):
        blocks_of(torch.nn.Sequential(torch.nn.Linear(2, 2)))


def test_the_same_toy_for_the_same_seed(tmp_path: Path) -> None:
    first, second = (load_file(toy_checkpoint(tmp_path / n, hidden=64) / SINGLE) for n in "ab")
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


SHARED: dict[str, Any] = {
    "pad_token_id": 0,
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 384,
    "sliding_window": 8,
    "head_dim": 16,
}
LATENT: dict[str, Any] = {
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "head_dim": 8,
    "num_key_value_heads": 4,
    "index_topk": 8,
    "index_head_dim": 16,
    "index_n_heads": 2,
    "first_k_dense_replace": 4,
    "num_hidden_layers": 3,
}
MAMBA: dict[str, Any] = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_chunk_size": 8}
# Models whose blocks get or answer more than hidden states: what each of them tries, and its config.
MORE: dict[str, tuple[str, dict[str, Any]]] = {
    "rows of a stack, embeddings per layer, shared keys": (
        "Gemma3nTextConfig",
        {**SHARED, "laurel_rank": 8, "altup_num_inputs": 2, "activation_sparsity_pattern": [0.0] * 4},
    ),
    "embeddings per layer, shared keys": ("Gemma4TextConfig", {**SHARED, "global_head_dim": 32}),
    "indices of the block before": (
        "GlmMoeDsaConfig",
        {**LATENT, "indexer_types": ["full", "shared", "full"]},
    ),
    "two items, one unread": ("BambaConfig", {**MAMBA, "attn_layer_indices": [1], "num_hidden_layers": 2}),
}


@pytest.mark.parametrize("folder", ["memory", "disk"])
@pytest.mark.parametrize("kind", MORE)
@torch.inference_mode()
def test_what_blocks_get_beside_hidden_states_is_carried_with_the_row(kind: str, folder: str, tmp_path: Path) -> None:
    name, fields = MORE[kind]
    config = getattr(transformers, name)(**{**COMMON, **fields})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model.save_pretrained(tmp_path)
    stream = BlockStream(Checkpoint(tmp_path), CPU, torch.float32)
    rows = torch.cat(batches())
    states = keep((stream.embed(batch) for batch in stream.batches(rows)), tmp_path if folder == "disk" else None)
    for i in range(len(stream.blocks)):
        stream.forward(stream.load_block(i), i, states)
    found = torch.cat([stream.logits(state) for state in states])
    torch.testing.assert_close(found, model(rows, use_cache=False).logits, atol=1e-5, rtol=1e-5)


def test_a_block_that_text_skips_is_compressed_without_data(tmp_path: Path) -> None:
    """Llama-3.2-Vision's cross attention reads an image."""
    fields = {**COMMON, "num_hidden_layers": 3, "cross_attention_layers": [1], "head_dim": 16}
    tower = {"hidden_size": 32, "num_hidden_layers": 1, "num_global_layers": 1, "attention_heads": 2, "image_size": 28}
    config = transformers.MllamaConfig(
        text_config=fields, vision_config={**tower, "patch_size": 14, "intermediate_size": 32, "vision_output_dim": 32}
    )
    model = transformers.AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()
    model.save_pretrained(tmp_path)
    stream = BlockStream(Checkpoint(tmp_path), CPU, torch.float32)
    assert [stream.learn().number(i) for i in range(3)] == [0, None, 1]
    found = streamed(stream, batches())
    for batch, logits in zip(batches(), found, strict=True):
        torch.testing.assert_close(logits, model(batch, use_cache=False).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("fields", "length"),
    [
        ({"max_seq_len": 64}, 64),
        ({"text_config": {"max_position_embeddings": 128}, "max_position_embeddings": 512}, 128),
        ({"text_config": {"hidden_size": 8}, "n_positions": 32}, 32),
        ({"max_position_embeddings": None}, 2048),
    ],
)
def test_a_context_is_found_under_its_other_names(fields: dict[str, Any], length: int, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(fields))
    checkpoint = Checkpoint(tmp_path)
    assert checkpoint.row_length(None) == length
    if length < 2048:
        with pytest.raises(UsageError, match=str(length)):
            checkpoint.row_length(length + 1)


def test_what_a_config_says_about_outputs_changes_nothing(toy: Make, tmp_path: Path) -> None:
    path = shutil.copytree(toy(), tmp_path / "model")
    wanted = streamed(BlockStream(Checkpoint(path), CPU, torch.float32), batches())
    said = {"return_dict": False, "output_hidden_states": True, "output_attentions": True, "use_cache": False}
    config = path / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | said))
    stream = BlockStream(Checkpoint(path), CPU, torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(streamed(stream, batches()), wanted, strict=True))
    assert torch.isfinite(load(path)(batches()[0]).logits).all()


class _Filling(nn.Module):
    """Appends to a list, and writes into a tensor, of a mapping that all blocks get."""

    def forward(self, x: Tensor, shared: dict[str, Any]) -> Tensor:
        shared["list"].append(2 * x)
        shared["sum"] += x
        return x + sum(shared["list"]) + shared["sum"]


class _Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embeddings, self.layers = nn.Embedding(32, 4), nn.ModuleList(_Filling() for _ in range(3))

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings

    def forward(self, ids: Tensor, use_cache: bool = False) -> SimpleNamespace:
        x = self.embeddings(ids)
        shared: dict[str, Any] = {"list": [], "sum": torch.zeros_like(x)}
        for layer in self.layers:
            x = layer(x, shared)
        return SimpleNamespace(logits=x)


@torch.inference_mode()
def test_what_blocks_change_inside_of_a_shared_mapping_is_handed_on() -> None:
    model, ids = _Model(), torch.arange(6)[None]
    blocks, wanted = list(model.layers), model(ids).logits
    calls = Calls(model, model.layers, CPU)
    state = calls.embed(ids)
    for i, block in enumerate(blocks):
        first, state = calls.step(block, i, state), calls.step(block, i, state)
        # To run a block changes nothing of the state before it.
        assert torch.equal(first.hidden, state.hidden)
    assert torch.equal(calls.logits(state), wanted)
