"""A full-size 2.3 file goes in: every key matched, and streamed as an engine reads it, in little memory.

The file has the real header (keys, shapes, dtypes) and a hole where the weights would be: no disk, all of its 40 GB to read.

python -m tests.proofs.weights [--out FILE]
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch

MEMORY_BOUND = 2 << 30  # bytes of host memory over the imports
INSPECT_BOUND = 30.0  # seconds
TENSORS = {"transformer": 4186, "text connectors": 258}
TEXT_WIDTH, TEXT_STATES = 3840, 49  # of the released text encoder
Layout = Mapping[str, tuple[tuple[int, ...], torch.dtype]]


def released_layout() -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype by key of everything in the published 2.3 file."""
    from ltx2_train.model import named_config
    from ltx2_train.model.weights import released_dtype
    from ltx2_train.testing.released import text_projection_shapes, transformer_shapes
    from ltx2_train.testing.released_codecs import full_size_layout

    config = named_config("ltx2_3_22b")
    shapes = transformer_shapes(config) | text_projection_shapes(config, TEXT_WIDTH, TEXT_STATES)
    return {key: (tuple(shape), released_dtype(key)) for key, shape in shapes.items()} | full_size_layout("2.3")


def write_hollow(path: Path, layout: Layout, metadata: Mapping[str, str]) -> None:
    """A safetensors file whose tensors are a hole, which reads as zeros."""
    from ltx2_train.weightfile import NAMES

    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for key, (shape, dtype) in layout.items():
        begin, end = end, end + prod(shape) * dtype.itemsize
        header[key] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    raw = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + end)


def streamed(path: str) -> dict[str, Any]:
    """Reads every tensor that training starts from, in the order and by the calls of an engine, and drops it."""
    from ltx2_train.model import ModelConfig, build_model, initial_weights

    before = peak_memory()
    begin, config = time.perf_counter(), ModelConfig(weights=path)
    with torch.device("meta"):
        model = build_model(config)
    count = num_bytes = largest = 0
    for _, stored in initial_weights(model, config, seed=0):
        assert not isinstance(stored, torch.Tensor)
        value = stored.read()
        count, num_bytes, largest = count + 1, num_bytes + value.nbytes, max(largest, value.nbytes)
        del value
    return {
        "tensors": count,
        "gigabytes": num_bytes / 1e9,
        "largest_tensor_mib": largest / 2**20,
        "peak_over_imports_mib": (peak_memory() - before) / 2**20,
        "seconds": time.perf_counter() - begin,
    }


def peak_memory() -> int:
    """The most resident memory of this program so far, bytes (ru_maxrss starts at that of the process it came from)."""
    (line,) = [one for one in Path("/proc/self/status").read_text().splitlines() if one.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


def alone(*arguments: str) -> Any:
    """What a process of its own prints as JSON."""
    done = subprocess.run([sys.executable, "-m", *arguments], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def figures_of(path: Path) -> dict[str, Any]:
    begin = time.perf_counter()
    report = alone("ltx2_train.cli.inspect", str(path), "--json")
    inspected = {
        "seconds": time.perf_counter() - begin,
        "generation": report["generation"],
        "tensors": {one["name"]: one["tensors"] for one in report["components"]},
        "parameters": sum(one["parameters"] for one in report["components"]),
        "not_recognised": len(report["unrecognised"]),
        "do_not_fit": report["problems"],
    }
    return {
        "file_gigabytes": path.stat().st_size / 1e9,
        "on_disk_megabytes": path.stat().st_blocks * 512 / 1e6,
        "inspect": inspected,
        "stream": alone("tests.proofs.weights", "--stream", str(path)),
    }


def holds(figures: Mapping[str, Any]) -> bool:
    inspected, stream = figures["inspect"], figures["stream"]
    return (
        TENSORS.items() <= inspected["tensors"].items()
        and not inspected["not_recognised"]
        and not inspected["do_not_fit"]
        and inspected["seconds"] < INSPECT_BOUND
        and stream["tensors"] == sum(TENSORS.values())
        and stream["peak_over_imports_mib"] * 2**20 < MEMORY_BOUND
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="also write the figures here")
    parser.add_argument("--stream", metavar="FILE", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.stream:
        print(json.dumps(streamed(options.stream)))
        return
    from ltx2_train.model import named_config
    from ltx2_train.testing.released_codecs import full_sections

    header = {"transformer": named_config("ltx2_3_22b").to_header(), **full_sections("2.3")}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ltx-2.3.safetensors"
        write_hollow(path, released_layout(), {"config": json.dumps(header), "model_version": "2.3.0"})
        figures = figures_of(path)
    text = json.dumps(figures, indent=1)
    print(text)
    if options.out is not None:
        options.out.write_text(text + "\n")
    if not holds(figures):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
