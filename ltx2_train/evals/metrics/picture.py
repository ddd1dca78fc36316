"""Does the picture move?"""

from ltx2_train.evals.metrics.metric import Clip, Part, PerClip, Settings


def motion(settings: Settings) -> PerClip:
    """Mean absolute difference of successive frames, in percent of the range of a pixel."""
    return PerClip(name="motion", unit="% of range", needs=frozenset({Part.motion}), of=_motion)


def _motion(clip: Clip) -> float:
    return 100 * float(clip.film.motion_energy.mean())
