"""Planned layers made trainable: weights, scales, tables and biases that freeze back into a plan that deploys exactly.

Every quantity is trained relative to what the plan holds: a scale as a factor exp(θ), so that one learning rate serves
scales of every size; a zero_point as an offset in codes, rounded straight through, so that it is an integer at every
moment. Rows of the timestep tables are one embedding a table: a batch's samples gather their own rows, gradients are
sparse, and a row that a batch does not hold cannot move (its optimizer state is not even read).
"""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from calib.observer import scaled_operands
from calib.optimizer import MatrixOptimizer, ParameterGroup, StepOptimizer
from calib.probe import ProbeResult
from calib.quantizer import RowContext, swapped
from calib.trainable_table import Tables, TrainableActivation
from calib.trainable_weight import TrainableWeight, WeightMode
from dmqexport.quant_plan import AttentionQuant, LayerQuant, QuantPlan
from dmqexport.quant_types import CodeArray
from dmqexport.quant_weights import QuantWeights


@dataclass(frozen=True)
class Rates:
    """Learning rates of Adam, which Muon's are made of. weights and adapter: of the layer's mean 4-bit scale; rounding:
    of the rounding variable; weight_scales and scales: relative; zero_points: in codes; biases: as they are.
    """

    weights: float = 2.5e-3
    rounding: float = 1e-2
    adapter: float = 5e-3
    weight_scales: float = 5e-4
    scales: float = 2e-3
    zero_points: float = 6e-3
    biases: float = 2e-4


@dataclass(frozen=True)
class TrainOptions:
    """What is trained. weights: `none`, `full` (the float weight behind the codes), `rounding` (up or down, AdaRound),
    `adapter` (a low-rank update of the dequantized weight, QALoRA); rank: of the adapter; optimizer: of the float
    weights of `full`."""

    weights: WeightMode = "full"
    weight_scales: bool = True
    activations: bool = True
    biases: bool = True
    rank: int = 32
    optimizer: MatrixOptimizer = "adam"
    rates: Rates = field(default_factory=Rates)


class TrainableLayer(nn.Module):
    """A Conv2d or Linear in training: one weight and one activation quantizer a segment."""

    def __init__(
        self,
        base: nn.Conv2d | nn.Linear,
        plan: LayerQuant,
        codes: QuantWeights,
        options: TrainOptions,
        quantizers: list[TrainableActivation | None],
    ) -> None:
        super().__init__()
        self.plan = plan
        self.base = [base]  # in a list: its float weight is no parameter here
        self.conv = [base] if isinstance(base, nn.Conv2d) else []
        self.spans = [(segment.start, segment.stop) for segment in plan.segments]
        original = base.weight.detach()
        self.weights = nn.ModuleList()
        for index, segment in enumerate(plan.segments):
            part = original[:, segment.start : segment.stop] if len(plan.segments) > 1 else original
            factor = None if segment.activation is None else segment.activation.channel_factor
            if factor is not None:
                part = part * torch.from_numpy(factor.copy()).reshape(1, -1, *([1] * (part.ndim - 2)))
            self.weights.append(
                TrainableWeight(part, codes.codes(plan.name, index), segment.weight, options.weights, options.rank)
            )
        self._quantizers = quantizers
        bias = torch.from_numpy(plan.bias.copy()) if plan.bias is not None else base.bias
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=options.biases)

    @property
    def quantizers(self) -> list[TrainableActivation | None]:
        """One a segment; None where the activation stays in float."""
        return self._quantizers

    def parts(self) -> list[TrainableWeight]:
        """The weights, one a segment."""
        return [weight for weight in self.weights if isinstance(weight, TrainableWeight)]

    def forward(self, tensor: Tensor) -> Tensor:
        """Same shapes as the float layer."""
        axis = 1 if self.conv else tensor.ndim - 1
        total: Tensor | None = None
        for index, (start, stop) in enumerate(self.spans):
            part = tensor.narrow(axis, start, stop - start) if len(self.spans) > 1 else tensor
            quantizer = self._quantizers[index]
            seen = part if quantizer is None else quantizer(part)
            bias = self.bias if index == 0 else None
            output = self._operator(seen, self.weights[index](), bias)
            total = output if total is None else total + output
        assert total is not None
        return total

    def _operator(self, tensor: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if not self.conv:
            return F.linear(tensor, weight, bias)
        conv: Any = self.conv[0]
        return F.conv2d(tensor, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)


class TrainableAttention:
    """The two attention matmuls with trainable tables."""

    def __init__(self, plan: AttentionQuant, tables: Tables) -> None:
        self.plan = plan
        self.quantizers = {
            operand: TrainableActivation(f"{plan.name}#{operand}", getattr(plan, operand), tables)
            for operand in ("query", "key", "probability", "value")
        }

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, extra: dict[str, Any]) -> Tensor:
        """query, key, value [batch, heads, tokens, channels]; returns the attention output."""
        scaled_query, scaled_key = scaled_operands(query, key, extra)
        scores = self.quantizers["query"](scaled_query) @ self.quantizers["key"](scaled_key)
        output: Tensor = self.quantizers["probability"](torch.softmax(scores, dim=-1)) @ self.quantizers["value"](value)
        return output


class TrainableModel:
    """A denoiser whose planned layers are trainable; made by `trainable`."""

    def __init__(self, plan: QuantPlan, options: TrainOptions) -> None:
        self.plan, self.options = plan, options
        self.context = RowContext(
            torch.from_numpy(plan.row_map.copy()), listeners=[self.forget], timestep_scale=plan.timestep_scale
        )
        self.tables = Tables(plan.rows, self.context)
        self.layers: dict[str, TrainableLayer] = {}
        self.attentions: dict[str, TrainableAttention] = {}
        self._shared: dict[tuple[str, int], TrainableActivation] = {}

    def forget(self) -> None:
        """Drop what belongs to the last batch."""
        self.tables.forget()
        for quantizer in self._quantizers():
            quantizer.forget()

    def add(self, base: nn.Conv2d | nn.Linear, plan: LayerQuant, source: str, codes: QuantWeights) -> TrainableLayer:
        """Make one layer trainable; layers that read the tensor of `source` with equal qparams share its table."""
        quantizers: list[TrainableActivation | None] = []
        for index, segment in enumerate(plan.segments):
            if segment.activation is None:
                quantizers.append(None)
                continue
            shared = self._shared.get((source, index))
            rest = segment.remainder
            if shared is None or shared.remainder != rest or not shared.plan.same_as(segment.activation):
                shared = TrainableActivation(f"{plan.name}#{index}", segment.activation, self.tables, rest)
                self._shared.setdefault((source, index), shared)
            quantizers.append(shared)
        self.layers[plan.name] = TrainableLayer(base, plan, codes, self.options, quantizers)
        return self.layers[plan.name]

    @contextmanager
    def held_weights(self) -> Iterator[None]:
        """Quantize every weight once for all calls inside, gradients included."""
        parts = [weight for layer in self.layers.values() for weight in layer.parts()]
        for weight in parts:
            weight.held = weight.quantized()
        try:
            yield
        finally:
            for weight in parts:
                weight.held = None

    def _quantizers(self) -> Iterator[TrainableActivation]:
        for layer in self.layers.values():
            yield from (quantizer for quantizer in layer.quantizers if quantizer is not None)
        for attention in self.attentions.values():
            yield from attention.quantizers.values()

    def optimizer(self, names: Collection[str] | None, steps: int) -> StepOptimizer:
        """What trains the parameters of these layers (None: all) and the tables, with a cosine to zero over `steps`.

        A table moves where a gradient reaches it: those of one block when only that block runs, all of them when the
        whole network does, whatever `names` says.
        """
        rates, groups = self.options.rates, []
        for name, layer in self.layers.items():
            if names is not None and name not in names:
                continue
            for weight in layer.parts():
                groups += weight.groups(rates.weights, rates.rounding, rates.adapter)
                if self.options.weight_scales:
                    groups.append(ParameterGroup([weight.log_scale], rates.weight_scales))
            if layer.bias is not None and self.options.biases:
                groups.append(ParameterGroup([layer.bias], rates.biases))
        sparse = []
        if self.options.activations:
            for kind, rate in (("scale", rates.scales), ("zero_point", rates.zero_points)):
                sparse.append(ParameterGroup([self.tables.get_parameter(f"{kind}_rows")], rate))
                groups.append(ParameterGroup([self.tables.get_parameter(f"{kind}_single")], rate))
        return StepOptimizer(groups, sparse, steps, self.options.optimizer)

    def harden(self, names: Collection[str] | None = None) -> None:
        """Fix every rounding variable to up or down."""
        for layer in self._chosen(names):
            for weight in layer.parts():
                weight.harden()

    def soften(self, names: Collection[str] | None = None) -> None:
        """Let the rounding variables move again."""
        for layer in self._chosen(names):
            for weight in layer.parts():
                weight.soften()

    def regularizer(self, progress: float, names: Collection[str] | None = None) -> Tensor:
        """AdaRound's push of the rounding variables to 0 or 1 (arXiv:2004.10568, Eq. 24); 0 for other modes."""
        terms = [weight.regularizer(progress) for layer in self._chosen(names) for weight in layer.parts()]
        total: Tensor = sum(terms, torch.zeros(()))
        return total

    def state(self, names: Collection[str] | None = None) -> dict[str, Tensor]:
        """Everything trained of these layers and of the tables they read, to save and to restore."""
        found: dict[str, Tensor] = {}
        for name, layer in self.layers.items():
            if names is not None and name not in names:
                continue
            found.update({f"{name}|{key}": value.detach().clone() for key, value in layer.state_dict().items()})
            for index, quantizer in enumerate(layer.quantizers):
                if quantizer is not None:
                    for kind in ("scale", "zero_point"):
                        found[f"{name}#{index}|{kind}"] = self.tables.rows_of(quantizer.index, kind).clone()
        if names is None:
            for name, attention in self.attentions.items():
                for operand, quantizer in attention.quantizers.items():
                    for kind in ("scale", "zero_point"):
                        found[f"{name}#{operand}|{kind}"] = self.tables.rows_of(quantizer.index, kind).clone()
        return found

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state` gave; layers it does not mention keep what they have."""
        for name, layer in self.layers.items():
            prefix = f"{name}|"
            own = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
            if own:
                layer.load_state_dict(own)
            for index, quantizer in enumerate(layer.quantizers):
                if quantizer is not None:
                    self._restore(f"{name}#{index}", quantizer, state)
        for name, attention in self.attentions.items():
            for operand, quantizer in attention.quantizers.items():
                self._restore(f"{name}#{operand}", quantizer, state)
        self.forget()

    def adopt_weights(self, state: Mapping[str, Tensor]) -> None:
        """Go on with the float weights behind the codes of an earlier training, from whose plan this model was made.

        state: of all layers, as `state` gave there. Scales, tables and biases are in the plan; taking them from `state`
        too would move them twice.
        """
        for name, layer in self.layers.items():
            for index, weight in enumerate(layer.parts()):
                prefix = f"{name}|weights.{index}."
                own = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
                if own:
                    weight.adopt(own)

    def _restore(self, key: str, quantizer: TrainableActivation, state: Mapping[str, Tensor]) -> None:
        for kind in ("scale", "zero_point"):
            if f"{key}|{kind}" in state:
                self.tables.set_rows(quantizer.index, kind, state[f"{key}|{kind}"])

    def _chosen(self, names: Collection[str] | None) -> list[TrainableLayer]:
        return [layer for name, layer in self.layers.items() if names is None or name in names]

    def freeze(self) -> tuple[QuantPlan, dict[str, CodeArray]]:
        """The plan with everything trained, and every weight's codes keyed `layer#segment`."""
        codes: dict[str, CodeArray] = {}
        layers = []
        for layer in self.plan.layers:
            module = self.layers[layer.name]
            segments = []
            for index, segment in enumerate(layer.segments):
                quantizer = module.quantizers[index]
                qparams, codes[f"{layer.name}#{index}"] = module.parts()[index].freeze()
                activation = None if quantizer is None else self.tables.frozen(quantizer.index)
                segments.append(replace(segment, weight=qparams, activation=activation))
            trained = module.bias is not None and self.options.biases
            bias = module.bias.detach().numpy().copy() if module.bias is not None and trained else layer.bias
            layers.append(replace(layer, segments=tuple(segments), bias=bias))
        attentions = tuple(self._frozen_attention(item.name) for item in self.plan.attentions)
        return replace(self.plan, layers=tuple(layers), attentions=attentions), codes

    def _frozen_attention(self, name: str) -> AttentionQuant:
        quantizers = self.attentions[name].quantizers
        tables = {operand: self.tables.frozen(quantizer.index) for operand, quantizer in quantizers.items()}
        return AttentionQuant(name, **tables)


@contextmanager
def trainable(
    denoiser: nn.Module, plan: QuantPlan, weights: QuantWeights, found: ProbeResult, options: TrainOptions
) -> Iterator[TrainableModel]:
    """Swap the planned layers of `denoiser` for trainable ones inside the block; restores them after.

    The denoiser's own parameters get no gradient. Raises CalibrationError when a planned layer is not in the model.
    """
    model = TrainableModel(plan, options)
    sources = {layer.name: layer.source for layer in found.layers}
    frozen = [parameter for parameter in denoiser.parameters() if parameter.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(False)
    model.attentions.update({item.name: TrainableAttention(item, model.tables) for item in plan.attentions})

    def make(layer: LayerQuant, base: nn.Conv2d | nn.Linear) -> nn.Module:
        return model.add(base, layer, sources.get(layer.name, layer.name), weights)

    try:
        with swapped(denoiser, plan, make, model.attentions, model.context):
            model.tables.build(options.activations)
            yield model
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)
