"""What tests share: ranks on one machine, small datasets."""

from ltx2_train.testing.ranks import run_on_ranks

__all__ = ["run_on_ranks"]
