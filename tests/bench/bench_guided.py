"""A guided step (cond, uncond, perturbed, isolated) by the guider against four forwards by themselves, paired in one run.

python -m tests.bench.bench_guided [--pairs 8] [--threads 2] [--only NAME]

The guider runs all passes in one forward and prepares the texts once for all steps; the other side calls the model once a
pass with plain contexts, as training does. Prints per configuration the medians, the median and the quartiles of the
pairwise ratio guider / apart, and the ratio of multiply-adds, which is what a device that is busy with nothing else would
show. With a GPU it measures the 19 B model at 121 x 704 x 1280 with random weights instead, and an unguided step beside
it. Speed is shown here and asserted nowhere.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ltx2_train import geometry
from ltx2_train.diffusion.conditioning import no_conditioning
from ltx2_train.diffusion.guidance import GuidanceConfig, Pass, combine, needed_passes
from ltx2_train.diffusion.guider import Contexts, Guider, StreamInputs
from ltx2_train.diffusion.path import to_denoised
from ltx2_train.diffusion.sampler import Streams
from ltx2_train.model import ModelConfig, TextConditioned, TransformerConfig, build_model, named_config
from ltx2_train.model.build import context_tokens
from ltx2_train.model.modality import Modality
from ltx2_train.record import Bucket

SIGMA = torch.tensor(0.5)
STEPS = 30  # of a generation: what is made once counts as this part of a step
TEXT_ROWS = 12


@dataclass(frozen=True)
class Case:
    """A model, and the latent sizes of the clip that it makes."""

    name: str
    frames: int
    height: int
    width: int
    audio_steps: int

    @property
    def bucket(self) -> Bucket:
        return Bucket(self.frames, self.height, self.width, self.audio_steps)


CPU_CASES = [Case("demo", 6, 2, 2, 43), Case("small_30m", 6, 4, 4, 43)]
GPU_CASES = [Case("ltx2_19b", 16, 22, 40, 126)]
COUNTED = [*CPU_CASES, Case("ltx2_19b", 16, 16, 24, 126), Case("ltx2_3_22b", 16, 16, 24, 126), *GPU_CASES]


def guidance(config: TransformerConfig) -> GuidanceConfig:
    return GuidanceConfig(cfg=3.0, stg=1.0, stg_blocks=[config.num_layers - 1], modality=3.0, rescale=0.7)


# --- multiply-adds ---


def multiply_adds(case: Case, *, guided: bool, together: bool) -> float:
    """Of a step of one clip: by the guider (`together`), or with a forward for each pass.

    The text costs keys and values in every block, and before them connectors and caption projections. Apart, every pass
    pays for all; together, two contexts are prepared once in `STEPS` steps, but for the keys and values of an architecture
    that modulates them with sigma: two contexts at every step. The isolated pass has no exchange either way.
    """
    config = named_config(case.name)
    passes = 4 if guided else 1
    texts = 2 if guided else 1
    isolated = 1 if guided else 0
    skipped = _skipped(case, config) if guided else 0
    rest = passes * _own(case, config) + (passes - isolated) * _exchange(case, config) - skipped
    keys, before = _text(case, config)
    if not together:
        return rest + passes * (keys + before)
    return rest + texts * (keys * (1 if config.has_prompt_adaln else 1 / STEPS) + before / STEPS)


def _sizes(case: Case, config: TransformerConfig) -> list[tuple[int, int]]:
    """(tokens, width) of video and audio."""
    return [(case.bucket.video_tokens, config.video_width), (case.audio_steps, config.audio_width)]


def _own(case: Case, config: TransformerConfig) -> float:
    """Self-attention, text attention without the text's keys and values, and feed-forward."""
    text = context_tokens(ModelConfig(name=case.name))
    return config.num_layers * sum(
        14 * tokens * width**2 + 2 * tokens * (tokens + text) * width for tokens, width in _sizes(case, config)
    )


def _exchange(case: Case, config: TransformerConfig) -> float:
    (video, video_width), (audio, width) = _sizes(case, config)
    return config.num_layers * (4 * video * video_width * width + 4 * audio * width**2 + 4 * video * audio * width)


def _skipped(case: Case, config: TransformerConfig) -> float:
    """Queries, keys and their products in the self-attention of one block."""
    return sum(2 * tokens * width**2 + 2 * tokens**2 * width for tokens, width in _sizes(case, config))


def _text(case: Case, config: TransformerConfig) -> tuple[float, float]:
    """(keys and values of all blocks, all that comes before them) of one context of each stream."""
    text = context_tokens(ModelConfig(name=case.name))
    widths = (config.video_width, config.audio_width)
    before = 0.0
    if not config.caption_proj_before_connector:
        before += sum(text * (config.caption_channels or 0) * width + text * width**2 for width in widths)
    for width, layers in (
        (config.video_connector_width, config.connector_num_layers),
        (config.audio_connector_width, config.audio_connector_layers),
    ):
        before += layers * (12 * text * width**2 + 2 * text**2 * width)
    return config.num_layers * 2 * text * sum(width**2 for width in widths), before


# --- seconds ---


def random_model(name: str, device: torch.device, dtype: torch.dtype) -> TextConditioned:
    with torch.device("meta"):
        model = build_model(ModelConfig(name=name))
    model = model.to(dtype).to_empty(device=device).eval().requires_grad_(False)
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.normal_(std=0.02)
    return model


def stream_inputs(case: Case, config: TransformerConfig, device: torch.device) -> tuple[StreamInputs, StreamInputs]:
    torch.manual_seed(1)
    given = no_conditioning(case.bucket, 1, device)
    grid = (case.frames, case.height, case.width)
    positions = (
        geometry.batch_video_positions(*grid, (24.0,), device),
        geometry.batch_audio_positions(case.audio_steps, device),
    )
    widths = (config.video_connector_width, config.audio_connector_width)
    video, audio = (
        StreamInputs(
            conditioning=conditioning,
            positions=places,
            contexts=Contexts(*torch.randn(2, 1, TEXT_ROWS, width, device=device).unbind(), None),
            guidance=guidance(config),
        )
        for conditioning, places, width in zip((given.video, given.audio), positions, widths, strict=True)
    )
    return video, audio


def alone(inputs: StreamInputs, noisy: Tensor, one: Pass, dtype: torch.dtype) -> Modality:
    """A stream as the input of one pass, its context a plain tensor."""
    contexts = inputs.contexts
    sigma = SIGMA.to(noisy.device).expand(1)
    return Modality(
        latent=noisy.to(dtype),
        sigma=sigma,
        timesteps=sigma[:, None],
        positions=inputs.positions,
        context=(contexts.negative if one.negative else contexts.positive).to(dtype),
    )


def passes_apart(model: TextConditioned, streams: tuple[StreamInputs, StreamInputs], noisy: Streams) -> Streams:
    """The guided step as four forwards."""
    dtype = next(model.parameters()).dtype
    found: list[dict[str, Tensor]] = [{}, {}]
    for one in needed_passes(*(inputs.guidance for inputs in streams)):
        given = [alone(inputs, tokens, one, dtype) for inputs, tokens in zip(streams, noisy, strict=True)]
        velocity = model(*given, [one.perturbation] if one.perturbation else None)
        for tokens, v, own in zip(noisy, velocity, found, strict=True):
            own[one.name] = to_denoised(tokens, v, SIGMA.to(tokens.device))
    return Streams(*(combine(**own, guidance=inputs.guidance) for own, inputs in zip(found, streams, strict=True)))


def seconds(call: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


@torch.no_grad()
def measure(case: Case, pairs: int, device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    model = random_model(case.name, device, dtype)
    streams = stream_inputs(case, model.config, device)
    noisy = Streams(
        torch.randn(1, case.bucket.video_tokens, 128, device=device),
        torch.randn(1, case.audio_steps, 128, device=device),
    )
    guider = Guider(model, *streams, dtype)
    plain = [
        alone(inputs, tokens, Pass("cond", False, []), dtype) for inputs, tokens in zip(streams, noisy, strict=True)
    ]
    calls = (lambda: guider(noisy, SIGMA), lambda: passes_apart(model, streams, noisy), lambda: model(*plain))
    for call in calls * 2:
        seconds(call, device)
    times = [[seconds(call, device) for call in calls] for _ in range(pairs)]
    ratios = sorted(together / apart for together, apart, _ in times)
    together, apart, unguided = (statistics.median(column) for column in zip(*times, strict=True))
    gap = max((a - b).abs().max().item() for a, b in zip(calls[0](), calls[1](), strict=True))
    return {
        "guider_s": together,
        "apart_s": apart,
        "unguided_s": unguided,
        "ratio": statistics.median(ratios),
        "ratio_low": ratios[len(ratios) // 4],
        "ratio_high": ratios[-1 - len(ratios) // 4],
        "largest_difference": gap,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", help="one configuration")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    on_gpu = torch.cuda.is_available()
    device, dtype = (torch.device("cuda"), torch.bfloat16) if on_gpu else (torch.device("cpu"), torch.float32)
    for case in COUNTED:
        apart, together = (multiply_adds(case, guided=True, together=flag) for flag in (False, True))
        size = f"{case.name} {case.frames}x{case.height}x{case.width}"
        print(
            json.dumps(
                {"config": size, "tera_multiply_adds": round(together / 1e12, 5), "ideal": round(together / apart, 4)}
            )
        )
    for case in GPU_CASES if on_gpu else CPU_CASES:
        if arguments.only in (None, case.name):
            figures = measure(case, arguments.pairs, device, dtype)
            print(json.dumps({"config": case.name} | {key: float(f"{value:.4g}") for key, value in figures.items()}))


if __name__ == "__main__":
    main()
