"""Noise to data and back: the path, sigmas, conditioning, objective, guidance, sampler and the one `generate`.

Knows tensors and a callable model; not ranks, not files, not what a latent shows.
"""
