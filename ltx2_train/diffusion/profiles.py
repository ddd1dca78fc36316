"""Sampler profiles: everything that decides how a model is sampled, under one name that goes into the checkpoint."""

from dataclasses import asdict, dataclass, field, fields
from enum import StrEnum
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from torch import Tensor

from ltx2_train.diffusion.choice import chosen
from ltx2_train.diffusion.guidance import GuidanceConfig
from ltx2_train.diffusion.sampler import (
    DEFAULT_ETA,
    TWO_CALLS,
    Denoiser,
    Draw,
    Restore,
    Sampler,
    SamplerSettings,
    State,
    log_levels,
    nothing_given,
    sample_euler,
    sample_euler_ancestral,
    sample_gradient_estimating,
    sample_heun,
    sample_res_2s,
)
from ltx2_train.diffusion.sigmas import (
    DISTILLED,
    DISTILLED_REFINE,
    MAX_TOKENS,
    beta_schedule,
    custom_schedule,
    linear_quadratic_schedule,
    ltx2_schedule,
    shifted_schedule,
)
from ltx2_train.errors import ConfigError
from ltx2_train.model.modality import Stream


class Schedule(StrEnum):
    """Names of the sigma schedules."""

    ltx2 = "ltx2"
    shifted = "shifted"
    linear_quadratic = "linear_quadratic"
    beta = "beta"
    distilled = "distilled"
    distilled_refine = "distilled_refine"
    custom = "custom"


class TokenRule(StrEnum):
    """From how many tokens a schedule's shift follows."""

    fixed = "fixed"
    actual = "actual"


@dataclass(kw_only=True, slots=True)
class SamplerProfile:
    """How a model is sampled: the same in training evaluations and on the command line."""

    name: str
    """What it is called."""
    steps: int = 30
    """Steps of the sampler. A step calls the model once; twice with heun and res_2s (`calls` is their number)."""
    sampler: Sampler = Sampler.euler
    """euler; euler_ancestral: Euler that adds noise on the way; heun and res_2s: second order, two calls of the model in a
    step; gradient_estimating: Euler by a velocity that learns from the last one."""
    settings: SamplerSettings = field(default_factory=SamplerSettings)
    """What single samplers leave open."""
    schedule: Schedule = Schedule.ltx2
    """ltx2: shifted, and stretched to end at 0.1 before 0; shifted: not stretched; linear_quadratic; beta: dense at both
    ends; distilled: the fixed eight steps of distilled models; distilled_refine: their fixed three of the second stage,
    which starts from latents; custom: `custom_sigmas`."""
    custom_sigmas: list[float] = field(default_factory=list)
    """Descending sigmas in [0, 1], one more than there are steps (custom). A schedule may end above 0."""
    tokens: TokenRule = TokenRule.fixed
    """fixed: the shift of 4096 tokens for every clip, as the released models are used; actual: that of the clip's own
    video token count (audio's where there is no video), as in training. For ltx2 and shifted."""
    video: GuidanceConfig = field(default_factory=GuidanceConfig)
    """Guidance of the video stream."""
    audio: GuidanceConfig = field(default_factory=GuidanceConfig)
    """Guidance of the audio stream."""
    generations: list[str] = field(default_factory=list)
    """Generations of LTX-2 that it is made for ("2.0", "2.3", "2.5"). Empty: any model."""

    def __post_init__(self) -> None:
        self.sampler = chosen(Sampler, self.sampler, "sampler")
        self.schedule = chosen(Schedule, self.schedule, "schedule")
        self.tokens = chosen(TokenRule, self.tokens, "tokens")
        self._check_steps()
        if self.settings.eta is not None and self.sampler not in DEFAULT_ETA:
            raise ConfigError(
                f"settings.eta={self.settings.eta}: {self.sampler} adds no noise; leave it out, or set sampler to one of "
                f"{', '.join(DEFAULT_ETA)}"
            )
        for name, guidance in (("video", self.video), ("audio", self.audio)):
            if guidance.skip_step and self.sampler in TWO_CALLS:
                raise ConfigError(
                    f"{name}.skip_step={guidance.skip_step}: {self.sampler} calls the model twice a step, and the second "
                    "call needs an answer of its own; set it to 0, or sampler to euler"
                )

    def _check_steps(self) -> None:
        if self.steps < 1:
            raise ConfigError(f"steps={self.steps}: must be >= 1")
        if self.custom_sigmas and self.schedule is not Schedule.custom:
            raise ConfigError(f"custom_sigmas: have no effect with schedule={self.schedule}; set schedule=custom")
        if self.schedule in (Schedule.distilled, Schedule.distilled_refine, Schedule.custom):
            fixed = len(self.sigmas(MAX_TOKENS)) - 1
            if self.steps != fixed:
                raise ConfigError(f"steps={self.steps}: the {self.schedule} schedule has {fixed}")

    def sigmas(self, tokens: int) -> Tensor:
        """(steps + 1,) fp32, descending, for a clip of `tokens` tokens: from 1 to 0 but for distilled_refine and custom."""
        shift_tokens = tokens if self.tokens == TokenRule.actual else MAX_TOKENS
        match self.schedule:
            case Schedule.ltx2:
                return ltx2_schedule(self.steps, shift_tokens)
            case Schedule.shifted:
                return shifted_schedule(self.steps, shift_tokens)
            case Schedule.linear_quadratic:
                return linear_quadratic_schedule(self.steps)
            case Schedule.beta:
                return beta_schedule(self.steps)
            case Schedule.distilled:
                return custom_schedule(DISTILLED)
            case Schedule.distilled_refine:
                return custom_schedule(DISTILLED_REFINE)
            case Schedule.custom:
                return custom_schedule(self.custom_sigmas)

    @property
    def calls(self) -> int:
        """How often the denoiser is called for one clip."""
        sigmas = self.sigmas(MAX_TOKENS).tolist()
        ends_at_data = sigmas[-1] == 0
        match self.sampler:
            case Sampler.heun:
                return 2 * self.steps - ends_at_data
            case Sampler.res_2s:
                return 2 * (len(log_levels(sigmas)) - 1) + ends_at_data
            case _:
                return self.steps

    @property
    def passes_follow_tokens(self) -> bool:
        """Whether clips of other sizes can need other passes of guidance at the same step."""
        follows = self.tokens is TokenRule.actual and self.schedule in (Schedule.ltx2, Schedule.shifted)
        return follows and any(g.sigma_low > 0 or g.sigma_high < 1 for g in (self.video, self.audio))

    def integrate(
        self, denoise: Denoiser, noisy: State, sigmas: Tensor, draw: Draw, restore: Restore = nothing_given
    ) -> State:
        """`noisy`, which is at sigmas[0], brought down to sigmas[-1] by the profile's sampler.

        `draw` gives new standard normal noise of the state's shape at every call; only samplers that add noise call it.
        `restore` puts what is given back into a state; `denoise` does so in its own answers.
        """
        settings, eta = self.settings, self.settings.eta_of(self.sampler)
        match self.sampler:
            case Sampler.euler:
                return sample_euler(denoise, noisy, sigmas)
            case Sampler.euler_ancestral:
                return sample_euler_ancestral(denoise, noisy, sigmas, draw, restore, eta=eta, s_noise=settings.s_noise)
            case Sampler.heun:
                return sample_heun(denoise, noisy, sigmas)
            case Sampler.res_2s:
                return sample_res_2s(denoise, noisy, sigmas, draw, restore, eta=eta, bong=settings.bong)
            case Sampler.gradient_estimating:
                return sample_gradient_estimating(denoise, noisy, sigmas, gamma=settings.gamma)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for a checkpoint."""
        return _plain(asdict(self))

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> "SamplerProfile":
        """What `to_dict` wrote; a part or a field that it lacks has its default.

        Raises `ConfigError` on a missing name, and on a field that is unknown or out of its bound.
        """
        parts = {"settings": SamplerSettings, "video": GuidanceConfig, "audio": GuidanceConfig}
        built = {name: _from_fields(owner, plain.get(name, {}), name) for name, owner in parts.items()}
        return _from_fields(cls, {**plain, **built}, "sampler profile")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return value.value if isinstance(value, StrEnum) else value


def _from_fields(owner: type, plain: dict[str, Any], name: str) -> Any:
    if not isinstance(plain, dict):
        raise ConfigError(f"{name}={plain!r}: must be a mapping of its fields")
    known = {f.name for f in fields(owner)}
    if unknown := set(plain) - known:
        raise ConfigError(f"{name}: unknown fields {sorted(unknown)}; known are {sorted(known)}")
    hints = get_type_hints(owner)
    for key, value in plain.items():
        if not _is_of(value, hints[key]):
            kind = hints[key].__name__ if isinstance(hints[key], type) and not get_args(hints[key]) else hints[key]
            raise ConfigError(f"{name}: {key}={value!r} is not of its kind, {kind}")
    try:
        return owner(**plain)
    except TypeError as error:
        raise ConfigError(f"{name}: {error}") from error


def _is_of(value: Any, hint: Any) -> bool:
    """Whether a plain value may stand in a field of that type."""
    if get_origin(hint) is list:
        return isinstance(value, list) and all(_is_of(one, get_args(hint)[0]) for one in value)
    if options := get_args(hint):
        return any(_is_of(value, option) for option in options)
    if hint in (int, float):
        return isinstance(value, int if hint is int else int | float) and not isinstance(value, bool)
    return isinstance(value, str if issubclass(hint, StrEnum) else hint)


GENERATIONS = ["2.0", "2.3", "2.5"]
VIDEO_CFG, AUDIO_CFG = 3.0, 7.0


def _released(
    name: str, steps: int, stg_block: int, generations: list[str], tokens: TokenRule = TokenRule.fixed
) -> SamplerProfile:
    """The setting in which a released (not distilled) model is used."""
    video, audio = (
        GuidanceConfig(cfg=cfg, stg=1.0, stg_blocks=[stg_block], modality=3.0, rescale=0.7)
        for cfg in (VIDEO_CFG, AUDIO_CFG)
    )
    return SamplerProfile(name=name, steps=steps, generations=generations, tokens=tokens, video=video, audio=audio)


def _distilled(generation: str, sampler: Sampler = Sampler.euler) -> SamplerProfile:
    """The setting in which a distilled model is used in its first stage: eight steps without guidance."""
    return SamplerProfile(
        name=f"distilled_{generation}",
        steps=len(DISTILLED) - 1,
        schedule=Schedule.distilled,
        sampler=sampler,
        generations=[generation],
    )


PROFILES: dict[str, SamplerProfile] = {
    p.name: p
    for p in (
        _released("ltx2_2.0", steps=40, stg_block=29, generations=["2.0"]),
        _released("ltx2_2.3", steps=30, stg_block=28, generations=["2.3"]),
        _released("ltx2_2.5", steps=30, stg_block=28, generations=["2.5"]),
        # Few steps of second order, without skip guidance: 31 calls of three passes.
        SamplerProfile(
            name="hq",
            steps=15,
            sampler=Sampler.res_2s,
            tokens=TokenRule.actual,
            video=GuidanceConfig(cfg=VIDEO_CFG, modality=3.0, rescale=0.45),
            audio=GuidanceConfig(cfg=AUDIO_CFG, modality=3.0, rescale=1.0),
            generations=GENERATIONS,
        ),
        _distilled("2.0"),
        _distilled("2.3"),
        _distilled("2.5", Sampler.euler_ancestral),
        # What the LTX-2 pipeline of diffusers does unless it is told otherwise: the shift follows the clip's size.
        _released("diffusers", steps=30, stg_block=28, generations=GENERATIONS, tokens=TokenRule.actual),
        # For a small model trained from scratch: its own shift, down to 0 evenly, and text guidance alone.
        SamplerProfile(
            name="demo",
            steps=24,
            schedule=Schedule.shifted,
            tokens=TokenRule.actual,
            video=GuidanceConfig(cfg=2.0),
            audio=GuidanceConfig(cfg=2.0),
        ),
    )
}


FILES = (".yaml", ".yml", ".json")


def is_file(name: str) -> bool:
    """Whether a profile is named by the place of a file."""
    return name.endswith(FILES)


def profile(name: str) -> SamplerProfile:
    """A copy of the profile of that name, or what a file says (`is_file`). Raises `ConfigError`."""
    if is_file(name):
        return _read(Path(name))
    if name not in PROFILES:
        raise ConfigError(
            f"sampler profile {name!r}: not known; choose one of {', '.join(PROFILES)}, or name a file "
            f"({', '.join(FILES)}) with one of your own"
        )
    return SamplerProfile.from_dict(PROFILES[name].to_dict())


def _read(path: Path) -> SamplerProfile:
    """A profile from a file with its fields, beside those of `base` if that names one. It is called as the file is."""
    import yaml

    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(
            f"sampler profile {path}: cannot be read ({error}). Name a YAML file with its fields"
        ) from error
    if not isinstance(found, dict):
        raise ConfigError(
            f"sampler profile {path}: no mapping. Write fields such as `steps: 20`, or `base: NAME` first"
        )
    try:
        return SamplerProfile.from_dict(_filled(found, path.stem))
    except ConfigError as error:
        raise ConfigError(f"sampler profile {path}: {error}") from error


def _filled(found: dict[str, Any], name: str) -> dict[str, Any]:
    """What a file says, with the fields of its base, and as many steps as its own sigmas have."""
    base, sigmas = found.get("base"), found.get("custom_sigmas")
    plain = {} if base is None else profile(str(base)).to_dict()
    plain["name"] = name
    if isinstance(sigmas, list):
        plain |= {"schedule": "custom", "steps": len(sigmas) - 1}
    for key, value in found.items():
        if key != "base":
            both = isinstance(value, dict) and isinstance(plain.get(key), dict)
            plain[key] = plain[key] | value if both else value
    return plain


@dataclass(frozen=True, slots=True)
class Fit:
    """What a model is, as far as a profile has to fit it."""

    generation: str
    """ "2.0", "2.3" or "2.5"; one of no known generation may be sampled with any profile."""
    streams: frozenset[Stream]
    """What it makes."""
    blocks: int
    """Of the transformer."""


def check_fits(chosen_profile: SamplerProfile, model: Fit) -> None:
    """Raises `ConfigError` for a profile that the model cannot be sampled with as it says. It names those that fit."""
    if (reason := _misfit(chosen_profile, model)) is None:
        return
    fitting = [p.name for p in PROFILES.values() if _misfit(p, model) is None]
    raise ConfigError(
        f"sampler profile {chosen_profile.name}: {reason}; choose one of {', '.join(fitting)}, or write one of your own"
    )


def _misfit(chosen_profile: SamplerProfile, model: Fit) -> str | None:
    """Why the model cannot be sampled so; None: it can."""
    made_for = chosen_profile.generations
    if made_for and model.generation in GENERATIONS and model.generation not in made_for:
        return f"made for LTX-{' and '.join(made_for)}, and this model is of generation {model.generation}"
    for stream in sorted(model.streams):
        guidance = chosen_profile.video if stream is Stream.video else chosen_profile.audio
        if guidance.modality_weight and len(model.streams) == 1:
            return f"guides {stream} by the other stream (modality {guidance.modality:g}), and this model has {stream} alone"
        if guidance.stg and (beyond := [block for block in guidance.stg_blocks if block >= model.blocks]):
            return f"skips the self-attention of block {beyond[0]}, and this model has blocks 0 to {model.blocks - 1}"
    return None
