"""LoRA files of every form mean the same change here, in diffusers and in peft; what is no whole LoRA is refused."""

import json
import logging

import pytest
import torch
from safetensors.torch import save_file

from ltx2_train.errors import CheckpointError, ConfigError
from ltx2_train.model import ModelConfig, build_model, initial_weights
from ltx2_train.model.diffusers_names import diffusers_connectors_config
from ltx2_train.model.lora import LoraConfig, add_lora, fuse_lora, linear_weights, start_from_file, trained_adapters
from ltx2_train.model.lora_file import Adapter, LoraForm, held, read_lora, write_lora
from tests.golden.transformer_cases import tiny_model
from tests.peers.diffusers_transformer import peer_arguments, peer_key, peer_of, random_inputs

GENERATIONS = ("2.0", "2.3", "2.5")
MODULES = (
    "patchify_proj",
    "adaln_single.linear",
    "av_ca_a2v_gate_adaln_single.linear",
    "transformer_blocks.0.attn1.to_q",
    "transformer_blocks.0.audio_attn2.to_out.0",
    "transformer_blocks.1.audio_to_video_attn.to_v",
    "transformer_blocks.1.audio_ff.net.0.proj",
)


def drawn(shape, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) / shape[-1] ** 0.5


def adapters(model, modules=MODULES, rank: int = 4, scale: float = 1.0) -> dict[str, Adapter]:
    shapes = {name: weight.shape for name, weight in linear_weights(model).items()}
    return {
        module: Adapter(
            held(drawn((rank, shapes[module][1]), i)), held(drawn((shapes[module][0], rank), 100 + i)), scale
        )
        for i, module in enumerate(modules)
    }


def factors(model, **settings) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    return {module: (one.a.read(), one.b.read()) for module, one in adapters(model, **settings).items()}


def official(model, **settings) -> dict[str, torch.Tensor]:
    """The tensors of a file as the reference writes it."""
    pairs = factors(model, **settings)
    down = {f"diffusion_model.{m}.lora_A.weight": a for m, (a, _) in pairs.items()}
    return down | {f"diffusion_model.{m}.lora_B.weight": b for m, (_, b) in pairs.items()}


def fused_by_hand(model, scale: float = 1.0):
    with torch.no_grad():
        for module, (a, b) in factors(model).items():
            linear_weights(model)[module].add_(scale * b @ a)
    return model


def assert_same(first, second, atol: float = 1e-5):
    for (name, a), (other, b) in zip(first.named_parameters(), second.named_parameters(), strict=True):
        assert name == other
        torch.testing.assert_close(a, b, atol=atol, rtol=0, msg=lambda text, name=name: f"{name}: {text}")


# --- reading ---


@pytest.mark.parametrize("strength", [1.0, 0.6, -1.0])
def test_the_official_form_adds_strength_times_b_times_a(tmp_path, strength):
    model = tiny_model("2.3")
    save_file(official(model), tmp_path / "lora.safetensors")
    assert_same(fuse_lora(tiny_model("2.3"), tmp_path / "lora.safetensors", strength), fused_by_hand(model, strength))


def renamed(tensors, a: str, b: str, alpha: float | None = None):
    out = {k.replace("lora_A", a).replace("lora_B", b): t for k, t in tensors.items()}
    if alpha is not None:
        out |= {k.replace("lora_A.weight", "alpha"): torch.tensor(alpha) for k in tensors if "lora_A" in k}
    return out


@pytest.mark.parametrize("spelling", [("lora_A", "lora_B"), ("lora_down", "lora_up"), ("lora.down", "lora.up")])
def test_alpha_beside_the_factors_scales_by_alpha_over_rank(tmp_path, spelling):
    model = tiny_model("2.3")
    save_file(renamed(official(model), *spelling, alpha=2.0), tmp_path / "lora.safetensors")
    lora = read_lora(tmp_path / "lora.safetensors")
    assert (lora.ranks, lora.scales, lora.notices) == ([4], [0.5], ())
    assert_same(fuse_lora(tiny_model("2.3"), tmp_path / "lora.safetensors"), fused_by_hand(model, 0.5))


def test_without_alpha_the_scale_is_one_and_that_is_said(tmp_path, caplog):
    model = tiny_model("2.3")
    save_file(official(model), tmp_path / "lora.safetensors")
    assert read_lora(tmp_path / "lora.safetensors").scales == [1.0]
    with caplog.at_level(logging.WARNING):
        fuse_lora(model, tmp_path / "lora.safetensors")
    assert "7 of 7 adapters state no alpha" in caplog.text
    assert "does not say which generation" in caplog.text


def in_diffusers_form(tensors):
    return {f"transformer.{peer_key(key.removeprefix('diffusion_model.'))}": t for key, t in tensors.items()}


def test_the_scale_of_diffusers_stands_in_its_header(tmp_path):
    tensors = in_diffusers_form(official(tiny_model("2.3")))
    header = {"transformer.r": 4, "transformer.lora_alpha": 2, "transformer.alpha_pattern": {"attn1.to_q": 8}}
    save_file(tensors, tmp_path / "lora.safetensors", {"lora_adapter_metadata": json.dumps(header)})
    lora = read_lora(tmp_path / "lora.safetensors")
    assert lora.form is LoraForm.diffusers
    assert lora.adapters.keys() == set(MODULES)
    assert {m: one.scale for m, one in lora.adapters.items() if one.scale != 0.5} == {
        "transformer_blocks.0.attn1.to_q": 2.0
    }


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("{", "lora_adapter_metadata is no JSON object, so the scale of the adapters is unknown"),
        ("[]", "lora_adapter_metadata is no JSON object"),
        ({"lora_alpha": "x"}, r"transformer.lora_alpha='x' \(needs a finite number\)"),
        ({"lora_alpha": [2]}, r"transformer.lora_alpha=\[2\] \(needs"),
        ({"lora_alpha": float("nan")}, r"transformer.lora_alpha=nan \(needs"),
        (
            {"lora_alpha": 2, "alpha_pattern": {"attn(": 1}},
            r"transformer.alpha_pattern=\{'attn\(': 1\} \(needs an object of reg",
        ),
        ({"alpha_pattern": {"attn1": "x"}}, r"alpha_pattern=.* and finite numbers\)"),
        ({"alpha_pattern": [1]}, r"alpha_pattern=\[1\] \(needs"),
        ({"r": 0, "use_rslora": "x"}, r"transformer.r=0 \(needs .*; transformer.use_rslora='x' \(needs true or false"),
        ({"r": 16, "lora_alpha": 2}, "has rank 16, its tensors have 4. Header and tensors are of different adapters"),
        ({"r": 4, "rank_pattern": {"attn1.to_q": 8}}, "transformer_blocks.0.attn1.to_q has rank 8, its tensors have 4"),
        ({"r": 4, "lora_alpha": 2, "use_dora": True}, "transformer.use_dora=True .*DoRA is another change"),
    ],
)
def test_a_header_of_diffusers_that_cannot_be_meant_is_refused(tmp_path, header, message):
    """Read as silence it would give every adapter the scale 1."""
    text = header if isinstance(header, str) else json.dumps({f"transformer.{k}": v for k, v in header.items()})
    tensors = in_diffusers_form(official(tiny_model("2.3")))
    save_file(tensors, tmp_path / "lora.safetensors", {"lora_adapter_metadata": text})
    with pytest.raises(CheckpointError, match=message):
        read_lora(tmp_path / "lora.safetensors")


def test_a_header_that_leaves_settings_open_is_silent_about_them(tmp_path):
    tensors = in_diffusers_form(official(tiny_model("2.3")))
    header = {"transformer.r": 4, "transformer.lora_alpha": None, "transformer.use_dora": False, "text_encoder.r": "x."}
    save_file(tensors, tmp_path / "lora.safetensors", {"lora_adapter_metadata": json.dumps(header)})
    assert read_lora(tmp_path / "lora.safetensors").scales == [1.0]


# --- writing ---


@pytest.mark.parametrize("form", LoraForm)
@pytest.mark.parametrize("generation", GENERATIONS)
def test_what_is_written_changes_a_model_as_the_adapters_do(tmp_path, generation, form):
    model = tiny_model(generation)
    path = write_lora(tmp_path / "lora.safetensors", adapters(model, scale=0.5), {}, form=form, dtype=torch.float32)
    lora = read_lora(path)
    assert (lora.form, lora.scales, lora.notices) == (form, [1.0], ())
    assert (lora.metadata["rank"], lora.metadata["alpha"], lora.metadata["alpha_folded"]) == ("4", "2", "true")
    assert_same(fuse_lora(tiny_model(generation), path), fused_by_hand(model, 0.5))


def test_the_scale_is_folded_in_fp32_and_rounded_once(tmp_path):
    model = tiny_model("2.3")
    given = adapters(model, scale=1 / 3)
    write_lora(tmp_path / "lora.safetensors", given, {"step": "7"})
    lora = read_lora(tmp_path / "lora.safetensors")
    assert lora.metadata["step"] == "7"
    for module, adapter in lora.adapters.items():
        assert torch.equal(adapter.a.read(), given[module].a.read().bfloat16())
        assert torch.equal(adapter.b.read(), (given[module].b.read() * (1 / 3)).bfloat16())


def test_the_norm_of_a_change_is_that_of_the_whole_matrix():
    adapter = adapters(tiny_model("2.3"), scale=0.7)["transformer_blocks.1.audio_ff.net.0.proj"]
    assert adapter.norm() == pytest.approx(float(adapter.change().norm()), rel=1e-5)


# --- peers ---


def pipeline_with(peer):
    """As little of a diffusers pipeline as its LoRA loader needs."""
    from diffusers.loaders.lora_pipeline import LTX2LoraLoaderMixin

    class Pipeline(LTX2LoraLoaderMixin):
        transformer = peer
        hf_device_map = None
        components = {"transformer": peer}

    return Pipeline()


@pytest.mark.parametrize("form", LoraForm)
@pytest.mark.parametrize("ranks", [(4,), (4, 2)], ids=["one_rank", "two_ranks"])
@torch.no_grad()
def test_diffusers_loads_it_and_computes_the_same(tmp_path, form, ranks):
    pytest.importorskip("diffusers")
    model = tiny_model("2.3")
    given = adapters(model, MODULES[:4], rank=ranks[0], scale=0.5)
    given |= adapters(model, MODULES[4:], rank=ranks[-1], scale=0.25)
    path = write_lora(tmp_path / "lora.safetensors", given, {}, form=form, dtype=torch.float32)
    peer = peer_of(model)
    pipeline_with(peer).load_lora_weights(str(tmp_path), weight_name=path.name, local_files_only=True)
    layers = [m for m in peer.modules() if hasattr(m, "lora_A")]
    assert len(layers) == len(given)
    assert {scale for layer in layers for scale in layer.scaling.values()} == {1.0}
    video, audio = random_inputs(model.config, batch=2, grid=(3, 2, 2), steps=5, text=4)
    theirs = peer(**peer_arguments(video, audio), return_dict=False)
    for ours, their in zip(fuse_lora(model, path)(video, audio), theirs, strict=True):
        torch.testing.assert_close(ours, their, atol=2e-5, rtol=0)


@torch.no_grad()
def test_peft_loads_the_diffusers_form_and_merges_to_the_same(tmp_path):
    pytest.importorskip("diffusers")
    model = tiny_model("2.5")
    path = write_lora(
        tmp_path / "lora.safetensors", adapters(model, scale=0.5), {}, form=LoraForm.diffusers, dtype=torch.float32
    )
    peer = peer_of(model)
    peer.load_lora_adapter(str(tmp_path), weight_name=path.name, prefix="transformer", local_files_only=True)
    peer.fuse_lora()
    fuse_lora(model, path)
    for name, weight in linear_weights(model).items():
        merged = peer.get_submodule(peer_key(f"{name}.weight").removesuffix(".weight"))
        torch.testing.assert_close(weight, getattr(merged, "base_layer", merged).weight, atol=1e-6, rtol=0)


@torch.no_grad()
def test_adapters_of_connectors_go_to_the_component_that_diffusers_has_for_them(tmp_path):
    pytest.importorskip("diffusers")
    from diffusers.pipelines.ltx2.connectors import LTX2TextConnectors

    model = build_model(ModelConfig(name="tiny"))
    name = "video_embeddings_connector.transformer_1d_blocks.0.attn1.to_q"
    given = adapters(model, (name, MODULES[3]))
    for form in LoraForm:
        path = write_lora(tmp_path / f"{form}.safetensors", given, {}, form=form, dtype=torch.float32)
        assert read_lora(path).adapters.keys() == {name, MODULES[3]}
    peer = LTX2TextConnectors(**arguments_of_connectors(model.config))
    peer.load_lora_adapter(str(tmp_path), weight_name=path.name, prefix="connectors", local_files_only=True)
    (layer,) = [m for m in peer.modules() if hasattr(m, "lora_A")]
    assert layer is peer.video_connector.transformer_blocks[0].attn1.to_q
    assert torch.equal(next(iter(layer.lora_A.values())).weight, given[name].a.read())


def arguments_of_connectors(config):
    return {k: v for k, v in diffusers_connectors_config(config, 2).items() if not k.startswith("_")}


# --- the adapters of a run ---


def wrapped(lora: LoraConfig, seed: int = 0):
    """The tiny model with adapters that change something."""
    config = ModelConfig(name="tiny")
    model = add_lora(build_model(config), lora)
    with torch.no_grad():
        for i, (name, tensor) in enumerate(initial_weights(model, config, seed)):
            value = drawn(tensor.shape, i) if "lora_B" in name or "proj_out.weight" in name else tensor
            model.get_parameter(name).copy_(value)
    return model


@torch.no_grad()
def test_a_fused_model_computes_what_base_and_adapters_do(tmp_path):
    lora = LoraConfig(rank=4, alpha=2)
    trained = wrapped(lora)
    path = tmp_path / "lora.safetensors"
    write_lora(path, trained_adapters(trained.named_parameters(), lora.scale), {}, dtype=torch.float32)
    plain = build_model(ModelConfig(name="tiny"))
    plain.load_state_dict(
        {n.replace(".base_layer", ""): t for n, t in trained.state_dict().items() if "lora_" not in n}
    )
    video, audio = random_inputs(plain.config, 2, (3, 2, 2), 5, 4)
    for fused, beside in zip(fuse_lora(plain, path)(video, audio), trained(video, audio), strict=True):
        torch.testing.assert_close(fused, beside, atol=1e-5, rtol=0)


@pytest.mark.parametrize("alpha", [None, 2.0])
def test_training_starts_from_the_files_change_whatever_the_runs_alpha(tmp_path, alpha):
    first = LoraConfig(rank=4, alpha=8)
    path = tmp_path / "lora.safetensors"
    given = trained_adapters(wrapped(first).named_parameters(), first.scale)
    write_lora(path, given, {"base_generation": "2.5"}, dtype=torch.float32)
    config = LoraConfig(rank=4, alpha=alpha, weights=str(path))
    model = wrapped(config)
    started = trained_adapters(
        start_from_file(initial_weights(model, ModelConfig(name="tiny"), 0), model, config), config.scale
    )
    assert started.keys() == given.keys()
    for module, adapter in started.items():
        torch.testing.assert_close(adapter.change(), given[module].change())


def test_a_start_of_another_rank_or_of_other_modules_is_refused(tmp_path):
    first = LoraConfig(rank=4)
    given = trained_adapters(wrapped(first).named_parameters(), first.scale)
    path = write_lora(tmp_path / "lora.safetensors", given, {})
    attention = r"transformer\.transformer_blocks\.\d+\.attn1\.to_q"
    for config, message in (
        (LoraConfig(rank=2, weights=str(path)), "of rank 4, but lora.rank=2"),
        (LoraConfig(rank=4, weights=str(path), targets=[attention]), "differ in 54 modules"),
    ):
        with pytest.raises(CheckpointError, match=message):
            list(start_from_file(iter(()), add_lora(build_model(ModelConfig(name="tiny")), config), config))


# --- what is refused ---


def without(key: str):
    return lambda tensors: tensors.pop(f"diffusion_model.{MODULES[3]}.{key}.weight")


def poisoned(tensors):
    tensors[f"diffusion_model.{MODULES[3]}.lora_B.weight"][0, 0] = float("nan")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("lora_B"), "1 modules lack A or B: transformer_blocks.0.attn1.to_q"),
        (without("lora_A"), "1 modules lack A or B"),
        (poisoned, "not finite in transformer_blocks.0.attn1.to_q"),
        (lambda t: t.update({"diffusion_model.x.dora_scale": torch.ones(1)}), "1 of 15 keys are no part of an adapter"),
        (lambda t: t.update({"transformer.proj_in.lora_A.weight": torch.ones(4, 8)}), "mixes LoRA forms"),
        (lambda t: t.update({"diffusion_model.x.lora_down.weight": torch.ones(4, 8)}), "mixes LoRA forms"),
        (
            lambda t: t.update({f"diffusion_model.{MODULES[0]}.lora_A.weight": torch.ones(3, 8)}),
            r"A \[3, 8\] B \[40, 4\]",
        ),
        (
            lambda t: t.update({f"diffusion_model.{MODULES[0]}.alpha": torch.tensor(float("inf"))}),
            "not one finite number",
        ),
        (
            lambda t: t.update({f"diffusion_model.{MODULES[0]}.alpha": torch.ones(3)}),
            "alpha of patchify_proj is not one finite number",
        ),
        (
            lambda t: t.update({k: v.int() for k, v in t.items() if MODULES[0] in k}),
            r"2 weights are .* not read: diffusion_model.patchify_proj.lora_A.weight is torch.int32",
        ),
        (lambda t: t.clear(), "no tensors"),
    ],
)
def test_what_is_no_whole_lora_is_refused_and_changes_nothing(tmp_path, change, message):
    model, path = tiny_model("2.3"), tmp_path / "lora.safetensors"
    tensors = official(model)
    change(tensors)
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=message):
        fuse_lora(model, path)
    assert_same(model, tiny_model("2.3"), atol=0)


def test_a_lora_of_another_generation_is_refused_though_every_shape_fits(tmp_path):
    names = ("transformer_blocks.0.attn1.to_q", "transformer_blocks.1.audio_attn1.to_v")
    old, new = tiny_model("2.0"), tiny_model("2.3")
    path = write_lora(tmp_path / "lora.safetensors", adapters(old, names), {"base_generation": "2.0"})
    with pytest.raises(CheckpointError, match=r"trained on LTX 2\.0, this model is 2\.3"):
        fuse_lora(new, path)
    fuse_lora(old, path)


def test_modules_and_shapes_that_the_model_lacks_are_listed(tmp_path):
    gated = adapters(tiny_model("2.3"), ("transformer_blocks.0.attn1.to_gate_logits", *MODULES))
    path = write_lora(tmp_path / "lora.safetensors", gated, {})
    with pytest.raises(CheckpointError, match="2 of 8 adapters do not fit.*to_gate_logits is not a linear layer"):
        fuse_lora(tiny_model("2.0"), path)
    wide = {"patchify_proj": Adapter(held(torch.ones(2, 16)), held(torch.ones(40, 2)))}
    write_lora(path, wide, {})
    with pytest.raises(CheckpointError, match=r"patchify_proj changes \[40, 16\], the model has \[40, 8\]"):
        fuse_lora(tiny_model("2.3"), path)


def test_a_pickle_and_a_strength_that_is_no_number_are_refused(tmp_path):
    torch.save({"a": 1}, tmp_path / "lora.safetensors")
    with pytest.raises(CheckpointError, match="pickle"):
        read_lora(tmp_path / "lora.safetensors")
    with pytest.raises(ConfigError, match="strength=nan"):
        fuse_lora(tiny_model("2.3"), tmp_path / "lora.safetensors", float("nan"))
