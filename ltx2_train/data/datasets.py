"""A latent dataset: its manifest, its index, its null context, and its samples by number."""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ltx2_train.data.index import Index, check_index
from ltx2_train.data.shards import Store, StoreConfig, file_hash, read_members, verify_shards
from ltx2_train.errors import DataError
from ltx2_train.record import (
    INDEX_NAME,
    MANIFEST_NAME,
    NULL_TEXT_NAME,
    Manifest,
    Sample,
    TextFeatures,
    decode_record,
)

PROVENANCE = ("video_codec", "audio_codec", "text_encoder", "video_text_width", "audio_text_width", "text_cache")


def save_null_text(directory: str | Path, text: TextFeatures) -> None:
    """Write the null context (features of the empty caption) of a dataset, whole or not at all."""
    partial = Path(directory) / f"{NULL_TEXT_NAME}.partial"
    save_file({"video_text": text.video.contiguous(), "audio_text": text.audio.contiguous()}, partial)
    partial.replace(Path(directory) / NULL_TEXT_NAME)


def load_null_text(directory: str | Path) -> TextFeatures:
    """The null context of a dataset. Raises `DataError` when it is missing or damaged."""
    path = Path(directory) / NULL_TEXT_NAME
    if not path.exists():
        raise DataError(f"{path} is missing: {directory} has no null context. Run data_prep.encode to its end")
    try:
        tensors = load_file(path)
        return TextFeatures(tensors["video_text"], tensors["audio_text"])
    except (SafetensorError, KeyError) as error:
        raise DataError(f"{path}: damaged null context ({error}). Re-run data_prep.encode") from error


class LatentDataset:
    """Random access to the samples of one directory of latent shards. Pickles as its location and opens again."""

    def __init__(self, store: Store, manifest: Manifest, index: Index, null_text: TextFeatures) -> None:
        """`null_text` without rows: the features of the empty caption are not known."""
        self.store = store
        self.manifest = manifest
        self.index = index
        self.null_text = null_text if len(null_text.video) else None

    def known_null_text(self, purpose: str) -> TextFeatures:
        """The null context. Raises `DataError` naming the purpose when it is not known."""
        if self.null_text is None:
            raise DataError(
                f"{self.location}: {purpose} needs the features of the empty caption, which are not known. Run "
                "data_prep.import_precomputed again with --null-context FILE; nothing is imported anew"
            )
        return self.null_text

    @property
    def stand_in_text(self) -> TextFeatures:
        """Text of a record that cannot be read: the null context, else a row of zeros. It counts in no loss."""
        widths = self.manifest.video_text_width, self.manifest.audio_text_width
        return self.null_text or TextFeatures(*(torch.zeros(1, width) for width in widths))

    @property
    def location(self) -> str:
        return self.store.location

    def __len__(self) -> int:
        return len(self.index)

    def __reduce__(self) -> tuple[Any, ...]:
        verified = replace(self.store.config, verify=False)  # where it was asked for, it is done
        return open_dataset, (self.location, verified)

    def read(self, i: int) -> Sample:
        """Sample i. Raises `DataError` naming shard and key when its bytes are not what index and manifest say."""
        key, shard = self.index.key(i), self.index.shard_names[self.index.shard_of(i)]
        tensors, meta = read_members(self.store, self.index, i)
        try:
            sample = decode_record(key, tensors, meta)
        except DataError as error:
            raise DataError(f"{self.store.path(shard)}: {error}") from error
        self._check(sample, shard, i)
        return sample

    def _check(self, sample: Sample, shard: str, i: int) -> None:
        text, manifest = sample.text, self.manifest
        found = (sample.bucket, text.video.shape[1], text.audio.shape[1])
        stated = (self.index.bucket(i), manifest.video_text_width, manifest.audio_text_width)
        if found != stated:
            parts = "bucket {}, text widths {} and {}"
            raise DataError(
                f"{self.store.path(shard)}: {sample.key} has {parts.format(*found)}; index and manifest say "
                f"{parts.format(*stated)}. Re-run data_prep.encode for this shard"
            )


def open_dataset(location: str | Path, config: StoreConfig | None = None) -> LatentDataset:
    """The dataset of a local directory or an fsspec URL. Its shard names and sizes are held against the index.

    Raises `DataError` when it is unfinished, damaged, or index, manifest and shards do not belong together.
    """
    config = config or StoreConfig()
    store = Store(location, config)
    if not store.remote and not Path(store.location).is_dir():
        raise DataError(f"{store.location}: no such directory. Name a directory that data_prep.encode wrote")
    manifest, index, null_text = _open_tables(store)
    check_index(index, manifest, store.sizes().get, store.location)
    _check_null_text(null_text, manifest, store.location)
    if config.verify:
        verify_shards(store, manifest)
    return LatentDataset(store, manifest, index, null_text)


def _open_tables(store: Store) -> tuple[Manifest, Index, TextFeatures]:
    if not store.remote:
        return _load_tables(Path(store.location))
    with tempfile.TemporaryDirectory() as temporary:  # a mapped index outlives the name of its file
        manifest = store.fetch(MANIFEST_NAME, Path(temporary))
        store.version = file_hash(manifest)
        directory = store.cache_directory() if store.config.cache is not None else Path(temporary)
        for name in (MANIFEST_NAME, INDEX_NAME, NULL_TEXT_NAME):
            store.fetch(name, directory)
        return _load_tables(directory)


def _load_tables(directory: Path) -> tuple[Manifest, Index, TextFeatures]:
    return Manifest.load(directory), Index.read(directory / INDEX_NAME), load_null_text(directory)


def _check_null_text(text: TextFeatures, manifest: Manifest, where: str) -> None:
    widths = text.video.shape[1], text.audio.shape[1]
    stated = manifest.video_text_width, manifest.audio_text_width
    if widths != stated or len(text.video) != len(text.audio):
        raise DataError(
            f"{where}/{NULL_TEXT_NAME}: {len(text.video)} and {len(text.audio)} rows of widths {widths}; the manifest "
            f"says widths {stated}, and both need as many rows. Re-run data_prep.encode"
        )


def check_compatible(
    name: str,
    manifest: Manifest,
    *,
    against: str = "the model",
    video_codec: str | None = None,
    audio_codec: str | None = None,
    text_encoder: str | None = None,
    video_text_width: int | None = None,
    audio_text_width: int | None = None,
    text_cache: str | None = None,
) -> None:
    """Raises `DataError` naming all differences, unless a dataset was made with what `against` expects. None: any.

    All generations of the model have latents of the same shape, so only this provenance tells them apart.
    """
    expected = (video_codec, audio_codec, text_encoder, video_text_width, audio_text_width, text_cache)
    wanted = {
        setting: value
        for setting, value in zip(PROVENANCE, expected, strict=True)
        if value not in (None, getattr(manifest, setting))
    }
    if wanted:
        found = {setting: getattr(manifest, setting) for setting in wanted}
        raise DataError(
            f"{name} was encoded with {_listed(found)}; {against} has {_listed(wanted)}. "
            f"Encode it again with data_prep.encode{_width_options(wanted, manifest)}, or use what it was made for"
        )


def _listed(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{setting} {value}" for setting, value in settings.items())


def _width_options(wanted: Mapping[str, Any], manifest: Manifest) -> str:
    """The options of data_prep.encode that mend text widths; those of another text encoder come with it."""
    widths = ("video_text_width", "audio_text_width")
    if "text_encoder" in wanted or wanted.keys().isdisjoint(widths):
        return ""
    options = [f"--{name.replace('_', '-')}={wanted.get(name, getattr(manifest, name))}" for name in widths]
    return f" and its embedded text encoder ({' '.join(options)})"


def check_mixture(datasets: Sequence[LatentDataset]) -> None:
    """Raises `DataError` naming two datasets that were not made with the same codecs and text encoder."""
    for dataset in datasets[1:]:
        expected = {setting: getattr(datasets[0].manifest, setting) for setting in PROVENANCE}
        check_compatible(dataset.location, dataset.manifest, against=datasets[0].location, **expected)
