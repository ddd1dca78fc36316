"""A tiny random language model with a tokenizer, in a local folder laid out as Gemma's published repositories are."""

import json
from pathlib import Path
from typing import Any

import torch

WORDS = "a red blue ball falls and bounces on the dark floor click waves birds rain over it , ."
BOS = "<bos>"
SIZES: dict[str, Any] = {
    "hidden_size": 36,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 2048,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}


def write_gemma(folder: Path, kind: str = "gemma3", seed: int = 0, **sizes: Any) -> Path:
    """Writes config, weights and tokenizer; `kind`: "gemma3", "gemma3_text" or "gemma4_unified"."""
    text = SIZES | {"vocab_size": _write_tokenizer(folder)} | sizes
    torch.manual_seed(seed)
    model = {"gemma3": _gemma3, "gemma3_text": _gemma3_text, "gemma4_unified": _gemma4}[kind](text)
    model = model.eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter, std=0.1)
        elif parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    model.save_pretrained(folder)
    return folder


def edit_config(folder: Path, **fields: Any) -> Path:
    """Replaces fields of a folder's config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return folder


def _write_tokenizer(folder: Path) -> int:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<pad>", "<eos>", BOS, "<unk>"]
    trainer = trainers.BpeTrainer(
        vocab_size=160, special_tokens=special, initial_alphabet=list("abcdefghijklmnopqrstuvwxyz")
    )
    tokenizer.train_from_iterator([WORDS] * 4, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 2)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    )
    fast.save_pretrained(folder)
    return tokenizer.get_vocab_size()


def _gemma3(text: dict[str, Any]) -> torch.nn.Module:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Gemma3TextConfig, SiglipVisionConfig

    vision = SiglipVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    config = Gemma3Config(
        text_config=Gemma3TextConfig(**_gemma3_fields(text)), vision_config=vision, mm_tokens_per_image=4
    )
    return Gemma3ForConditionalGeneration(config)


def _gemma3_text(text: dict[str, Any]) -> torch.nn.Module:
    from transformers import Gemma3TextConfig, Gemma3TextModel

    return Gemma3TextModel(Gemma3TextConfig(**_gemma3_fields(text)))


def _gemma3_fields(text: dict[str, Any]) -> dict[str, Any]:
    layers = text["num_hidden_layers"]
    types = ["full_attention" if i == layers - 1 else "sliding_attention" for i in range(layers)]
    return {"layer_types": types, "sliding_window": 1024, "query_pre_attn_scalar": 16} | text


def _gemma4(text: dict[str, Any]) -> torch.nn.Module:
    from transformers import Gemma4UnifiedConfig, Gemma4UnifiedForConditionalGeneration, Gemma4UnifiedTextConfig

    config = Gemma4UnifiedTextConfig(**text, global_head_dim=16)
    return Gemma4UnifiedForConditionalGeneration(Gemma4UnifiedConfig(text_config=config))
