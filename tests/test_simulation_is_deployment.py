"""The promise of this project: the integers that calibration simulates are the integers that the graph computes."""

from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from hypothesis import given, settings
from hypothesis import strategies as st
from simulation_fixture import (
    ALLOWED_FLIPS,
    OUTPUT_TOLERANCE,
    Agreement,
    Exported,
    PlanSampler,
    canonical_graph,
    export,
    export_rotated,
    float_graph,
    inputs_on_ties,
    observe_ranges,
    quantizer_taps,
    relative_difference,
    run_graph,
    teacher_forced,
)
from simulation_models import DeepDenoiser, RotatedDenoiser, ShallowDenoiser, random_inputs

from calib.bit_allocation import uniform
from calib.freeze import freeze
from calib.observer import ActivationStatistics, Observer
from calib.probe import probe
from calib.quantizer import simulate
from calib.rotation import rotated_layers, unrotated
from calib.sampling import CalibrationSet, TrajectoryRecorder
from calib.timestep_table import equal_groups, used_rows
from dmqexport.errors import CalibrationError
from dmqexport.models import emoji
from dmqexport.models.family import bind_call
from dmqexport.models.unet2d_condition import UNet2DConditionFamily
from dmqexport.quant_plan import QuantPlan
from dmqexport.quant_types import BitWidths
from dmqexport.quant_weights import QuantWeights

FAMILY = UNet2DConditionFamily({"sample_size": 8, "in_channels": 4, "cross_attention_dim": 128})


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _exported(module: type[torch.nn.Module], folder: Path) -> Exported:
    torch.manual_seed(5)
    exported = export(module(), folder, random_inputs(3, seed=1))
    observe_ranges(exported, random_inputs(8, seed=2))
    return exported


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return _exported(DeepDenoiser, tmp_path_factory.mktemp("deep"))


@pytest.fixture(scope="module")
def shallow(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return _exported(ShallowDenoiser, tmp_path_factory.mktemp("shallow"))


def check(agreement: Agreement, tolerance: float = OUTPUT_TOLERANCE) -> None:
    """Codes equal everywhere but at ties, and there one step apart; outputs equal to float rounding."""
    assert agreement.codes > 0
    assert agreement.flips <= ALLOWED_FLIPS * agreement.codes, agreement
    assert agreement.worst_flip <= 1
    check_outputs(agreement, tolerance)


def check_outputs(agreement: Agreement, tolerance: float = OUTPUT_TOLERANCE) -> None:
    assert agreement.outputs
    far = {name: value for name, value in agreement.outputs.items() if value > tolerance}
    assert not far


def quantizers(plan: QuantPlan) -> int:
    """How many, those of remainders too."""
    return len(plan.activations()) + sum(segment.remainder for layer in plan.layers for segment in layer.segments)


ROWS = (1, 2, 10, 50)
ATTENTION_BITS = (None, 8, 6, 4)


@pytest.mark.parametrize("seed", range(24))
def test_random_plans_teacher_forced(deep: Exported, tmp_path: Path, seed: int) -> None:
    """Each layer has its own widths, rows and zero_points; every quantizer and operator is compared on its own."""
    sampler = PlanSampler(deep, seed, ROWS[seed % 4])
    plan = sampler.plan(tmp_path / "codes", attention_bits=ATTENTION_BITS[seed // 4 % 4])
    agreement, _ = teacher_forced(deep, plan, tmp_path / "codes", random_inputs(1 + seed % 5, seed))
    assert agreement.quantizers == quantizers(plan)
    check(agreement)


@pytest.mark.parametrize("activation_bits", [*range(2, 9), None])
@pytest.mark.parametrize("weight_bits", range(2, 9))
def test_every_pair_of_widths_teacher_forced(
    shallow: Exported, tmp_path: Path, weight_bits: int, activation_bits: int | None
) -> None:
    sampler = PlanSampler(shallow, 100 * weight_bits + (activation_bits or 0), 5)
    plan = sampler.plan(tmp_path / "codes", bits=(weight_bits, activation_bits), attention_bits=activation_bits)
    agreement, _ = teacher_forced(shallow, plan, tmp_path / "codes", random_inputs(4, weight_bits))
    assert agreement.quantizers == quantizers(plan)
    check(agreement) if plan.activations() else check_outputs(agreement)


@pytest.mark.parametrize("rows", [1, 10])
@pytest.mark.parametrize("bits", range(2, 9))
def test_inputs_on_ties_teacher_forced(shallow: Exported, tmp_path: Path, bits: int, rows: int) -> None:
    """Where an order of operations, a reciprocal or another rounding would show: half way between two codes."""
    plan = PlanSampler(shallow, bits, rows).plan(tmp_path / "codes", bits=(4, bits), attention_bits=bits)
    agreement, _ = teacher_forced(shallow, plan, tmp_path / "codes", inputs_on_ties(plan, 6, bits))
    assert agreement.flips == 0
    check_outputs(agreement)


def test_one_table_for_every_rank_and_width_teacher_forced(shallow: Exported, tmp_path: Path) -> None:
    plan = PlanSampler(shallow, 1, 10).one_table_plan(tmp_path / "codes")
    agreement, _ = teacher_forced(shallow, plan, tmp_path / "codes", random_inputs(6, 1))
    assert agreement.flips == 0
    check_outputs(agreement)


@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(1, 50),
    batch=st.integers(1, 6),
    attention_bits=st.sampled_from([None, *range(2, 9)]),
)
@settings(deadline=None, derandomize=True, max_examples=40)
def test_end_to_end(
    shallow: Exported,
    tmp_path_factory: pytest.TempPathFactory,
    seed: int,
    rows: int,
    batch: int,
    attention_bits: int | None,
) -> None:
    """The whole simulated model against the whole graph, on a model where no layer feeds another."""
    codes = tmp_path_factory.getbasetemp() / "end_to_end_codes"
    plan = PlanSampler(shallow, seed, rows).plan(codes, attention_bits=attention_bits)
    inputs = random_inputs(batch, seed % 2**31)
    model = canonical_graph(shallow, plan, codes)
    taps = quantizer_taps(model, plan)
    results = run_graph(model, inputs, [item.codes for item in taps.values()])
    with torch.no_grad(), simulate(shallow.denoiser, plan, QuantWeights(codes)) as context:
        context.codes = {}
        simulated = shallow.denoiser(**inputs)
    agreement = Agreement()
    for name, _ in plan.activations():
        agreement.add_codes(context.codes[name], results[str(taps[name].codes.name)])
    # Only an attention's probabilities depend on a sum; whoever flips one there must still be one step off.
    assert agreement.flips <= ALLOWED_FLIPS * agreement.codes + (attention_bits is not None)
    assert agreement.worst_flip <= 1
    if agreement.flips == 0:
        assert relative_difference(simulated.numpy(), results["out_sample"]) < OUTPUT_TOLERANCE


@pytest.mark.parametrize("bits", [(4, 4), (8, 8), (3, None)], ids=str)
def test_rotated_inputs(tmp_path: Path, bits: tuple[int, int | None]) -> None:
    """The float graph is the model as it was; the quantized one rotates what the codes were made for."""
    inputs = random_inputs(4, seed=1)
    torch.manual_seed(5)
    expected = RotatedDenoiser()(**inputs).detach()
    torch.manual_seed(5)
    exported = export_rotated(tmp_path, inputs)
    denoiser = exported.denoiser
    assert sorted(rotated_layers(denoiser).values()) == [4, 16]
    graph = ir.load(exported.graph)
    assert not any("otation" in name for name in graph.graph.initializers)
    floats = run_graph(graph, inputs, [])
    assert relative_difference(expected.numpy(), floats["out_sample"]) < OUTPUT_TOLERANCE

    codes = tmp_path / "codes"
    plan = PlanSampler(exported, 0, 5).plan(codes, bits=bits)
    agreement, _ = teacher_forced(exported, plan, codes, inputs)
    assert agreement.quantizers == quantizers(plan)
    check(agreement) if plan.activations() else check_outputs(agreement)
    results = run_graph(canonical_graph(exported, plan, codes), inputs, [])
    with torch.no_grad(), simulate(denoiser, plan, QuantWeights(codes)):
        simulated = denoiser(**inputs)
    # A tie that falls the other way before a second layer moves its result by a step; there is none here.
    assert relative_difference(simulated.numpy(), results["out_sample"]) < OUTPUT_TOLERANCE
    with unrotated(denoiser), pytest.raises(CalibrationError, match=r"net\.2: the plan has blocks of"):
        simulate(denoiser, plan, QuantWeights(codes)).__enter__()


def test_the_random_plans_cover_every_form(deep: Exported, tmp_path: Path) -> None:
    """The comparisons above would prove nothing about a form that no plan draws."""
    operators: Counter[str] = Counter()
    for seed in range(24):
        sampler = PlanSampler(deep, seed, ROWS[seed % 4])
        plan = sampler.plan(tmp_path / "codes", attention_bits=ATTENTION_BITS[seed // 4 % 4])
        operators.update(node.op_type for node in canonical_graph(deep, plan, tmp_path / "codes").graph)
        for name, activation in plan.activations():
            constants = activation.constants()
            operators["shared rows" if activation.rows == 1 else "own rows"] += 1
            operators["shifted attention" if constants.has_shift and "attention" in name else "other"] += 1
            operators["scale varies"] += constants.has_rescale
            operators["only zero_point varies"] += activation.rows > 1 and not constants.has_rho
            if activation.channel_factor is not None:
                operators["channel factors by row"] += constants.rho.shape[0] > 1 and constants.has_rescale
                operators["channel factors of any row"] += constants.rho.shape[0] == 1
                operators["channel factors and a shift"] += constants.has_shift
        operators["weight only"] += sum(layer.activation_bits is None for layer in plan.layers)
        operators["split"] += sum(len(layer.segments) > 1 for layer in plan.layers)
        operators["whole concat"] += any(
            layer.name.startswith("skip_") and len(layer.segments) == 1 for layer in plan.layers
        )
        operators["float layer"] += len(plan.float_layers)
    for form in ("Pad", "ReduceSum", "Max", "Min", "Split", "Sub", "Gather", "shared rows", "own rows",
                 "shifted attention", "scale varies", "only zero_point varies", "weight only", "split",
                 "whole concat", "float layer", "channel factors by row", "channel factors of any row",
                 "channel factors and a shift"):  # fmt: skip
        assert operators[form] >= 3, form


def test_codes_are_not_all_saturated(deep: Exported, tmp_path: Path) -> None:
    """Codes that are all at an end would agree whatever the arithmetic between the ends."""
    plan = PlanSampler(deep, 3, 10).plan(tmp_path / "codes", bits=(4, 4))
    with torch.no_grad(), simulate(deep.denoiser, plan, QuantWeights(tmp_path / "codes")) as context:
        context.codes = {}
        deep.denoiser(**random_inputs(8, 3))
    for name, activation in plan.activations():
        codes = context.codes[name]
        assert len(codes.unique()) > 4, (name, activation.bits)
        assert int(codes.min()) >= -15
        assert int(codes.max()) <= 15


def test_a_batch_of_mixed_timesteps_is_the_samples_one_by_one(shallow: Exported, tmp_path: Path) -> None:
    plan = PlanSampler(shallow, 7, 10).plan(tmp_path / "codes", attention_bits=8)
    inputs = random_inputs(4, 7)
    model = canonical_graph(shallow, plan, tmp_path / "codes")
    together = run_graph(model, inputs, [])["out_sample"]
    assert len(set(plan.row_map[inputs["timestep"].numpy()])) > 1
    for index in range(4):
        alone = run_graph(model, {name: value[index : index + 1] for name, value in inputs.items()}, [])["out_sample"]
        assert relative_difference(together[index : index + 1], alone) < OUTPUT_TOLERANCE


@pytest.fixture(scope="module")
def emoji_calibration() -> tuple[UNet2DConditionModel, CalibrationSet]:
    """The bundled denoiser and what a guided run of six steps feeds it."""
    pipeline = StableDiffusionPipeline.from_pretrained(emoji.pipeline_folder(), low_cpu_mem_usage=False)
    pipeline.to(torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    with torch.no_grad(), TrajectoryRecorder(pipeline.unet, partial(bind_call, FAMILY), 2) as recorder:
        pipeline(
            ["heavy black heart", "dog face"],
            num_inference_steps=6,
            output_type="latent",
            generator=torch.Generator().manual_seed(0),
        )
    return pipeline.unet.eval(), recorder.result()


@pytest.fixture(scope="module")
def emoji_statistics(
    emoji_calibration: tuple[UNet2DConditionModel, CalibrationSet], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Exported, np.ndarray, dict[str, ActivationStatistics]]:
    """Exported, probed and observed as the pipeline does it."""
    denoiser, calibration = emoji_calibration

    def run(inputs: dict[str, torch.Tensor]) -> object:
        return denoiser(inputs["sample"], inputs["timestep"], inputs["encoder_hidden_states"])

    first, last = calibration.select(torch.tensor([0])), calibration.select(torch.tensor([len(calibration) - 1]))
    last["encoder_hidden_states"] = first["encoder_hidden_states"]
    found = probe(denoiser, lambda index: run((first, last)[index]))
    row_map = used_rows(equal_groups(1000, 10), calibration.timesteps.numpy())
    statistics = Observer(found, row_map, 512, 0, True).observe(denoiser, calibration, run, 8)
    example = calibration.select(torch.tensor([0, 1]))
    graph = float_graph(FAMILY.wrap(denoiser), tmp_path_factory.mktemp("emoji"), example)
    return Exported(denoiser, found, graph), row_map, statistics


@pytest.mark.slow
@pytest.mark.parametrize("bits", ["w4a4", "w8a8"])
def test_bundled_model_teacher_forced(
    emoji_statistics: tuple[Exported, np.ndarray, dict[str, ActivationStatistics]],
    emoji_calibration: tuple[UNet2DConditionModel, CalibrationSet],
    tmp_path: Path,
    bits: str,
) -> None:
    """A real model with a real calibration, attention included."""
    exported, row_map, statistics = emoji_statistics
    chosen = uniform(exported.found, BitWidths.parse(bits), FAMILY.boundary, {}, [])
    codes = tmp_path / "codes"
    plan = freeze(exported.denoiser, exported.found, chosen, statistics, row_map, 8, "emoji", bits, codes)
    assert len(plan.layers) > 100
    assert len(plan.attentions) > 10
    inputs = emoji_calibration[1].select(torch.tensor([0, 5, 23]))
    agreement, _ = teacher_forced(exported, plan, codes, inputs)
    assert agreement.codes > 1_000_000
    # A shifted 8-bit tensor adds an offset and subtracts its product again: what cancels, leaves its rounding.
    check(agreement, OUTPUT_TOLERANCE if bits == "w4a4" else 3 * OUTPUT_TOLERANCE)
