"""The dual-stream transformer: mathematics only. No process groups, no configuration files, no loss."""

from ltx2_train.model.build import ModelConfig, build_model, initial_weights, transformer_config
from ltx2_train.model.config import TransformerConfig, named_config
from ltx2_train.model.connector import Connectors, TextConditioned
from ltx2_train.model.lora import fuse_lora
from ltx2_train.model.modality import Modality, Velocity
from ltx2_train.model.transformer import Transformer
from ltx2_train.model.weights import load_connectors, load_transformer, save_transformer

__all__ = [
    "Connectors",
    "Modality",
    "ModelConfig",
    "TextConditioned",
    "Transformer",
    "TransformerConfig",
    "Velocity",
    "build_model",
    "fuse_lora",
    "initial_weights",
    "load_connectors",
    "load_transformer",
    "named_config",
    "save_transformer",
    "transformer_config",
]
