"""Programs that turn media files into latent shards: `python -m data_prep.<verb> --help` teaches each of them.

`synth` writes a small world of real files, `pack` cuts files into raw WebDataset shards, `encode` turns those into
latent shards, `show` decodes one record for eye and ear. They take ordinary command-line options: what they write is
described by the manifest beside it, so there is nothing to compose or sweep over, and Hydra stays with training.
"""
