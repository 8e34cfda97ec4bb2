"""A model's blocks are found by what they are: the decoder's list of layers, however large anything beside it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from vqcompress.errors import VQCompressError
from vqcompress.model.stream import BlockStream
from vqcompress.model.targets import find_blocks
from vqcompress.model.weights import skeleton
from vqcompress.storage.checkpoint import Checkpoint

COMMON: dict[str, Any] = {"vocab_size": 384, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
GATED = {**COMMON, "intermediate_size": 128, "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0}
# Its tower has more layers and more parameters than the text part.
TOWER = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4,
         "image_size": 28, "patch_size": 14}  # fmt: skip
ALTUP = {"altup_num_inputs": 4, "hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 384, "laurel_rank": 8,
         "layer_types": ["full_attention"] * 3, "num_kv_shared_layers": 0, "intermediate_size": [128] * 3,
         "activation_sparsity_pattern": [0.0] * 3}  # fmt: skip
EXPERTS = {"num_local_experts": 3, "num_experts_per_tok": 1}
LATENT = {"ffn_hidden_size": 128, "expert_ffn_hidden_size": 32, "n_routed_experts": 3, "zero_expert_num": 1,
          "moe_topk": 1, "q_lora_rank": 24, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16,
          "v_head_dim": 16, "head_dim": 8, "num_key_value_heads": 4, "num_hidden_layers": 6}  # fmt: skip
# Config class, its fields, and where its blocks are.
MODELS: list[tuple[str, dict[str, Any], str]] = [
    ("Gemma3Config", {"text_config": GATED, "vision_config": TOWER}, "model.language_model.layers"),
    ("LlavaConfig", {"text_config": {"model_type": "llama", **GATED}, "vision_config": {
        "model_type": "clip_vision_model", **TOWER, "projection_dim": 64}}, "model.language_model.layers"),
    ("Gemma3nTextConfig", {**GATED, **ALTUP}, "model.layers"),
    ("OlmoConfig", GATED, "model.layers"),
    ("MptConfig", {"vocab_size": 384, "d_model": 64, "n_layers": 3, "n_heads": 4}, "transformer.blocks"),
    ("MixtralConfig", {**GATED, **EXPERTS}, "model.layers"),
    ("ModernBertDecoderConfig", {**COMMON, "intermediate_size": 128, "pad_token_id": 0}, "model.layers"),
    ("LongcatFlashConfig", {**GATED, **LATENT}, "model.layers"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "fields", "path"), MODELS, ids=[name for name, _, _ in MODELS])
def test_the_blocks_are_the_decoders(name: str, fields: dict[str, Any], path: str) -> None:
    model = skeleton(getattr(transformers, name)(**fields), torch.float32)
    found, layers = find_blocks(model)
    assert (found, len(layers)) == (path, 3)


@pytest.mark.parametrize(("name", "lists"), [("HrmTextConfig", "L_module.layers"), ("XLMConfig", "attentions")])
def test_a_decoder_of_several_lists_is_refused_by_their_names(name: str, lists: str) -> None:
    fields = {"emb_dim": 64, "n_layers": 2, "n_heads": 4} if name == "XLMConfig" else GATED
    with pytest.raises(VQCompressError, match=lists):
        find_blocks(skeleton(getattr(transformers, name)(**fields), torch.float32))


def test_a_model_that_calls_a_block_twice_runs_as_a_whole(tmp_path: Path) -> None:
    config = transformers.DoryConfig(**GATED, n_input_layers=1, n_output_layers=1)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(tmp_path)
    stream = BlockStream(Checkpoint(tmp_path), torch.device("cpu"), torch.float32)
    ids_BL = torch.arange(8)[None]
    with pytest.raises(VQCompressError, match="DoryForCausalLM"):
        stream.embed(ids_BL)
    with torch.no_grad():
        torch.testing.assert_close(stream.whole(ids_BL), model(ids_BL).logits)
