"""How sampled latents lie to the real ones, and to each other: Fréchet distance and diversity of pooled latents.

A clip's features are the mean and the standard deviation of each channel over its positions, 256 numbers per stream.
The mean alone would not see whether anything moves or sounds.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ltx2_train.evals.estimate import TOO_FEW, Array, Estimate, bootstrap, jackknife
from ltx2_train.evals.metrics.metric import Clip, Part, Rows, Settings

CLIPS_PER_FEATURE = 2  # with fewer clips the distance is mostly their small number


@dataclass(frozen=True, slots=True)
class OfFeatures:
    """What follows from the features of one stream's latents."""

    name: str
    stream: str

    @property
    def needs(self) -> frozenset[Part]:
        return frozenset({_part(self.stream)})

    def measure(self, clip: Clip) -> Sequence[float]:
        return features(clip, self.stream).tolist()


@dataclass(frozen=True, slots=True)
class Frechet(OfFeatures):
    """Fréchet distance between sampled and real features: 0 for equal sets, larger where they differ.

    There are usually fewer clips than features, so covariances are shrunk towards their diagonal (`shrunk_covariance`).
    The distance still falls with the number of clips: compare figures of as many.
    """

    unit: str = "latent²"
    compares: bool = True

    def summarise(self, rows: Rows, real: Rows) -> Estimate:
        """A clip is left out with its sampled and its real rows."""
        few = min(len(rows.values), len(real.values))
        if few < 2:
            return Estimate.missing("a covariance needs two clips or more")
        values, clips = np.concatenate([rows.values, real.values]), [*rows.clips, *real.clips]
        num_sampled = len(rows.values)

        def distance(drawn: NDArray[np.int64]) -> float:
            sampled, compared = drawn[drawn < num_sampled], drawn[drawn >= num_sampled]
            if len(set(sampled)) < 2 or len(set(compared)) < 2:
                return float("nan")
            return frechet_distance(values[sampled], values[compared])

        estimate = jackknife(distance, clips)
        enough = CLIPS_PER_FEATURE * values.shape[1]
        if few < enough:
            return replace(estimate, note=f"{few} clips of {enough} wanted: compare with figures of as many only")
        return estimate


@dataclass(frozen=True, slots=True)
class Diversity(OfFeatures):
    """Mean distance between the features of two samples, of different clips or, `within`, of one clip's seeds."""

    within: bool
    unit: str = "latent"
    compares: bool = False

    def summarise(self, rows: Rows, real: Rows) -> Estimate:
        clips = np.asarray(rows.clips)
        is_pair = (clips[:, None] == clips) == self.within
        np.fill_diagonal(is_pair, val=False)
        if not is_pair.any():
            what = "one sample per clip; sample several seeds" if self.within else "there is one clip only"
            return Estimate.missing(what)
        squares = np.square(rows.values).sum(axis=1)
        distances = np.sqrt(np.maximum(squares[:, None] + squares - 2 * rows.values @ rows.values.T, 0))

        def mean_distance(drawn: NDArray[np.int64]) -> float:
            times = np.bincount(drawn, minlength=len(clips)).astype(np.float64)
            pairs = np.outer(times, times) * is_pair  # a clip that is drawn twice makes no pair with itself
            if self.within:
                pairs = np.diag(times) @ is_pair
            return float((pairs * distances).sum() / pairs.sum()) if pairs.any() else float("nan")

        if not self.within and len(set(rows.clips)) == 2:  # one distance, which drawing again cannot vary
            return Estimate(mean_distance(np.arange(len(clips))), None, None, 2, TOO_FEW)
        return bootstrap(mean_distance, rows.clips)


def frechet(stream: str) -> Callable[[Settings], Frechet]:
    return lambda settings: Frechet(f"frechet_{stream}", stream)


def diversity(stream: str) -> Callable[[Settings], Diversity]:
    return lambda settings: Diversity(f"diversity_{stream}", stream, within=False)


def seed_diversity(stream: str) -> Callable[[Settings], Diversity]:
    return lambda settings: Diversity(f"seed_diversity_{stream}", stream, within=True)


def _part(stream: str) -> Part:
    return Part.video_latents if stream == "video" else Part.audio_latents


def features(clip: Clip, stream: str) -> Array:
    """(256,) fp64: mean and standard deviation over positions of (128, F, H, W), or of (8, T, 16) over T."""
    latents = clip.video_latents if stream == "video" else clip.audio_latents
    assert latents is not None
    channels = by_channel(latents, stream).double().cpu().numpy()
    return np.concatenate([channels.mean(axis=1), channels.std(axis=1)])


def by_channel(latents: Tensor, stream: str) -> Tensor:
    """(128, positions): an audio step's 8 x 16 numbers are its channels."""
    return latents.flatten(1) if stream == "video" else latents.movedim(1, 2).flatten(0, 1)


def frechet_distance(first: Array, second: Array) -> float:
    """Squared Fréchet distance of two normal distributions fitted to rows (N, K) and (M, K); symmetric, never below 0.

    Source: Dowson and Landau, "The Fréchet distance between multivariate normal distributions" (1982);
    |m1 - m2|² + tr(C1 + C2 - 2 (C1^½ C2 C1^½)^½), the last trace from the eigenvalues of a symmetric matrix.
    """
    one, two = shrunk_covariance(first), shrunk_covariance(second)
    values, vectors = np.linalg.eigh(one)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    overlap = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ two @ root), 0)).sum()
    apart = np.square(first.mean(axis=0) - second.mean(axis=0)).sum()
    return max(0.0, float(apart + np.trace(one) + np.trace(two) - 2 * overlap))


def shrunk_covariance(rows: Array) -> Array:
    """(K, K) fp64: the variances of (N, K) as they are, the correlations shrunk by the share of them that is chance.

    Towards the diagonal, not towards a multiple of the identity, because channels differ in variance by orders, and one
    variance is well known from few clips where K (K - 1) / 2 correlations are not. The full covariance of fewer rows than
    columns has no inverse and many eigenvalues of 0, where the distance is the number of clips and little else.
    Source: Schäfer and Strimmer, "A shrinkage approach to large-scale covariance matrix estimation" (2005), table 2,
    target D.
    """
    num = len(rows)
    centred = rows - rows.mean(axis=0)
    deviations = centred.std(axis=0, ddof=1)
    unit = np.divide(centred, deviations, out=np.zeros_like(centred), where=deviations > 0)
    correlations = unit.T @ unit / (num - 1)
    mean_squares = (unit**2).T @ unit**2 / num
    variances = num**2 / (num - 1) ** 3 * (mean_squares - (correlations * (num - 1) / num) ** 2)
    for matrix in (variances, correlations):
        np.fill_diagonal(matrix, 0)
    total = np.square(correlations).sum()
    shrinkage = min(1.0, max(0.0, variances.sum() / total)) if total else 1.0
    shrunk = (1 - shrinkage) * correlations
    np.fill_diagonal(shrunk, 1.0)
    return shrunk * np.outer(deviations, deviations)
