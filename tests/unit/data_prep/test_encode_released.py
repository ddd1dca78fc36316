"""Raw shards through released components on disk: what a dataset holds and says of them, and what is refused."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from data_prep import codec_choice
from data_prep import encode as encode_module
from data_prep.buckets import parse_buckets
from data_prep.encode import encode, main
from data_prep.encode_config import Dtype, EncodeConfig, choice_of, settings_of
from data_prep.tars import write_tar
from ltx2_train.codecs import build_audio_codec, build_video_codec
from ltx2_train.data.datasets import check_compatible, check_mixture, open_dataset
from ltx2_train.errors import CheckpointError, ConfigError, DataError
from ltx2_train.model.weights import load_connectors
from ltx2_train.record import Sample, TextCache
from ltx2_train.testing.released import write_release
from ltx2_train.text import build_text_encoder
from ltx2_train.weightfile import open_weights, write_weights
from tests.unit.text.tiny_gemma import edit_config, write_gemma

CAPTIONS = {"a": "a red ball falls", "b": "waves", "c": "", "d": "a red ball falls", "e": "ball " * 3000}


@pytest.fixture(scope="module")
def releases(tmp_path_factory):
    directory = tmp_path_factory.mktemp("releases")
    return {name: write_release(directory, name) for name in ("2.0", "2.3", "2.5")}


@pytest.fixture(scope="module")
def gemmas(tmp_path_factory):
    folder = write_gemma(tmp_path_factory.mktemp("gemma") / "gemma3")
    tuned = write_gemma(tmp_path_factory.mktemp("gemma") / "gemma4", "gemma4_unified")
    edit_config(tuned, gemma_version="gemma4-12b-ltx-v1")
    return {"2.0": folder, "2.3": folder, "2.5": tuned}


@pytest.fixture(scope="module")
def shard(clip, tmp_path_factory):
    """Clips with and without words, two of them with the same ones."""
    path = tmp_path_factory.mktemp("raw") / "shard.tar"
    write_tar(path, {key: {"mp4": clip.read_bytes(), "txt": text.encode()} for key, text in CAPTIONS.items()}.items())
    return str(path)


@pytest.fixture(scope="module")
def released(releases, gemmas):
    """A function of a generation that gives the configuration with all its components."""

    def configure(generation: str, **fields) -> EncodeConfig:
        release = releases[generation]
        return EncodeConfig(
            buckets=parse_buckets("32x32x17"),
            video_codec=str(release.video_vae),
            audio_codec=str(release.audio_vae),
            text_encoder=str(gemmas[generation]),
            text_weights=str(release.text_projection),
            connectors=str(release.transformer),
            **{"dtype": Dtype.FP32} | fields,
        )

    return configure


@pytest.fixture(scope="module")
def encoded(shard, released, tmp_path_factory):
    """A function of a generation and a cache that gives the directory of the clips encoded so, once."""
    directories: dict[tuple[str, TextCache], Path] = {}

    def directory(generation: str, cache: TextCache = TextCache.FEATURES) -> Path:
        if (generation, cache) not in directories:
            directories[generation, cache] = tmp_path_factory.mktemp("encoded")
            encode([shard], directories[generation, cache], released(generation, text_cache=cache))
        return directories[generation, cache]

    return directory


def samples(directory) -> dict[str, Sample]:
    dataset = open_dataset(directory)
    return {sample.key: sample for sample in (dataset.read(i) for i in range(len(dataset)))}


@pytest.mark.parametrize("generation", ["2.0", "2.3", "2.5"])
def test_a_dataset_of_released_components_opens_and_names_them(releases, gemmas, released, encoded, generation):
    config, directory = released(generation), encoded(generation) / "train"
    dataset, found = open_dataset(directory), samples(directory)
    text = build_text_encoder(config.text_encoder, weights=config.text_weights)
    manifest = dataset.manifest
    assert manifest.counts["kept"] == len(found) == len(CAPTIONS)
    assert manifest.video_codec == build_video_codec(config.video_codec).name
    assert manifest.audio_codec == build_audio_codec(config.audio_codec).name
    assert (manifest.text_encoder, manifest.text_cache) == (text.name, "features")
    assert (manifest.video_text_width, manifest.audio_text_width) == (text.video_width, text.audio_width)
    assert manifest.settings["paths"] == {
        "video_codec": str(releases[generation].video_vae),
        "audio_codec": str(releases[generation].audio_vae),
        "text_encoder": str(gemmas[generation]),
        "text_weights": str(releases[generation].text_projection),
        "connectors": str(releases[generation].transformer),
    }
    for sample in found.values():
        assert (sample.video.shape, sample.audio.shape) == ((128, 3, 1, 1), (8, 18, 16))
        assert len(sample.text.video) == text.num_rows(sample.caption)
    [null, words] = text.encode(["", CAPTIONS["a"]])
    torch.testing.assert_close(dataset.null_text.video, null.video, atol=2e-5, rtol=0)
    torch.testing.assert_close(found["d"].text.video, words.video, atol=2e-5, rtol=0)
    assert torch.equal(found["a"].text.audio, found["d"].text.audio)


def test_captions_over_1024_tokens_are_kept_counted_and_named(encoded):
    directory = encoded("2.3")
    [row] = [json.loads(line) for line in (directory / "dropped.jsonl").read_text().splitlines()]
    assert (row["file"], row["reason"]) == ("e", "caption_cut")
    assert open_dataset(directory / "train").manifest.counts["caption_cut"] == 1
    assert len(samples(directory / "train")["e"].text.video) == 1024


def test_captions_are_encoded_together_and_the_same_one_once(shard, tmp_path, released, monkeypatch):
    from ltx2_train.text import ReleasedTextEncoder

    asked, encode_text = [], ReleasedTextEncoder.encode
    monkeypatch.setattr(
        ReleasedTextEncoder,
        "encode",
        lambda self, captions: (asked.append(list(captions)), encode_text(self, captions))[1],
    )
    encode([shard], tmp_path, released("2.3"))
    assert asked == [[text.strip() for text in ("a red ball falls", "waves", "", CAPTIONS["e"])], [""]]


def test_chunks_of_frames_give_the_same_latents(shard, tmp_path, released, encoded):
    encode([shard], tmp_path, released("2.3", chunk_frames=8))
    chunks = samples(tmp_path / "train")
    for key, sample in samples(encoded("2.3") / "train").items():
        torch.testing.assert_close(chunks[key].video, sample.video, atol=1e-5, rtol=0)


# --- contexts ---


def text_of(directory: Path) -> tuple[str, str]:
    """What a dataset's manifest says of its text."""
    manifest = open_dataset(directory).manifest
    return manifest.text_encoder, manifest.text_cache


def test_stored_contexts_are_what_the_connectors_make_of_stored_features(releases, encoded):
    directories = [encoded("2.5", cache) / "train" for cache in (TextCache.FEATURES, TextCache.CONTEXT)]
    features, contexts = map(samples, directories)
    names, caches = zip(*map(text_of, directories), strict=True)
    assert caches == ("features", "context")
    assert names[1].startswith(f"{names[0]}+connectors:")
    connectors = load_connectors(releases["2.5"].transformer, dtype=torch.float32)
    for key, sample in features.items():
        rows = sample.text.video[None], sample.text.audio[None]
        with torch.no_grad():
            video, audio = connectors(*rows, None, 1024)
        assert torch.equal(contexts[key].text.video, video[0])
        assert torch.equal(contexts[key].text.audio, audio[0])


def test_features_and_contexts_do_not_mix(shard, released, encoded):
    directories = [encoded("2.5", cache) for cache in (TextCache.FEATURES, TextCache.CONTEXT)]
    datasets = [open_dataset(directory / "train") for directory in directories]
    with pytest.raises(DataError, match="was encoded with text_encoder"):
        check_mixture(datasets)
    with pytest.raises(DataError, match=r"was encoded with text_cache context; the model has text_cache features"):
        check_compatible("clips", datasets[1].manifest, text_cache="features")
    with pytest.raises(ConfigError, match=r"text_cache: features there, context now"):
        encode([shard], directories[0], released("2.5", text_cache=TextCache.CONTEXT))


def test_connectors_of_another_generation_are_refused_naming_both(shard, tmp_path, releases, released):
    config = released("2.3", text_cache=TextCache.CONTEXT)
    with pytest.raises(CheckpointError, match=r"widths \(36, 36\), the text encoder gemma3:.* gives \(40, 20\)"):
        encode([shard], tmp_path, replace(config, connectors=str(releases["2.0"].transformer)))


def test_a_file_without_connectors_is_refused_before_anything_is_written(shard, tmp_path, releases, released):
    stored = open_weights(releases["2.5"].transformer)
    bare = {key: tensor for key, tensor in stored.items() if "_connector." not in key}
    write_weights(tmp_path / "bare.safetensors", bare, {"config": json.dumps(stored.config())})
    config = released("2.5", text_cache=TextCache.CONTEXT)
    with pytest.raises(CheckpointError, match=r"bare\.safetensors: no text connectors in it"):
        encode([shard], tmp_path / "out", replace(config, connectors=str(tmp_path / "bare.safetensors")))
    assert not (tmp_path / "out").exists()


def test_the_program_states_both_sizes_as_they_are(shard, tmp_path, capsys, releases, gemmas, encoded):
    release = releases["2.3"]
    options = [f"--video-codec={release.video_vae}", f"--audio-codec={release.audio_vae}", "--dtype=fp16"]
    options += [f"--text-encoder={gemmas['2.3']}", f"--text-weights={release.text_projection}", "--workers=1"]
    main([shard, f"--out={tmp_path}", "--buckets=32x32x17", "--text-cache=context", *options])
    texts = [sample.text for sample in samples(tmp_path / "train").values()]
    assert {text.video.dtype for text in texts} == {torch.float16}
    stored = sum(text.video.nbytes + text.audio.nbytes for text in texts)
    rows = sum(len(sample.text.video) for sample in samples(encoded("2.3") / "train").values())
    assert stored == len(texts) * 1024 * (40 + 20) * 2
    printed = capsys.readouterr().out
    assert f"text as context (stored): {stored:,} bytes, {stored // len(texts):,} per caption" in printed
    assert f"text as features (not chosen; it would be): {rows * (40 + 20) * 2:,} bytes" in printed


# --- what does not fit ---


def test_what_the_text_encoder_computes_in_belongs_to_the_dataset(released):
    codecs = codec_choice.build_codecs(choice_of(released("2.3")))
    on_cpu, on_gpu = (settings_of(replace(released("2.3"), device=d), codecs) for d in ("cpu", "cuda:1"))
    assert (on_cpu["text_dtype"], on_gpu["text_dtype"]) == ("fp32", "bf16")
    chosen = choice_of(replace(released("2.3"), device="cuda:1"))
    assert (chosen.text_dtype, chosen.video_dtype) == (torch.bfloat16, torch.bfloat16)
    assert codecs.text.dtype == torch.float32
    embedded = choice_of(EncodeConfig(buckets=parse_buckets("32x32x17"), device="cuda"))
    assert embedded.text_dtype is None


def test_text_of_another_dtype_is_refused(shard, released, encoded, monkeypatch):
    directory = encoded("2.3")
    monkeypatch.setattr(EncodeConfig, "text_dtype", Dtype.BF16)
    with pytest.raises(ConfigError, match=r"other settings \(text_dtype: fp32 there, bf16 now\)"):
        encode([shard], directory, released("2.3"))


def test_shards_of_another_video_codec_are_refused(shard, releases, released, encoded):
    with pytest.raises(ConfigError, match=r"begun with other settings \(video_codec: ltx2-video-.* now\)"):
        encode([shard], encoded("2.3"), replace(released("2.3"), video_codec=str(releases["2.0"].video_vae)))


def test_the_same_files_at_another_place_go_on(shard, tmp_path, releases, released, encoded):
    directory = encoded("2.3")
    moved = tmp_path / "moved.safetensors"
    moved.symlink_to(releases["2.3"].transformer)
    before = (directory / ".shards" / "shard.json").stat().st_mtime_ns
    fields = ("video_codec", "audio_codec", "text_weights", "connectors")
    encode([shard], directory, replace(released("2.3"), **dict.fromkeys(fields, str(moved))))
    assert (directory / ".shards" / "shard.json").stat().st_mtime_ns == before


def test_a_language_model_of_another_version_is_refused_before_anything_is_written(shard, tmp_path, gemmas, released):
    with pytest.raises(CheckpointError, match=r"gemma3', and .*gemma4-12b-ltx-v1"):
        encode([shard], tmp_path / "out", replace(released("2.5"), text_encoder=str(gemmas["2.3"])))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"chunk_frames": 12, "video_codec": "x"}, "chunk_frames: 12; need a multiple of 8"),
        ({"chunk_frames": 8}, "chunk_frames: the video codec 'dct' takes whole clips"),
        ({"text_cache": TextCache.CONTEXT}, "text_cache: a context needs connectors"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        EncodeConfig(buckets=parse_buckets("64x64x9"), **fields)


# --- devices ---


def test_each_worker_has_a_gpu_in_turn(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert codec_choice.process_device("cuda") == "cuda"  # no worker: the default one
    monkeypatch.setattr(codec_choice.multiprocessing, "parent_process", object)
    for name, device in (("P-1", "cuda:0"), ("P-2", "cuda:1"), ("P-3", "cuda:0")):
        monkeypatch.setattr(codec_choice.multiprocessing.current_process(), "_name", name)
        assert codec_choice.process_device("cuda") == device
        assert codec_choice.process_device("cpu") == "cpu"
        assert codec_choice.process_device("cuda:1") == "cuda:1"


def test_there_is_a_worker_per_gpu_unless_a_number_is_asked_for(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    workers = [encode_module.default_workers(*given, 16) for given in ((None, "cuda"), (None, "cuda:2"), (None, "cpu"))]
    assert workers == [4, 1, 16]
    assert encode_module.default_workers(3, "cuda", 16) == 3
