"""Costs counted without computing: what hooks see in a real forward, and how they grow."""

from typing import Any

import pytest
import torch

from calib.probe import probe
from dmqexport.models.family import family_of
from dmqexport.models.footprint import measure_footprint
from dmqexport.models.random_weights import CONFIG, build_denoiser, locate_architecture
from dmqexport.models.weight_files import read_json

SMALL: dict[str, Any] = {
    "_class_name": "UNet2DConditionModel",
    "sample_size": 16,
    "block_out_channels": [32, 64],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "cross_attention_dim": 24,
    "attention_head_dim": 4,
}
#: Multiply-accumulates of one evaluation in units of 10⁹, as the papers and model cards state them.
PUBLISHED = {"dit-xl-2-256": 118.6, "ddpm-cifar10": 6.1, "sd14": 401.6}


def test_layers_are_those_of_a_real_forward() -> None:
    denoiser, family = build_denoiser(SMALL), family_of(SMALL["_class_name"], SMALL)
    inputs = family.example_inputs(1)

    def run(index: int) -> torch.Tensor:
        changed = {"sample": inputs["sample"] + index, "timestep": inputs["timestep"] + index}
        with torch.no_grad():
            return family.call(denoiser, {**inputs, **changed})

    found, counted = probe(denoiser, run), measure_footprint(denoiser, family)
    assert {layer.name: layer.macs for layer in counted.layers} == {layer.name: layer.macs for layer in found.layers}
    assert counted.parameters == sum(parameter.numel() for parameter in denoiser.parameters())
    assert counted.macs > sum(layer.macs for layer in counted.layers), "attention multiplies too"


def test_where_weights_lie_changes_nothing() -> None:
    family = family_of(SMALL["_class_name"], SMALL)
    assert measure_footprint(build_denoiser(SMALL), family) == measure_footprint(build_denoiser(SMALL, "meta"), family)


def test_memory_is_that_of_activations() -> None:
    small = measure_footprint(build_denoiser(SMALL, "meta"), family_of(SMALL["_class_name"], SMALL))
    wide = {**SMALL, "sample_size": 32}
    large = measure_footprint(build_denoiser(wide, "meta"), family_of(wide["_class_name"], wide))
    assert large.parameters == small.parameters
    assert 3.5 < large.live_bytes / small.live_bytes < 4.5
    assert 3.5 < large.output_bytes / small.output_bytes < 4.5
    # Scores of attention grow with the square of the positions.
    assert large.graph_bytes / small.graph_bytes > 8
    largest = max(layer.outputs for layer in small.layers)
    assert 2 * 4 * largest < small.live_bytes < 12 * 4 * largest


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_multiplications_are_the_published_ones(name: str) -> None:
    config = read_json(locate_architecture(name).folder / CONFIG)
    counted = measure_footprint(build_denoiser(config, "meta"), family_of(config["_class_name"], config))
    assert counted.macs / 1e9 == pytest.approx(PUBLISHED[name], rel=0.03)
