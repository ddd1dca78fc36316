"""The language model from a local folder: what it is asked, what it gives, and the folders that are refused."""

import json
import shutil
import sys

import pytest
import torch

from ltx2_train.errors import CheckpointError, ConfigError
from ltx2_train.text.gemma import Gemma, Quantisation, Tokenizer, open_gemma
from ltx2_train.weightfile import open_weights, write_weights
from tests.unit.text.tiny_gemma import edit_config, write_gemma

KINDS = ("gemma3", "gemma3_text", "gemma4_unified")
CAPTION = "a red ball falls and bounces , over the dark floor"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {kind: write_gemma(tmp_path_factory.mktemp("gemma") / kind, kind) for kind in KINDS}


@pytest.fixture(params=KINDS)
def folder(request, folders):
    return folders[request.param]


def load(folder):
    return Gemma(open_gemma(folder), dtype=torch.float32)


# --- tokens ---


def test_a_caption_is_one_bos_and_its_tokens_without_eos(folder):
    tokenizer = Tokenizer(open_gemma(folder))
    ids = tokenizer(CAPTION)
    assert ids.count(2) == 1
    assert ids[0] == 2
    assert 1 not in ids
    assert tokenizer(f"  {CAPTION}\n") == ids


@pytest.mark.parametrize("caption", ["", "  \n "])
def test_the_empty_caption_is_bos_alone(folder, caption):
    assert Tokenizer(open_gemma(folder)).cut(caption) == [2]


def test_a_long_caption_keeps_its_first_1024_tokens(folder):
    tokenizer = Tokenizer(open_gemma(folder))
    whole = tokenizer("ball " * 3000)
    assert len(whole) > 1024
    assert tokenizer.cut("ball " * 3000) == whole[:1024]


# --- hidden states ---


def test_hidden_states_are_those_of_the_whole_model_padded_to_1024(folder):
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    whole = AutoModelForCausalLM if folder.name == "gemma3_text" else AutoModelForImageTextToText
    peer = whole.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    tokens = Tokenizer(open_gemma(folder))(CAPTION)
    pads = 1024 - len(tokens)
    mask = torch.tensor([[0] * pads + [1] * len(tokens)])
    with torch.no_grad():
        padded = peer(torch.tensor([[0] * pads + tokens]), attention_mask=mask, output_hidden_states=True).hidden_states
    states, valid = load(folder).hidden_states([tokens])
    assert bool(valid.all())
    assert len(states) == len(padded) == 4
    for ours, theirs in zip(states, padded, strict=True):
        torch.testing.assert_close(ours, theirs[:, pads:], atol=5e-6, rtol=0)


def test_batch_mates_change_nothing_but_rounding(folder):
    gemma, tokenizer = load(folder), Tokenizer(open_gemma(folder))
    short, long = tokenizer("a ball"), tokenizer(f"{CAPTION} {CAPTION}")
    alone, _ = gemma.hidden_states([short])
    both, mask = gemma.hidden_states([short, long])
    assert mask.sum(dim=1).tolist() == [len(short), len(long)]
    for one, other in zip(alone, both, strict=True):
        torch.testing.assert_close(other[0, mask[0]], one[0], atol=5e-6, rtol=0)


# --- folders ---


def test_a_pipeline_folder_has_model_and_tokenizer_beside_each_other(folders, tmp_path):
    shutil.copytree(folders["gemma3"], tmp_path / "text_encoder")
    (tmp_path / "tokenizer").mkdir()
    for path in (tmp_path / "text_encoder").glob("tokenizer*"):
        path.rename(tmp_path / "tokenizer" / path.name)
    for place in (tmp_path, tmp_path / "text_encoder"):
        found = open_gemma(place)
        assert (found.path, found.tokenizer) == (tmp_path / "text_encoder", tmp_path / "tokenizer")
        assert found.fingerprint == open_gemma(folders["gemma3"]).fingerprint


def test_the_fingerprint_tells_weights_and_vocabularies_apart(folders, tmp_path):
    own = open_gemma(folders["gemma3_text"]).fingerprint
    assert open_gemma(write_gemma(tmp_path / "same", "gemma3_text")).fingerprint == own
    assert open_gemma(write_gemma(tmp_path / "other", "gemma3_text", seed=1)).fingerprint != own
    path = tmp_path / "same" / "tokenizer.json"
    path.write_text(path.read_text() + "\n")
    assert open_gemma(tmp_path / "same").fingerprint != own


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "llama"}, "model_type is 'llama'; the released text encoders are gemma3"),
        ({"model_type": None}, "model_type is 'None'"),
        ({"text_config": {}}, "not the folder of a language model .*hidden_size"),
    ],
)
def test_a_folder_of_another_kind_of_model_is_refused(folders, tmp_path, fields, message):
    shutil.copytree(folders["gemma3"], tmp_path / "g")
    with pytest.raises(CheckpointError, match=message):
        open_gemma(edit_config(tmp_path / "g", **fields))


def test_a_folder_without_model_or_tokenizer_is_refused(folders, tmp_path):
    with pytest.raises(CheckpointError, match=r"nowhere: not the folder of a language model"):
        open_gemma(tmp_path / "nowhere")
    shutil.copytree(folders["gemma3"], tmp_path / "g")
    (tmp_path / "g" / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"g: no tokenizer in it"):
        open_gemma(tmp_path / "g")


def test_a_tensor_that_is_missing_is_not_filled_with_random_numbers(folders, tmp_path):
    shutil.copytree(folders["gemma3"], tmp_path / "g")
    weights = open_weights(tmp_path / "g")
    kept = {key: stored.read() for key, stored in weights.items() if "layers.1.mlp.up_proj" not in key}
    write_weights(tmp_path / "g" / "model.safetensors", kept, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"1 tensors of the language model are missing .*layers\.1\.mlp\.up_proj"):
        load(tmp_path / "g")


def test_a_folder_of_other_sizes_than_its_weights_is_refused(folders, tmp_path):
    shutil.copytree(folders["gemma3_text"], tmp_path / "g")
    with pytest.raises(CheckpointError, match="g"):
        load(edit_config(tmp_path / "g", hidden_size=40))


def test_pickled_weights_are_not_read(folders, tmp_path):
    shutil.copytree(folders["gemma3_text"], tmp_path / "g")
    (tmp_path / "g" / "model.safetensors").unlink()
    torch.save({"embed_tokens.weight": torch.zeros(2)}, tmp_path / "g" / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="g"):
        load(tmp_path / "g")


def test_int8_without_what_it_needs_is_refused(folders):
    with pytest.raises(ConfigError, match=r"quantisation=int8: .*bitsandbytes"):
        Gemma(open_gemma(folders["gemma3_text"]), quantisation=Quantisation.INT8)


def test_a_model_that_transformers_does_not_know_is_refused_with_its_version(folders, tmp_path, monkeypatch):
    from transformers import AutoModel

    def unknown(*_, **__):
        raise ValueError("The checkpoint has model type `gemma4_unified` but Transformers does not recognize it")

    monkeypatch.setattr(AutoModel, "from_pretrained", unknown)
    with pytest.raises(CheckpointError, match=r"transformers \d.* cannot load its gemma4_unified"):
        load(folders["gemma4_unified"])


def test_the_folder_tells_what_it_calls_itself(folders, tmp_path):
    assert open_gemma(folders["gemma4_unified"]).gemma_version is None
    shutil.copytree(folders["gemma4_unified"], tmp_path / "g")
    assert open_gemma(edit_config(tmp_path / "g", gemma_version="x-1")).gemma_version == "x-1"
    assert json.loads((tmp_path / "g" / "config.json").read_text())["model_type"] == "gemma4_unified"


@pytest.mark.parametrize(("device", "placed"), [("cuda:1", {"": torch.device("cuda:1")}), ("cpu", None)])
def test_weights_go_to_a_gpu_without_a_stay_in_host_memory(folders, monkeypatch, device, placed):
    def stop(path, **options):
        asked.append(options.get("device_map"))
        raise torch.OutOfMemoryError("far enough")

    asked = []
    monkeypatch.setattr("transformers.AutoModel.from_pretrained", stop)
    with pytest.raises(torch.OutOfMemoryError):
        Gemma(open_gemma(folders["gemma3"]), device=device)
    assert asked == [placed]


def test_without_the_library_the_error_says_what_to_install(folders, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConfigError, match=r'pip install "ltx2_train\[released\]"'):
        Gemma(open_gemma(folders["gemma3"]))
