"""A decoded clip: what can be seen and heard, and what detectors find in it, found once."""

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from ltx2_train.evals.sync import impacts, motion_energy, onset_strength, waveform_onsets


@dataclass(frozen=True)
class Film:
    """`video` (3, F, H, W) in [-1, 1], `waveform` (2, N) in [-1, 1], either of them None. Detectors need theirs."""

    video: Tensor | None
    waveform: Tensor | None
    fps: float
    sample_rate: int

    @property
    def seconds(self) -> float:
        if self.video is not None:
            return self.video.shape[1] / self.fps
        return self.waveform.shape[1] / self.sample_rate if self.waveform is not None else 0.0

    @property
    def moves(self) -> bool:
        """Whether there are pictures to compare with each other."""
        return self.video is not None and self.video.shape[1] > 1

    @cached_property
    def impacts(self) -> list[float]:
        """Times (s) of impacts seen."""
        assert self.video is not None
        return impacts(self.video, self.fps)

    @cached_property
    def onsets(self) -> list[float]:
        """Times (s) of onsets heard."""
        assert self.waveform is not None
        return waveform_onsets(self.waveform, self.sample_rate)

    @cached_property
    def motion_energy(self) -> Tensor:
        """(F - 1,) mean absolute difference of successive frames, on the scale [0, 1] of pixels."""
        assert self.video is not None
        return motion_energy(self.video)

    @cached_property
    def onset_strength(self) -> Tensor:
        """(T,) how much sound sets in, every 10 ms."""
        assert self.waveform is not None
        return onset_strength(self.waveform, self.sample_rate)
