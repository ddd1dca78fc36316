"""A small stand-in for the transformer, and batches of random latents."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from ltx2_train.batch import Batch, collate, placeholder
from ltx2_train.model.modality import SKIP_A2V, SKIP_V2A, Modality, Velocity
from ltx2_train.record import Bucket, Sample, TextFeatures

WIDTH = 6  # of the text features
CLIP = Bucket(3, 2, 2, 5)


def texts_of(x: Modality) -> tuple[Tensor, Tensor | None]:
    """Features and mask of all samples of the batch, where groups of it share theirs too."""
    if isinstance(x.context, Tensor):
        return x.context, x.context_mask
    masks = [shared.mask for shared in x.context if shared.mask is not None]
    return torch.cat([shared.features for shared in x.context]), torch.cat(masks) if masks else None


class FakeTransformer(nn.Module):
    """Two linear layers per stream; its answer depends on all that it is given, so that nothing can leak unseen."""

    def __init__(self) -> None:
        super().__init__()
        self.video, self.audio = nn.Linear(128, 128), nn.Linear(128, 128)
        self.video_text, self.audio_text = nn.Linear(WIDTH, 128), nn.Linear(WIDTH, 128)
        self.calls: list[tuple] = []

    def forward(self, video: Modality | None, audio: Modality | None, perturbations=None) -> Velocity:
        self.calls.append((video, audio, perturbations))
        out_video = None if video is None else self._stream(video, self.video, self.video_text)
        out_audio = None if audio is None else self._stream(audio, self.audio, self.audio_text)
        if out_video is None or out_audio is None:
            return Velocity(out_video, out_audio)
        a2v, v2a = (self._keep(kind, perturbations, len(out_video)) for kind in (SKIP_A2V, SKIP_V2A))
        from_audio, from_video = out_audio.mean(1, keepdim=True), out_video.mean(1, keepdim=True)
        return Velocity(out_video + from_audio * a2v, out_audio + from_video * v2a)

    def _stream(self, x: Modality, layer: nn.Linear, text: nn.Linear) -> Tensor:
        timesteps = x.timesteps if x.timestep_index is None else x.timesteps.gather(1, x.timestep_index)
        features, mask = texts_of(x)
        rows = text(features)
        valid = torch.ones_like(rows[..., :1]) if mask is None else mask[..., None]
        context = (rows * valid).sum(1, keepdim=True) / valid.sum(1, keepdim=True)
        return layer(x.latent) * (1 - timesteps[..., None]) + context + x.positions.mean(-1).sum(1)[..., None] / 100

    def _keep(self, kind: str, perturbations, batch_size: int) -> Tensor:
        lists = perturbations or [[]] * batch_size
        return torch.tensor([float(kind not in [p[0] for p in row]) for row in lists])[:, None, None]


@pytest.fixture
def fake_transformer() -> FakeTransformer:
    torch.manual_seed(0)
    return FakeTransformer()


@pytest.fixture
def null_text() -> TextFeatures:
    return TextFeatures(torch.full((1, WIDTH), 7.0), torch.full((1, WIDTH), -7.0))


@pytest.fixture
def make_sample() -> Callable[..., Sample]:
    def make(i: int, bucket: Bucket, length: int = 3, fps: float = 24.0) -> Sample:
        g = torch.Generator().manual_seed(i)
        video = torch.randn(128, bucket.frames, bucket.height, bucket.width, generator=g)
        audio = torch.randn(8, bucket.audio_steps, 16, generator=g)
        text = TextFeatures(torch.randn(length, WIDTH, generator=g), torch.randn(length, WIDTH, generator=g))
        return Sample(f"s{i}", video if bucket.frames else None, audio if bucket.audio_steps else None, text, fps)

    return make


@pytest.fixture
def make_batch(make_sample, null_text) -> Callable[..., Batch]:
    """Samples `numbers` of a bucket at the same positions of the global batch; those in `bad` are placeholders."""

    def make(numbers=range(4), bucket=CLIP, lengths=None, bad=(), **fields) -> Batch:
        lengths = lengths or [3] * len(numbers)
        samples = [
            placeholder(f"s{i}", bucket, null_text) if i in bad else make_sample(i, bucket, n, **fields)
            for i, n in zip(numbers, lengths, strict=True)
        ]
        return collate(samples, list(numbers), bucket, [f"s{i}: bad" for i in bad])

    return make
