"""vLLM's layers, faked from the signatures of its own, compute with the plugin what our runtime computes."""

from __future__ import annotations

import importlib
import inspect
import sys
import tomllib
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import fake_vllm
import pytest
import torch
from conftest import ROOT
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig

from vqcompress.errors import VQCompressError
from vqcompress.runtime.load import load
from vqcompress.storage.artifact import Artifact

Make = Callable[..., Path]
# Every projection of a merged layer stored in another way, some dense.
DIFFERENT = """rules:
  - {match: "*.q_proj", method: vq, d: 2, bits: 4, iterations: 2, codebook_updates: 0}
  - {match: "*.v_proj", method: int8, smoothing: {alpha: 0.5, norm: runtime}}
  - {match: "re:.*(gate|down)_proj", method: fp8}
  - {match: "*", method: keep}
"""
MERGED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
# As in vLLM's llama.py and opt.py.
STACKED = {
    ".q_proj": (".qkv_proj", "q"),
    ".k_proj": (".qkv_proj", "k"),
    ".v_proj": (".qkv_proj", "v"),
    ".gate_proj": (".gate_up_proj", 0),
    ".up_proj": (".gate_up_proj", 1),
}


@pytest.fixture
def plugin() -> Iterator[Any]:
    """The plugin's module, on the fake of vLLM."""
    with pytest.MonkeyPatch.context() as patch:
        fake_vllm.install(patch)
        patch.setattr(fake_vllm, "CUSTOMIZED", {})
        patch.delitem(sys.modules, "vqcompress.runtime.vllm", raising=False)
        yield importlib.import_module("vqcompress.runtime.vllm")
        sys.modules.pop("vqcompress.runtime.vllm", None)


class Inner(nn.Module):
    """A model without its head. loop: loads with the loop of older models of vLLM, not with its AutoWeightsLoader."""

    def __init__(self, quant_config: Any, loop: bool):
        super().__init__()
        self.quant_config, self.loop = quant_config, loop

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> Iterable[str]:
        if not self.loop:
            mapper = fake_vllm.WeightsMapper(orig_to_new_stacked=STACKED)
            return fake_vllm.AutoWeightsLoader(self).load_weights(weights, mapper=mapper)
        parameters, loaded = dict(self.named_parameters()), set()
        for name, tensor in weights:
            for part, (merged, shard) in STACKED.items():
                if part in name:
                    name = name.replace(part, merged)
                    parameters[name].weight_loader(parameters[name], tensor, shard)
                    break
            else:
                parameters[name].weight_loader(parameters[name], tensor)
            loaded.add(name)
        return loaded


def vllm_model(plugin: Any, folder: Path, loop: bool = False, dtype: torch.dtype = torch.float32) -> nn.Module:
    """What vLLM builds from an artifact and loads: our model's tree, with vLLM's layers for its linear ones."""
    plugin.register()
    hf_config = AutoConfig.from_pretrained(folder)
    config = fake_vllm.CUSTOMIZED["vqcompress"].from_config(hf_config.quantization_config)
    config.maybe_update_config(str(folder), hf_config=hf_config)
    config.apply_vllm_mapper(fake_vllm.WeightsMapper(orig_to_new_stacked=STACKED).get_rename_mapper())
    config.packed_modules_mapping.update(MERGED)
    root, shapes = nn.Module(), Artifact(folder).tensors
    root.model = Inner(config, loop)
    for name, info in shapes.items():
        path, _, leaf = name.rpartition(".")
        if leaf in ("weight", "bias") and path not in layers_of(folder):
            parameter = nn.Parameter(torch.empty(info.shape))
            parameter.weight_loader = lambda parameter, loaded: parameter.data.copy_(loaded)
            module_at(root, path).register_parameter(leaf, parameter)
    for prefix, parts in vllm_layers(folder).items():
        kind = {"qkv_proj": fake_vllm.QKVParallelLinear, "gate_up_proj": fake_vllm.MergedColumnParallelLinear}
        layers, (parent, _, leaf) = layers_of(folder), prefix.rpartition(".")
        outputs, bias = [layers[part].out_features for part in parts], layers[parts[0]].bias is not None
        made = kind.get(leaf, fake_vllm.RowParallelLinear)(
            layers[parts[0]].in_features, outputs, bias, dtype, config, prefix
        )
        setattr(module_at(root, parent), leaf, made)
    fake_vllm.AutoWeightsLoader(root).load_weights(tensors_of(folder))
    for module in root.modules():
        if isinstance(getattr(module, "quant_method", None), fake_vllm.QuantizeMethodBase):
            module.quant_method.process_weights_after_loading(module)
    return root


def layers_of(folder: Path, kept: dict[Path, dict[str, Any]] = {}) -> dict[str, Any]:  # noqa: B006
    """The linear layers of the blocks of our model, by path; loaded once."""
    if folder not in kept:
        modules = load(folder).named_modules()
        kept[folder] = {n: m for n, m in modules if ".layers." in n and hasattr(m, "in_features")}
    return kept[folder]


def vllm_layers(folder: Path) -> dict[str, list[str]]:
    """vLLM's layers by prefix → the projections that each of them merges."""
    merged = {part: whole for whole, parts in MERGED.items() for part in parts}
    found: dict[str, list[str]] = {}
    for path in layers_of(folder):
        parent, _, leaf = path.rpartition(".")
        found.setdefault(f"{parent}.{merged.get(leaf, leaf)}", []).append(path)
    order = [part for parts in MERGED.values() for part in parts]
    return {
        n: sorted(p, key=lambda path: [*order, path.split(".")[-1]].index(path.split(".")[-1]))
        for n, p in found.items()
    }


def module_at(root: nn.Module, path: str) -> nn.Module:
    """The module at a path, made with those on the way."""
    for name in path.split("."):
        if name not in root._modules:
            root.add_module(name, nn.Module())
        root = root.get_submodule(name)
    return root


def tensors_of(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of an artifact, as vLLM's iterator gives them."""
    for file in sorted({info.file for info in Artifact(folder).tensors.values()}):
        with safe_open(folder / file, "pt") as shard:
            for name in shard.keys():  # noqa: SIM118
                yield name, shard.get_tensor(name)


# Recipe, family, and whether vLLM's older loop loads it. opt has biases; vq-small shares parts; vq-2bit is rotated.
CASES = [
    ("int8-plain", "opt", False),
    ("vq-small", "llama", True),
    (DIFFERENT, "llama", False),
    pytest.param("vq-2bit", "llama", False, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("recipe", "family", "loop"), CASES, ids=["bias", "shared", "different", "rotated"])
def test_every_layer_computes_what_ours_does(
    recipe: str, family: str, loop: bool, plugin: Any, quantized: Make
) -> None:
    folder = quantized(recipe, family)
    model, ours, compressed = vllm_model(plugin, folder, loop), layers_of(folder), 0
    for prefix, parts in vllm_layers(folder).items():
        layer = model.get_submodule(prefix)
        if layer.bias is not None:
            # Those of the toy are 0.
            layer.bias.data.normal_()
            for part, bias in zip(parts, layer.bias.split(layer.output_partition_sizes), strict=True):
                ours[part].bias.data.copy_(bias)
        x = torch.randn(5, ours[parts[0]].in_features, generator=torch.Generator().manual_seed(0))
        found, none = layer(x)
        assert none is None
        torch.testing.assert_close(found, torch.cat([ours[part](x) for part in parts], -1).detach(), atol=0, rtol=0)
        compressed += isinstance(layer.quant_method, plugin.VQCompressLinear)
    assert compressed == (4 if recipe != DIFFERENT else 3) * 2


def test_vllm_finds_the_plugin(plugin: Any) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    ((name, target),) = project["entry-points"]["vllm.general_plugins"].items()
    EntryPoint(name, target, "vllm.general_plugins").load()()
    assert {"vqcompress": plugin.VQCompressConfig} == fake_vllm.CUSTOMIZED


def test_a_plugin_without_vllm_is_an_import_error_that_vllm_reports() -> None:
    """Nothing of ours imports it; vLLM catches and logs what `EntryPoint.load` raises."""
    with pytest.raises(ModuleNotFoundError, match="vllm"):
        importlib.import_module("vqcompress.runtime.vllm")


def test_what_the_plugin_overrides_has_the_signatures_of_vllm(plugin: Any) -> None:
    pairs = [
        (plugin.VQCompressConfig, fake_vllm.QuantizationConfig),
        (plugin.VQCompressLinear, fake_vllm.LinearMethodBase),
    ]
    for ours, theirs in pairs:
        overridden = [name for name in vars(ours) if hasattr(theirs, name) and inspect.isroutine(getattr(ours, name))]
        assert len(overridden) >= 3
        for name in set(overridden) - {"__init__"}:
            found, wanted = (inspect.signature(getattr(cls, name)).parameters.values() for cls in (ours, theirs))
            shape = [
                [(p.name, p.kind, p.default) for p in parameters if p.name != "self"] for parameters in (found, wanted)
            ]
            assert shape[0] == shape[1], name
        assert not ours.__abstractmethods__


def test_a_tensor_parallel_layer_is_refused(plugin: Any, quantized: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fake_vllm.LinearBase, "tp_size", 2)
    with pytest.raises(VQCompressError, match=r"qkv_proj is stored as .*--tensor-parallel-size 1"):
        vllm_model(plugin, quantized("int8-plain"))


def test_experts_and_fused_queries_are_refused_by_name(plugin: Any, quantized: Make) -> None:
    config = Artifact(quantized("int8-plain", "mixtral")).config["quantization_config"]
    with pytest.raises(VQCompressError, match=r"layers\.0\.mlp\.experts\.0\.\w+: .* in vLLM; .*--format fp8"):
        plugin.VQCompressConfig.from_config(config)
    config = Artifact(quantized("int8-plain", "gpt_neox")).config["quantization_config"]
    name = "gpt_neox.layers.0.attention.query_key_value"
    with pytest.raises(VQCompressError, match=f"{name}: queries, keys and values are one"):
        fake_vllm.QKVParallelLinear(
            64, [64] * 3, True, torch.float32, plugin.VQCompressConfig.from_config(config), name
        )


def test_a_checkpoint_that_lacks_or_bends_a_part_is_refused(
    plugin: Any, quantized: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, stored = quantized("vq-small"), tensors_of

    def without(name: str) -> None:
        monkeypatch.setattr(sys.modules[__name__], "tensors_of", lambda at: (t for t in stored(at) if name not in t[0]))

    without("layers.1.shared_parts")
    with pytest.raises(VQCompressError, match=r"layers\.1\.self_attn\.qkv_proj: the checkpoint has no weight_codebook"):
        vllm_model(plugin, folder)
    monkeypatch.setattr(
        sys.modules[__name__],
        "tensors_of",
        lambda at: ((n, t[:-1] if "k_proj.weight_codes" in n else t) for n, t in stored(at)),
    )
    with pytest.raises(VQCompressError, match=r"qkv_proj: weight_codes of shard 'k' is \(31, "):
        vllm_model(plugin, folder)
