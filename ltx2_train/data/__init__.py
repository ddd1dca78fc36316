"""Latent datasets: their index, the plan of a run, random access to records, and batches."""
