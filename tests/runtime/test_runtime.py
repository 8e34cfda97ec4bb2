"""A compressed model behaves as a transformers model, however it is loaded and wherever it is moved."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from kernels import relative_rms
from processes import Processes
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import vqcompress
from vqcompress.errors import UsageError, VQCompressError
from vqcompress.model import linear as modules
from vqcompress.model.linear import CompressedLinear
from vqcompress.runtime.load import load

Make = Callable[..., Path]
IDS = torch.randint(3, 384, (2, 20), generator=torch.Generator().manual_seed(0))
RECIPES = ["mixed", "int8-runtime", "vq-2bit"]
CASES = [("mixed", "llama"), ("int8-runtime", "opt"), ("vq-small", "mixtral"), ("vq-2bit", "llama")]
MORE = [
    ("smoothquant-int8", "llama"),
    ("fp8-tile", "llama"),
    *(("vq-small", f) for f in ("qwen3", "gemma", "gpt_neox")),
]
every_case = pytest.mark.parametrize(
    ("recipe", "family"), [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE)]
)
every_recipe = pytest.mark.parametrize("recipe", RECIPES)


@torch.inference_mode()
def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    return model(ids).logits.float()


def layers(model: Any) -> list[CompressedLinear]:
    return [module for module in model.modules() if isinstance(module, CompressedLinear)]


@every_case
def test_it_is_near_its_original_and_generates(recipe: str, family: str, quantized: Make, toy: Make) -> None:
    model, exact = load(quantized(recipe, family)), logits(load(toy(family)))
    likeness = torch.corrcoef(torch.stack([exact.flatten(), logits(model).flatten()]))[0, 1].item()
    # Two bits are few for the toy's weights, which are pure noise.
    assert likeness > (0.3 if "vq" in recipe or recipe == "mixed" else 0.99)
    out = model.generate(IDS, max_new_tokens=5, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert out.shape == (2, 25)
    assert torch.equal(out[:, :20], IDS)


@every_case
def test_packed_weights_compute_what_decoded_ones_do(recipe: str, family: str, quantized: Make) -> None:
    folder = quantized(recipe, family)
    dense, packed = load(folder, cpu_weights="dense"), load(folder, cpu_weights="packed")
    # A code of an activation may be another one where sums differ in the last bit.
    assert relative_rms(logits(packed), logits(dense)) < 2e-2
    held = {layer.prepare(torch.float32)["codes"].dtype for layer in layers(packed)}
    assert held <= {torch.uint8, torch.int8, torch.float8_e4m3fn}


@every_case
def test_save_pretrained_writes_what_loads_again(recipe: str, family: str, quantized: Make, tmp_path: Path) -> None:
    folder = quantized(recipe, family)
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    assert torch.equal(logits(model.eval()), logits(load(folder)))
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(vqcompress.load(tmp_path)), logits(model))


@every_recipe
def test_a_model_moves_between_types_and_is_copied(recipe: str, quantized: Make) -> None:
    """The packed tensors stay as they are stored."""
    model = load(quantized(recipe))
    exact, twin = logits(model), copy.deepcopy(model)
    stored = {name: b.clone() for name, b in model.named_buffers() if "weight_" in name or "shared_parts" in name}
    assert stored
    found = logits(model.to(torch.bfloat16))
    assert (found - exact).square().mean() < 0.01 * exact.var()
    model.to(torch.float32)
    for name, buffer in model.named_buffers():
        assert name not in stored or (buffer.dtype == stored[name].dtype and torch.equal(buffer, stored[name])), name
        buffer.zero_()
    assert torch.equal(logits(twin), exact)
    direct = load(quantized(recipe), dtype=torch.bfloat16)
    assert (logits(direct) - exact).square().mean() < 0.01 * exact.var()


@every_recipe
def test_a_compressed_linear_multiplies_by_the_decoded_weight(recipe: str, quantized: Make) -> None:
    for module in layers(load(quantized(recipe)))[:7]:
        x = torch.randn(3, 2, module.in_features, generator=torch.Generator().manual_seed(0))
        expected, found = x @ module.decoded().T, module(x)
        assert found.shape == expected.shape
        # Some methods round activations to 8 bits.
        assert (found - expected).square().mean() < 2e-3 * expected.square().mean()
        assert module(x[:0]).shape == (0, 2, module.out_features)


# One without and one with shared parts.
@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["int8-plain", "vq-small"])
def test_a_process_without_vqcompress_fails_loudly(recipe: str, quantized: Make, processes: Processes) -> None:
    """It must not load a model with random weights."""
    code = "import sys, transformers; transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1]); print('LOADED')"
    done = processes.python(code, quantized(recipe))
    assert done.returncode != 0
    assert "ignore_mismatched_sizes" in done.stderr
    assert "LOADED" not in done.stdout


def test_left_padding_does_not_change_the_continuation(quantized: Make) -> None:
    model = load(quantized("mixed"))
    ids_BL = torch.cat([torch.cat([torch.zeros(1, 6, dtype=torch.int64), IDS[:1, :14]], 1), IDS[1:]])
    mask_BL = torch.ones(2, 20, dtype=torch.int64)
    mask_BL[0, :6] = 0
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    batch = model.generate(ids_BL, attention_mask=mask_BL, **options)
    assert batch[0, -6:].tolist() == model.generate(IDS[:1, :14], **options)[0, -6:].tolist()


@pytest.mark.parametrize("device", ["tpu", "cuda"])
def test_a_device_that_is_not_there_is_refused(device: str, quantized: Make) -> None:
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(UsageError, match=device):
        load(quantized(), device=device)


def test_a_checkpoint_with_missing_weights_is_refused(toy: Make, tmp_path: Path) -> None:
    model = load(toy())
    tensors = {name: t for name, t in model.state_dict().items() if name != "model.norm.weight"}
    model.save_pretrained(tmp_path, state_dict=tensors)
    with pytest.raises(VQCompressError, match=r"model\.norm\.weight"):
        load(tmp_path)


def test_a_tokenizer_comes_along(quantized: Make, toy: Make) -> None:
    ours, theirs = (AutoTokenizer.from_pretrained(path) for path in (quantized(), toy()))
    assert ours("river stones")["input_ids"] == theirs("river stones")["input_ids"]


def test_weights_are_decoded_once_if_that_fits_into_memory(quantized: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    for free, packed in ((1 << 40, False), (1 << 10, True)):
        monkeypatch.setattr(modules, "available_bytes", lambda free=free: free)
        assert {layer.packed for layer in layers(load(quantized()))} == {packed}
    with pytest.raises(UsageError, match="--cpu-weights some"):
        load(quantized(), cpu_weights="some")


@pytest.mark.parametrize(
    ("recipe", "cpu_weights"), [("int8-plain", "dense"), pytest.param("vq-2bit", "packed", marks=pytest.mark.slow)]
)
def test_a_compressed_model_is_one_graph_for_the_compiler(recipe: str, cpu_weights: str, quantized: Make) -> None:
    model = load(quantized(recipe), cpu_weights=cpu_weights)
    with torch.inference_mode():
        wanted = model(IDS, use_cache=False).logits
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        assert relative_rms(compiled(IDS, use_cache=False).logits, wanted) < 1e-5


def test_x_takes_gradients_also_after_generate(quantized: Make) -> None:
    found = []
    for cpu_weights in ("packed", "dense"):
        model = load(quantized("vq-2bit"), cpu_weights=cpu_weights)
        model.generate(IDS, max_new_tokens=2, do_sample=False)
        x = model.get_input_embeddings()(IDS).detach().requires_grad_()
        model(inputs_embeds=x).logits.square().mean().backward()
        found.append(x.grad)
    assert relative_rms(*found) < 1e-4
