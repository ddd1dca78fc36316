"""Judging a run: held-out loss, samples with sound, audio-visual sync, and the report a person reads."""
