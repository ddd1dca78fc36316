"""Ranks and engines: the only home of torch.distributed in the library."""
