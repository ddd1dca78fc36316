"""Video and audio files in and out: `probe` says what is there, `read_video` and `read_audio` share one time axis."""
