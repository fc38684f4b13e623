"""The tensor names of models that see: those in the files, and those of the parameter table."""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from weights_io.config import ModelConfig
from weights_io.files.tensor import LazyTensor
from weights_io.vision.config import NAMES

# Tensors that timm's EVA02-E has and OmniLMM never reads: its last block, which the original replaces by an identity,
# the classifier, and the bias of the keys, which is zero.
UNUSED = re.compile(r"vpm\.(head|fc_norm)\.(weight|bias)|vpm\.blocks\.\d+\.attn\.k_bias")


def in_table_names(tensors: Mapping[str, LazyTensor], config: ModelConfig) -> dict[str, LazyTensor]:
    """The tensors of a folder under the names of the parameter table; those that the model never reads are left out."""
    vision = config.vision
    if vision is None:
        return dict(tensors)
    found = {table_name(name, config): tensor for name, tensor in tensors.items()}
    last = f"vpm.blocks.{vision.num_hidden_layers}."
    return {name: tensor for name, tensor in found.items() if not (name.startswith(last) or UNUSED.fullmatch(name))}


def with_stored_queries(config: ModelConfig, raw: Mapping[str, Any], tensors: Mapping[str, LazyTensor]) -> ModelConfig:
    """The config with as many queries as the files hold, where config.json (``raw``) does not state their number."""
    vision, query = config.vision, tensors.get("resampler.query")
    if vision is None or query is None or raw.get(NAMES[config.model_type][2]) is not None or len(query.shape) != 2:
        return config
    return replace(config, vision=replace(vision, num_queries=query.shape[0]))


def table_name(name: str, config: ModelConfig) -> str:
    """The name in the parameter table of a tensor in the files."""
    for stored, known in config.family.renames:
        if name.startswith(stored):
            return known + name.removeprefix(stored)
    return name


def file_name(name: str, config: ModelConfig) -> str:
    """The name in the files of a tensor of the parameter table."""
    for stored, known in config.family.renames:
        if known and name.startswith(known):
            return stored + name.removeprefix(known)
    whole = next((stored for stored, known in config.family.renames if not known), "")
    return name if name.startswith(("vpm.", "resampler.")) else whole + name
