"""Whether the readers of an artifact accept it, by its config and the headers of its tensors alone."""

from __future__ import annotations

import copy
from typing import Any

import torch

from vqcompress.errors import VQCompressError
from vqcompress.model.stream import BlockStream
from vqcompress.model.weights import Names, check_headers
from vqcompress.storage.checkpoint import TensorInfo
from vqcompress.storage.trust import reason


def check_readers(stream: BlockStream, settings: dict[str, Any] | None, tensors: dict[str, TensorInfo]) -> None:
    """Build a model without memory as `load` and `from_pretrained` do; VQCompressError naming what they would refuse.

    stream: of the checkpoint or the artifact. settings: the artifact's quantization_config, None if all is dense.
    tensors: of the artifact, by their names on disk.
    """
    # Of the text part alone where that is what the model is.
    config: Any = copy.deepcopy(stream.model.config)
    if settings is not None:
        # Memory is no question here, so no warning about it either.
        config.quantization_config = {**settings, "cpu_weights": "packed"}
    empty = {name: torch.empty(i.shape, dtype=i.dtype, device="meta") for name, i in tensors.items()}
    reader: Any = type(stream.model)
    try:
        model, report = reader.from_pretrained(
            None,
            config=config,
            state_dict=empty,
            dtype=stream.dtype,
            device_map="meta",
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except VQCompressError:
        raise
    except Exception as error:  # loaders of models raise every type of error
        raise VQCompressError(f"transformers cannot build {reader.__name__}: {reason(error)}") from error
    check_headers(model, Names(model, tensors), tensors)
    for problem in ("missing", "mismatched"):
        if found := sorted(report[f"{problem}_keys"], key=str):
            raise VQCompressError(f"{stream.source.path} does not fit its config.json: {problem} tensor {found[0]}")
