"""How close the transformer is to the published numbers and to diffusers: largest absolute differences, fp32.

python -m tests.proofs.parity [--out FILE]
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.golden.transformer_cases import CASES, VARIANTS, goldens, inputs, tiny_model
from tests.peers.diffusers_transformer import correct_gate, peer_arguments, peer_of, random_inputs

GOLDEN_BOUND, PEER_BOUND = 5e-5, 2e-5


def golden_difference(variant: str, case: str) -> float:
    """Over the elements that the golden file holds, of both streams."""
    video, audio, perturbations = inputs(variant, case)
    out = tiny_model(variant)(video, audio, perturbations)
    differences = []
    for name, values in out._asdict().items():
        golden, flat = goldens()["golden_outputs"][f"{variant}/{case}"][name], values.double().flatten()
        held = torch.tensor([*golden["first8"], *golden["last4"]], dtype=torch.float64)
        differences.append((torch.cat([flat[:8], flat[-4:]]) - held).abs().max().item())
    return max(differences)


def largest(ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor]) -> float:
    return max((a - b).abs().max().item() for a, b in zip(ours, theirs, strict=True))


def peer_differences(variant: str) -> dict[str, float]:
    """One shared sigma (as diffusers is used); given tokens and two sigmas, and masks with STG, with its gate put right."""
    model = tiny_model(variant)
    video, audio = random_inputs(model.config, batch=2, grid=(3, 2, 2), steps=5, text=4)
    shared = largest(model(video, audio), peer_of(model)(**peer_arguments(video, audio), return_dict=False))
    video, audio, _ = inputs(variant, "joint-masks-stg")
    video = replace(video, attention_mask=None)
    peer = peer_of(model)
    correct_gate(peer, video, audio)
    stg = {"spatio_temporal_guidance_blocks": [1], "perturbation_mask": torch.tensor([1.0, 0.0])}
    arguments = peer_arguments(video, audio)
    given = largest(model(video, audio), peer(**arguments, return_dict=False))
    perturbed = [[], [("SKIP_VIDEO_SELF_ATTN", [1]), ("SKIP_AUDIO_SELF_ATTN", [1])]]
    guided = largest(model(video, audio, perturbed), peer(**arguments, **stg, return_dict=False))
    return {"shared_sigma": shared, "given_tokens_two_sigmas": given, "text_mask_and_stg": guided}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="also write the figures here")
    out = parser.parse_args().out
    figures: dict[str, Any] = {
        "golden": {f"{v}/{c}": golden_difference(v, c) for v in VARIANTS for c in CASES},
        "diffusers": {v: peer_differences(v) for v in ("2.0", "2.3", "2.5", "2.5kv")},
    }
    text = json.dumps(figures, indent=1)
    print(text)
    if out is not None:
        out.write_text(text + "\n")
    worst_peer = max(x for row in figures["diffusers"].values() for x in row.values())
    if max(figures["golden"].values()) > GOLDEN_BOUND or worst_peer > PEER_BOUND:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
