import pickle
import re

import pytest
import torch

from ltx2_train.data.datasets import check_compatible, check_mixture, open_dataset
from ltx2_train.errors import DataError
from ltx2_train.record import MANIFEST_NAME, NULL_TEXT_NAME, Bucket, TextFeatures
from ltx2_train.testing.shards import manifest_for, random_sample, write_latent_dataset

CLIP = Bucket(2, 2, 2, 5)


def samples(n=3, **options):
    return [random_sample(f"clip{i}", CLIP, **options) for i in range(n)]


def test_a_dataset_gives_back_what_was_written(tmp_path):
    written = samples()
    write_latent_dataset(tmp_path, written, null_text=TextFeatures(torch.ones(2, 32), torch.ones(2, 16)))
    dataset = open_dataset(tmp_path)
    assert len(dataset) == 3
    assert dataset.null_text.video.shape == (2, 32)
    for i, sample in enumerate(written):
        read = dataset.read(i)
        assert (read.key, read.caption, read.fps, read.meta) == (sample.key, sample.caption, sample.fps, {})
        assert torch.equal(read.text.audio, sample.text.audio)


def test_a_dataset_travels_to_another_process_as_its_location(tmp_path):
    write_latent_dataset(tmp_path, samples(50))
    data = pickle.dumps(open_dataset(tmp_path))
    assert len(data) < 1000
    assert pickle.loads(data).read(49).key == "clip49"


def test_an_unfinished_dataset_is_refused(tmp_path):
    write_latent_dataset(tmp_path, samples())
    (tmp_path / MANIFEST_NAME).unlink()
    with pytest.raises(DataError, match="no finished latent dataset"):
        open_dataset(tmp_path)


def test_the_folder_around_datasets_is_refused_with_their_names(tmp_path):
    for name in ("train", "heldout"):
        write_latent_dataset(tmp_path / name, samples())
    with pytest.raises(DataError, match=f"Name one of them: {tmp_path}/heldout, {tmp_path}/train$"):
        open_dataset(tmp_path)


def test_a_folder_without_latents_is_not_called_unfinished(tmp_path):
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips" / "a.mp4").touch()
    with pytest.raises(DataError, match="holds no latent dataset") as refused:
        open_dataset(tmp_path / "clips")
    assert "to its end" not in str(refused.value)
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "settings.json").touch()  # what data_prep.encode writes first
    with pytest.raises(DataError, match="no finished latent dataset"):
        open_dataset(tmp_path / "begun")


def test_a_directory_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(DataError, match="no such directory"):
        open_dataset(tmp_path / "nowhere")


def test_a_dataset_without_its_null_context_is_refused(tmp_path):
    write_latent_dataset(tmp_path, samples())
    (tmp_path / NULL_TEXT_NAME).unlink()
    with pytest.raises(DataError, match=r"null_text.safetensors is missing"):
        open_dataset(tmp_path)


def test_a_damaged_null_context_is_refused(tmp_path):
    write_latent_dataset(tmp_path, samples())
    (tmp_path / NULL_TEXT_NAME).write_bytes(b"nothing")
    with pytest.raises(DataError, match="damaged null context"):
        open_dataset(tmp_path)


def test_a_null_context_of_another_width_is_refused(tmp_path):
    write_latent_dataset(tmp_path, samples(), null_text=TextFeatures(torch.ones(2, 8), torch.ones(2, 16)))
    with pytest.raises(DataError, match=r"widths \(8, 16\); the manifest says widths \(32, 16\)"):
        open_dataset(tmp_path)


def test_a_record_of_another_text_width_is_refused_when_read(tmp_path):
    write_latent_dataset(tmp_path, [*samples(), random_sample("odd", CLIP, text_widths=(8, 16))])
    with pytest.raises(DataError, match=r"odd has .* text widths 8 and 16; .* 32 and 16"):
        open_dataset(tmp_path).read(3)


@pytest.mark.parametrize("setting", ["video_codec", "audio_codec", "text_encoder", "video_text_width"])
def test_another_generation_is_refused_naming_both(setting):
    manifest = manifest_for(samples(1)[0])
    wanted = 4096 if setting.endswith("width") else "other-2"
    found = re.escape(str(getattr(manifest, setting)))
    with pytest.raises(DataError, match=f"clips was encoded with {setting} .*{found}.*; ltx has .*{wanted}"):
        check_compatible("clips", manifest, against="ltx", **{setting: wanted})


def test_a_dataset_of_the_same_kind_is_accepted():
    manifest = manifest_for(samples(1)[0])
    check_compatible("clips", manifest, video_codec="dct-1", audio_codec="dct-1", video_text_width=32)


def test_all_differences_come_in_one_message_with_the_options_that_mend_the_widths():
    manifest = manifest_for(samples(1)[0])
    with pytest.raises(DataError) as refused:
        check_compatible("clips", manifest, against="demo", video_codec="x", video_text_width=192, audio_text_width=160)
    told = str(refused.value)
    assert "video_codec dct-1, video_text_width 32, audio_text_width 16; demo has video_codec x, video_text" in told
    assert "(--video-text-width=192 --audio-text-width=160)" in told
    with pytest.raises(DataError, match=r"\(--video-text-width=192 --audio-text-width=16\)"):  # one alone is half
        check_compatible("clips", manifest, video_text_width=192, audio_text_width=16)
    with pytest.raises(DataError) as refused:
        check_compatible("clips", manifest, text_encoder="gemma3:1", video_text_width=192)
    assert "--video-text-width" not in str(refused.value)  # they are those of the encoder


def test_datasets_of_different_kinds_do_not_mix(tmp_path):
    write_latent_dataset(tmp_path / "a", samples())
    write_latent_dataset(tmp_path / "b", samples(text_widths=(64, 16)))
    with pytest.raises(DataError, match=r"b was encoded with text_encoder .*/a has"):
        check_mixture([open_dataset(tmp_path / "a"), open_dataset(tmp_path / "b")])


def test_a_null_context_without_rows_is_one_that_is_not_known(tmp_path):
    write_latent_dataset(tmp_path, samples(), null_text=TextFeatures(torch.zeros(0, 32), torch.zeros(0, 16)))
    dataset = open_dataset(tmp_path)
    assert dataset.null_text is None
    assert dataset.stand_in_text.video.shape == (1, 32)
    with pytest.raises(DataError, match=r"sampling needs the features of the empty caption, .* --null-context FILE"):
        dataset.known_null_text("sampling")
