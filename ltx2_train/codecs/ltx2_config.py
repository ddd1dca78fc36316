"""What the header of a released file says of its codecs, as arguments of diffusers' constructors.

A released file describes every codec in a section of its header; diffusers has other names, other defaults and other
orders for the same. Values that neither side knows are refused here, before a tensor is read.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from math import isfinite, prod
from operator import index
from reprlib import repr as short  # of what a file may hold without end
from typing import Any, Concatenate, ParamSpec, TypeVar

from ltx2_train import geometry
from ltx2_train.codecs.mel import LogMel
from ltx2_train.errors import CheckpointError, Ltx2Error

DOWNSAMPLE = {"compress_space_res": "spatial", "compress_time_res": "temporal", "compress_all_res": "spatiotemporal"}
UPSAMPLE = {name.removesuffix("_res"): kind for name, kind in DOWNSAMPLE.items()}
SCALES = {"spatial": (1, 2), "temporal": (2, 1), "spatiotemporal": (2, 2)}  # of time, of space
CONVOLUTIONAL = "CausalVideoAutoencoder"
DIFFUSION = "CausalDiffusionVAE"
MAX_NUMBER = 1_000_000  # of anything that is a whole number: widths, counts, rates in Hz
MAX_LAYERS = 64  # of a stage, and stages of a codec; released ones have 8
DEPTHS = (
    "layers_per_block",
    "decoder_layers_per_block",
    "num_res_blocks",
    "decoder_stage_depths",
    "num_blocks_per_stage",
)
AUDIO_LEVELS = 3  # of the audio VAE: two halvings, the 4 mel frames of a latent step


@dataclass(frozen=True, slots=True)
class Section:
    """A section of a header that names itself and its file in errors."""

    where: str
    values: dict[str, Any]

    def get(self, key: str, default: Any) -> Any:
        return self.values.get(key, default)

    def need(self, key: str) -> Any:
        """The value, which has to be there."""
        if key not in self.values:
            raise CheckpointError(f"{self.where}.{key} is missing, so the architecture is unknown. Get the whole file")
        return self.values[key]

    def only(self, key: str, *supported: Any) -> Any:
        """The value, one of those supported; the first of them when the header does not say."""
        value = self.values.get(key, supported[0])
        if value not in supported:
            self.refuse(key, value, " or ".join(map(repr, supported)))
        return value

    def below(self, *keys: str) -> "Section":
        """A section inside this one, empty where it is not there."""
        values: Any = self.values
        for key in keys:
            values = values.get(key, {}) if isinstance(values, dict) else {}
        return Section(".".join((self.where, *keys)), values if isinstance(values, dict) else {})

    def refuse(self, key: str, value: Any, supported: str) -> None:
        raise CheckpointError(f"{self.where}.{key} is {short(value)}; supported is {supported}. Use a published file")


P = ParamSpec("P")
T = TypeVar("T")


def described(build: Callable[Concatenate[Section, P], T]) -> Callable[Concatenate[Section, P], T]:
    """What makes something of a section, with all that the section's values let fail told as the section's fault."""

    @wraps(build)
    def run(section: Section, *args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return build(section, *args, **kwargs)
        except Ltx2Error:
            raise
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{section.where}: no codec can be built from it ({error!r}). Use a published file"
            ) from error

    return run


def check_numbers(arguments: Mapping[str, Any], where: str) -> None:
    """Raises `CheckpointError` listing the arguments of a constructor with numbers that no codec has.

    Whole numbers are widths, counts, sizes and rates, from 1 on. A kernel covers at least its stride, in released files and
    in any upsampling without holes; so the tensors, which have the kernels' shapes, bound the strides.
    """
    wrong = [f"{name}={short(value)}" for name, value in arguments.items() if not _is_sane(name, value)]
    for stage in ("", "bwe_"):
        strides, kernels = (arguments.get(f"{stage}upsample_{name}", ()) for name in ("factors", "kernel_sizes"))
        if not wrong and any(stride > kernel for stride, kernel in zip(strides, kernels, strict=False)):
            wrong.append(f"{stage}upsample_factors={strides} beyond the kernels {kernels}")
    if wrong:
        raise CheckpointError(
            f"{where}: {'; '.join(wrong)}; supported are finite numbers, whole ones from 1 to {MAX_NUMBER:,}, layers to "
            f"{MAX_LAYERS}. Use a published file"
        )


def _is_sane(name: str, value: Any) -> bool:
    if isinstance(value, list | tuple):
        return len(value) <= MAX_LAYERS and all(_is_sane(name, one) for one in value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return True  # the constructors look at the rest
    if isinstance(value, float):
        return isfinite(value)
    return 1 <= value <= (MAX_LAYERS if name in DEPTHS else MAX_NUMBER)


# --- video ---


def is_diffusion_vae(section: Section) -> bool:
    """True for the VAE whose decoder denoises pixels, False for the convolutional one."""
    return bool(section.only("_class_name", CONVOLUTIONAL, DIFFUSION) == DIFFUSION)


def video_encoder(section: Section) -> dict[str, Any]:
    """Arguments of `AutoencoderKLLTX2Video` that concern its encoder, from the section `vae` in either layout."""
    nested = is_diffusion_vae(section)
    own = section.below("encoder") if nested else section
    latents = own.get("out_channels" if nested else "latent_channels", section.get("latent_channels", 128))
    own.only("dims", 3)
    own.only("norm_layer", "pixel_norm")
    own.only("latent_log_var", "uniform", "constant")  # one channel of log variance, which nothing uses
    layers, compressors = _stages(own, "blocks" if nested else "encoder_blocks", DOWNSAMPLE)
    _check_scales(own, [DOWNSAMPLE[name] for name, _ in compressors])
    widths = [
        latents * prod(options.get("multiplier", 2) for _, options in compressors[: i + 1])
        for i in range(len(compressors))
    ]
    return {
        "in_channels": own.get("in_channels", 3),
        "latent_channels": latents,
        "patch_size": own.get("patch_size", 4),
        "block_out_channels": tuple(widths),
        "down_block_types": ("LTX2VideoDownBlock3D",) * len(compressors),
        "layers_per_block": layers,
        "spatio_temporal_scaling": (True,) * len(compressors),
        "downsample_type": tuple(DOWNSAMPLE[name] for name, _ in compressors),
        "encoder_causal": True,
        "encoder_spatial_padding_mode": _encoder_padding(own),
        "spatial_compression_ratio": geometry.SPACE_SCALE,
        "temporal_compression_ratio": geometry.TIME_SCALE,
    }


def video_decoder(section: Section) -> dict[str, Any]:
    """Arguments of `AutoencoderKLLTX2Video` that concern its decoder, from the flat section `vae`.

    The header lists decoder blocks from high to low resolution, and so does diffusers, but for `upsample_type`.
    """
    layers, compressors = _stages(section, "decoder_blocks", UPSAMPLE)
    kinds = [UPSAMPLE[name] for name, _ in compressors]
    _check_scales(section, kinds)
    factors = tuple(options.get("multiplier", 1) for _, options in compressors)
    base = section.get("decoder_base_channels", 128)
    return {
        "out_channels": section.get("out_channels", 3),
        "decoder_block_out_channels": tuple(base * prod(factors[: i + 1]) for i in range(len(factors))),
        "decoder_layers_per_block": layers,
        "decoder_spatio_temporal_scaling": (True,) * len(factors),
        "decoder_inject_noise": (False,) * len(layers),
        "upsample_type": tuple(reversed(kinds)),
        "upsample_residual": tuple(bool(options.get("residual", False)) for _, options in compressors),
        "upsample_factor": factors,
        "timestep_conditioning": bool(section.get("timestep_conditioning", True)),  # absent means conditioned
        "decoder_causal": bool(section.get("causal_decoder", False)),
        "decoder_spatial_padding_mode": section.only("spatial_padding_mode", "reflect", "zeros"),
    }


def diffusion_decoder(section: Section) -> dict[str, Any]:
    """Arguments of `LTX2VideoDiffusionDecoderModel` from the nested section `vae`."""
    own = section.below("decoder")
    own.only("resampler_kind", "linear")
    ups = own.need("upsamples")
    if prod(up[0][0] for up in ups) != geometry.TIME_SCALE:
        own.refuse("upsamples", ups, f"what makes {geometry.TIME_SCALE} frames of one")
    return {
        "out_channels": own.get("out_channels", 3),
        "latent_channels": own.get("in_channels", 128),
        "patch_size": own.get("patch_size", 4),
        "decoder_head_dim": own.need("head_dim"),
        "decoder_stage_channels": tuple(own.need("stage_channels")),
        "decoder_stage_depths": tuple(own.need("stage_depths")),
        "decoder_stage_kernels": tuple(map(_sizes, own.need("stage_kernels")[: len(ups)])),
        "decoder_upsample_strides": tuple(_sizes(up[0]) for up in ups),
        "decoder_upsample_channel_reductions": tuple(up[1] for up in ups),
        "decoder_stage5_kernel": _sizes(own.need("stage5_kernel")),
        "decoder_t_emb_dim": own.get("t_emb_dim", 384),
        "decoder_timestep_scale_multiplier": float(own.get("timestep_scale_multiplier", 1000.0)),
        "decoder_model_output_type": section.only("model_output_type", "x0", "v"),
        "decoder_num_inference_steps": index(own.get("default_num_inference_steps", 1)),
        "spatial_compression_ratio": geometry.SPACE_SCALE,
        "temporal_compression_ratio": geometry.TIME_SCALE,
    }


def _sizes(values: Sequence[Any]) -> tuple[int, int, int]:
    """Of frames, rows and columns."""
    time, height, width = map(index, values)
    return time, height, width


def _encoder_padding(own: Section) -> str:
    """The general mode governs the encoder too; its own key counts only where that is absent."""
    if "spatial_padding_mode" in own.values:
        return str(own.only("spatial_padding_mode", "zeros", "reflect"))
    return str(own.only("encoder_spatial_padding_mode", "zeros", "reflect"))


def _stages(
    section: Section, key: str, compressors: dict[str, str]
) -> tuple[tuple[int, ...], list[tuple[str, dict[str, Any]]]]:
    """Residual layers per stage, and the compressing blocks between the stages with their options."""
    blocks = list(_named_blocks(section, key))
    layers, between = blocks[::2], blocks[1::2]
    for name, options in layers:
        if name != "res_x" or options.get("inject_noise", False) or "num_layers" not in options:
            section.refuse(key, [name, options], "res_x with num_layers and without noise at every second place")
    for name, options in between:
        if name not in compressors:
            section.refuse(key, [name, options], f"{', '.join(compressors)} between the res_x")
    if len(layers) != len(between) + 1:
        section.refuse(key, [name for name, _ in blocks], "a list that starts and ends with res_x")
    return tuple(options["num_layers"] for _, options in layers), between


def _named_blocks(section: Section, key: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The pairs of a list of blocks; a number in place of options is that of the layers."""
    blocks = section.need(key)
    for block in blocks if isinstance(blocks, list) else [blocks]:
        if not (isinstance(block, list) and len(block) == 2 and isinstance(block[0], str)):
            section.refuse(key, block, "a list of pairs, each of a name and options")
        name, options = block
        yield name, options if isinstance(options, dict) else {"num_layers": options}


def _check_scales(section: Section, kinds: Sequence[str]) -> None:
    time = prod(SCALES[kind][0] for kind in kinds)
    space = section.get("patch_size", 4) * prod(SCALES[kind][1] for kind in kinds)
    if (time, space) != (geometry.TIME_SCALE, geometry.SPACE_SCALE):
        raise CheckpointError(
            f"{section.where}: {space} x {space} pixels of {time} frames per latent; supported are "
            f"{geometry.SPACE_SCALE} x {geometry.SPACE_SCALE} of {geometry.TIME_SCALE}. Use a published video VAE"
        )


# --- audio ---


def audio_vae(section: Section) -> dict[str, Any]:
    """Arguments of `AutoencoderKLLTX2Audio` from the section `audio_vae`. Absent attention means attention."""
    own = section.below("model", "params", "ddconfig")
    front = log_mel(section)
    if len(own.need("ch_mult")) != AUDIO_LEVELS:
        own.refuse("ch_mult", own.need("ch_mult"), f"{AUDIO_LEVELS} levels")
    own.only("double_z", True)
    return {
        "base_channels": own.need("ch"),
        "output_channels": own.only("out_ch", 2),
        "ch_mult": tuple(own.need("ch_mult")),
        "num_res_blocks": own.need("num_res_blocks"),
        "attn_resolutions": tuple(own.get("attn_resolutions", (8, 16, 32))) or None,
        "in_channels": own.only("in_channels", 2),
        "resolution": own.get("resolution", 256),
        "latent_channels": own.need("z_channels"),
        "norm_type": own.only("norm_type", "pixel"),
        "causality_axis": own.only("causality_axis", "height"),
        "mid_block_add_attention": bool(own.get("mid_block_add_attention", True)),
        "sample_rate": front.sample_rate,
        "mel_hop_length": front.hop,
        "mel_bins": front.bins,
        "is_causal": True,
        "double_z": True,
    }


@described
def log_mel(section: Section) -> LogMel:
    """The mel front end from the section `audio_vae`."""
    parameters, audio = section.below("model", "params"), section.below("preprocessing", "audio")
    stft, mel = section.below("preprocessing", "stft"), section.below("preprocessing", "mel")
    rate = parameters.get("sampling_rate", audio.get("sampling_rate", None)) or parameters.need("sampling_rate")
    bins = parameters.below("ddconfig").get("mel_bins", None) or mel.need("n_mel_channels")
    mel.only("n_mel_channels", bins)
    size = stft.get("filter_length", 1024)
    window = stft.get("win_length", size)
    front: dict[str, Any] = {
        "sample_rate": index(rate),
        "n_fft": index(size),
        "window": None if window == size else index(window),
        "hop": index(stft.need("hop_length")),
        "bins": index(bins),
        "lowest_hz": float(mel.get("mel_fmin", 0)),
        "highest_hz": float(mel.get("mel_fmax", rate / 2)),
    }
    check_numbers(front, section.where)
    return LogMel(**front)


def has_bandwidth_extension(section: Section) -> bool:
    """True for the vocoder in two stages of 2.3 and 2.5."""
    return "bwe" in section.values


def vocoder(section: Section, in_channels: int) -> dict[str, Any]:
    """Arguments of `LTX2Vocoder` from the flat section `vocoder`."""
    return _generator(section, in_channels)


def stated_rate(section: Section) -> int | None:
    """Hz of the sound of a vocoder in one stage, where the header says it; it follows from the mel otherwise."""
    rate = section.get("output_sampling_rate", section.get("output_sample_rate", None))
    return None if rate is None else int(rate)


def bandwidth_vocoder(section: Section, in_channels: int, bwe_in_channels: int) -> dict[str, Any]:
    """Arguments of `LTX2VocoderWithBWE` from a section `vocoder` that holds `vocoder` and `bwe`."""
    bwe = section.below("bwe")
    last = {"final_act_fn": None}  # the sum of both stages is clamped, not the second's share
    second = {f"bwe_{key}": value for key, value in (_generator(bwe, bwe_in_channels) | last).items()}
    return (
        _generator(section.below("vocoder"), in_channels)
        | second
        | {
            "filter_length": bwe.need("n_fft"),
            "hop_length": bwe.need("hop_length"),
            "window_length": bwe.get("win_size", bwe.need("n_fft")),
            "num_mel_channels": bwe.need("num_mels"),
            "input_sampling_rate": bwe.need("input_sampling_rate"),
            "output_sampling_rate": bwe.need("output_sampling_rate"),
        }
    )


def _generator(section: Section, in_channels: int) -> dict[str, Any]:
    """Where the header is silent, the vocoder of 2.0 is meant."""
    section.only("stereo", True)
    antialias = section.only("resblock", "1", "AMP1") == "AMP1"
    if antialias and section.need("activation") != "snakebeta":
        section.refuse("activation", section.need("activation"), "'snakebeta'")
    return {
        "in_channels": in_channels,
        "hidden_channels": section.get("upsample_initial_channel", 1024),
        "out_channels": 2,
        "upsample_kernel_sizes": list(section.get("upsample_kernel_sizes", (16, 15, 8, 4, 4))),
        "upsample_factors": list(section.get("upsample_rates", (6, 5, 2, 2, 2))),
        "resnet_kernel_sizes": list(section.get("resblock_kernel_sizes", (3, 7, 11))),
        "resnet_dilations": [
            list(map(index, dilations)) for dilations in section.get("resblock_dilation_sizes", ((1, 3, 5),) * 3)
        ],
        "act_fn": "snakebeta" if antialias else "leaky_relu",
        "antialias": antialias,
        "final_act_fn": _final_activation(section),
        "final_bias": bool(section.get("use_bias_at_final", True)),
    }


def _final_activation(section: Section) -> str | None:
    """A clamp where it is neither tanh nor switched off: with none the second stage hears another sound."""
    if not section.get("apply_final_activation", True):
        return None
    return "tanh" if section.get("use_tanh_at_final", True) else "clamp"


# --- upsamplers ---


def upsampler(section: Section) -> dict[str, Any]:
    """Arguments of `LTX2LatentUpsamplerModel`; the whole `config` of such a file is the section."""
    return {
        "in_channels": section.get("in_channels", 128),
        "mid_channels": section.get("mid_channels", 512),
        "num_blocks_per_stage": section.get("num_blocks_per_stage", 4),
        "dims": section.only("dims", 3, 2),
        "spatial_upsample": bool(section.get("spatial_upsample", True)),
        "temporal_upsample": bool(section.get("temporal_upsample", False)),
        "rational_spatial_scale": float(section.get("spatial_scale", 2.0)),
        "use_rational_resampler": bool(section.get("rational_resampler", False)),
    }
