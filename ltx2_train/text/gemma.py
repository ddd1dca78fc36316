"""The language model of the released text encoders: Gemma 3, or the Gemma 4 form of 2.5, through transformers.

It is read from a local folder. Only the language model runs, not the vision tower and not the head. Nothing is downloaded,
and no pickle is read.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ltx2_train.errors import CheckpointError, ConfigError
from ltx2_train.text.encoder import MAX_ROWS
from ltx2_train.weightfile import open_weights

GEMMA_3 = ("gemma3", "gemma3_text")
GEMMA_4 = ("gemma4_unified", "gemma4_unified_text")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")


class Quantisation(StrEnum):
    """Of the language model's weights."""

    NONE = "none"
    INT8 = "int8"


@dataclass(frozen=True)
class GemmaFolder:
    """What a local folder says of its language model, before any weight is read."""

    path: Path  # of the weights and their config.json
    tokenizer: Path
    config: dict[str, Any]

    @property
    def model_type(self) -> str:
        return str(self.config["model_type"])

    @property
    def hidden_size(self) -> int:
        return int(self._text["hidden_size"])

    @property
    def num_states(self) -> int:
        """Hidden states of a token: the embedding and one behind each layer."""
        return int(self._text["num_hidden_layers"]) + 1

    @property
    def gemma_version(self) -> str | None:
        """What the folder calls itself; None where it does not."""
        found = self.config.get("gemma_version", self._text.get("gemma_version"))
        return None if found is None else str(found)

    @property
    def _text(self) -> dict[str, Any]:
        return self.config.get("text_config", self.config)

    @cached_property
    def fingerprint(self) -> str:
        """Of weights and tokenizer: headers, the first 4 KiB of every tensor of a single file, and the vocabulary."""
        digest = hashlib.sha256(open_weights(self.path).fingerprint.encode())
        for name in TOKENIZER_FILES:
            if (self.tokenizer / name).exists():
                digest.update((self.tokenizer / name).read_bytes())
        return digest.hexdigest()


def open_gemma(folder: str | Path) -> GemmaFolder:
    """The folder of a language model, or the diffusers pipeline folder that has it as `text_encoder` beside `tokenizer`.

    Raises `CheckpointError` when it is none, or holds another kind of model.
    """
    folder = Path(folder)
    model = folder / "text_encoder" if (folder / "text_encoder" / "config.json").exists() else folder
    places = (model, folder / "tokenizer", model.parent / "tokenizer")
    tokenizer = next((p for p in places if any((p / name).exists() for name in TOKENIZER_FILES)), None)
    try:
        found = GemmaFolder(model, tokenizer or model, json.loads((model / "config.json").read_bytes()))
        _check_kind(found)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{folder}: not the folder of a language model ({error!r}). Give a local copy of the Gemma repository, with "
            "config.json, *.safetensors and tokenizer files"
        ) from error
    if tokenizer is None:
        raise CheckpointError(
            f"{folder}: no tokenizer in it ({' or '.join(TOKENIZER_FILES)}). Copy the whole repository"
        )
    return found


def _check_kind(folder: GemmaFolder) -> None:
    if folder.model_type not in GEMMA_3 + GEMMA_4:
        known = ", ".join(GEMMA_3 + GEMMA_4)
        raise CheckpointError(
            f"{folder.path}: model_type is {folder.model_type!r}; the released text encoders are {known}"
        )
    assert folder.hidden_size > 0 < folder.num_states, "read here, so that a folder without them is refused"


class Gemma:
    """A language model in memory: token ids to the hidden states of all layers."""

    def __init__(
        self,
        folder: GemmaFolder,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.bfloat16,
        quantisation: Quantisation = Quantisation.NONE,
    ) -> None:
        self.folder, self.device = folder, torch.device(device)
        self.model = _load(folder, self.device, dtype, quantisation)

    @torch.no_grad()
    def hidden_states(self, tokens: Sequence[Sequence[int]]) -> tuple[tuple[Tensor, ...], Tensor]:
        """(B, L, D) of the embedding and behind each layer, the last one normed, and the mask (B, L), 1 = text.

        Shorter captions are padded on the left to the longest of the batch, and the text has the last of 1024 positions:
        the released models pad to 1024 tokens, and what they compute in the padding reaches nothing.
        """
        length = max(map(len, tokens))
        ids = torch.zeros(len(tokens), length, dtype=torch.long)  # what stands in the padding is never attended
        mask = torch.zeros(len(tokens), length, dtype=torch.long)
        for row, caption in enumerate(tokens):
            ids[row, length - len(caption) :] = torch.tensor(caption)
            mask[row, length - len(caption) :] = 1
        ids, mask = ids.to(self.device), mask.to(self.device)
        positions = torch.arange(MAX_ROWS - length, MAX_ROWS, device=self.device)[None]
        output = self.model(
            input_ids=ids, attention_mask=mask, position_ids=positions, output_hidden_states=True, use_cache=False
        )
        assert len(output.hidden_states) == self.folder.num_states, "transformers gave another number of hidden states"
        return output.hidden_states, mask.bool()


class Tokenizer:
    """Captions to token ids as the released models read them: one leading BOS, no EOS, no template."""

    def __init__(self, folder: GemmaFolder) -> None:
        with _errors_of(folder):
            from transformers import AutoTokenizer

            self._tokenizer = AutoTokenizer.from_pretrained(folder.tokenizer, local_files_only=True)
        self._bos = self._tokenizer.bos_token_id
        if self._bos is None:
            raise CheckpointError(f"{folder.tokenizer}: its tokenizer has no BOS token; this is not Gemma's tokenizer")

    def __call__(self, caption: str) -> list[int]:
        """All ids of a caption; the empty one is BOS alone."""
        ids = self._tokenizer(caption.strip(), add_special_tokens=False, verbose=False)["input_ids"]
        return [self._bos, *ids]

    def cut(self, caption: str) -> list[int]:
        """The ids that the language model is given: the first `MAX_ROWS`."""
        return self(caption)[:MAX_ROWS]


def _load(folder: GemmaFolder, device: torch.device, dtype: torch.dtype, quantisation: Quantisation) -> Any:
    """The language model alone, whole: transformers fills what is missing with random numbers and says so in its report."""
    options: dict[str, Any] = {"dtype": dtype, "local_files_only": True, "use_safetensors": True}
    if quantisation is Quantisation.INT8:
        options |= _int8(device)
    elif device.type == "cuda":  # tensor by tensor: several processes would not find room for the whole in host memory
        options["device_map"] = {"": device}
    with _errors_of(folder):
        from transformers import AutoModel

        model, report = AutoModel.from_pretrained(folder.path, output_loading_info=True, **options)
    wrong = sorted(map(str, (*report["missing_keys"], *report["mismatched_keys"])))
    wrong = [key for key in wrong if "vision" not in key and "audio" not in key and "multi_modal" not in key]
    if wrong:
        raise CheckpointError(
            f"{folder.path}: {len(wrong)} tensors of the language model are missing or misshapen, the first is {wrong[0]}. "
            "Copy the folder again"
        )
    model = getattr(model, "language_model", model)
    return (model if quantisation is Quantisation.INT8 else model.to(device)).eval().requires_grad_(False)


def _int8(device: torch.device) -> dict[str, Any]:
    from importlib.util import find_spec

    if find_spec("bitsandbytes") is None or device.type != "cuda":
        found = "bitsandbytes is not installed" if find_spec("bitsandbytes") is None else f"the device is {device}"
        raise ConfigError(
            f"quantisation=int8: {found}; it needs a CUDA device and `pip install bitsandbytes`. Or give quantisation=none"
        )
    from transformers import BitsAndBytesConfig

    return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True), "device_map": {"": device}}


@contextmanager
def _errors_of(folder: GemmaFolder) -> Iterator[None]:
    """Names the folder in what transformers raises."""
    try:
        yield
    except ImportError as error:
        raise ConfigError(
            f'the released text encoder needs transformers ({error}): pip install "ltx2_train[released]"'
        ) from error
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        import transformers

        raise CheckpointError(
            f"{folder.path}: transformers {transformers.__version__} cannot load its {folder.model_type} ({error}). "
            "Copy the whole repository, or update transformers"
        ) from error
