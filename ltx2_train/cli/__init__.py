"""The programs. The only home of Hydra: dataclasses come out of here, and no configuration library goes further in."""
