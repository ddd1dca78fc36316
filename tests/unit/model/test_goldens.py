"""The transformer gives the published architecture's numbers."""

import pytest
import torch

from ltx2_train.model import ModelConfig, TextConditioned, Transformer, build_model, named_config
from ltx2_train.model.weights import CONNECTOR_NAMES
from tests.golden.transformer_cases import CASES, VARIANTS, goldens, inputs, tiny_model


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_outputs_equal_the_golden_numbers(variant: str, case: str):
    video, audio, perturbations = inputs(variant, case)
    velocity = tiny_model(variant)(video, audio, perturbations)
    for name, out in velocity._asdict().items():
        golden = goldens()["golden_outputs"][f"{variant}/{case}"][name]
        flat = out.double().flatten()
        torch.testing.assert_close(flat[:8], torch.tensor(golden["first8"]).double(), atol=5e-5, rtol=0)
        torch.testing.assert_close(flat[-4:], torch.tensor(golden["last4"]).double(), atol=5e-5, rtol=0)
        assert abs(flat.sum() - golden["sum"]) < 1e-5 * golden["sumsq"]
        assert abs(flat.square().sum() - golden["sumsq"]) < 1e-5 * golden["sumsq"]


@pytest.mark.parametrize("variant", ["2.0", "2.3", "2.5"])
def test_keys_and_shapes_are_the_published_ones(variant: str):
    """Blocks are listed once in the golden table, with a count."""
    found = {name: list(p.shape) for name, p in tiny_model(variant).state_dict().items()}
    table = goldens()["tiny_state_dicts"][variant]
    expected = {}
    for key, entry in table.items():
        for i in range(2) if "{i}" in key or ".i." in key else (None,):
            expected[key if i is None else key.replace("{i}", str(i)).replace(".i.", f".{i}.")] = entry["shape"]
    assert found == expected


@pytest.mark.parametrize(
    ("name", "tensors", "parameters"),
    [
        ("ltx2_19b", 3510, 18_876_174_592),
        ("ltx2_3_22b", 4186, 18_988_838_144),
        ("ltx2_5_22b", 4091, 18_987_859_200),
    ],
)
def test_full_size_counts_are_the_published_ones(name: str, tensors: int, parameters: int):
    with torch.device("meta"):
        model = Transformer(named_config(name))
    assert len(model.state_dict()) == tensors
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize(
    ("name", "video", "audio"),
    [("ltx2_19b", 13_041_520_768, 3_265_980_544), ("ltx2_5_22b", 13_123_337_344, 3_286_408_320)],
)
def test_single_stream_counts_are_the_published_ones(name: str, video: int, audio: int):
    with torch.device("meta"):
        sizes = [
            sum(p.numel() for p in Transformer(named_config(name), **streams).parameters())
            for streams in ({"audio": False}, {"video": False})
        ]
    assert sizes == [video, audio]


@pytest.mark.parametrize(
    ("name", "tensors", "parameters"), [("ltx2_19b", 58, 708_940_800), ("ltx2_3_22b", 258, 2_016_166_400)]
)
def test_connector_counts_are_the_published_ones(name: str, tensors: int, parameters: int):
    with torch.device("meta"):
        model = build_model(ModelConfig(name=name))
    assert isinstance(model, TextConditioned)
    assert len(model.connectors.state_dict()) == tensors
    assert sum(p.numel() for p in model.connectors.parameters()) == parameters
    assert all(key.startswith(CONNECTOR_NAMES) for key in model.connectors.state_dict())
