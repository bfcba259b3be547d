"""Fake-quantized layers that compute what the deployed graph computes: the same codes, in the same order."""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from calib.observer import scaled_operands
from calib.probe import AttentionMode, ModuleStack, removing
from calib.rotation import rotated_layers
from calib.sampling import TIMESTEP, broadcast_timestep
from dmqexport.errors import CalibrationError
from dmqexport.quant_plan import AttentionQuant, LayerQuant, QuantPlan
from dmqexport.quant_types import ActivationQuant, dequantize_weight, remainder_name, remainder_of
from dmqexport.quant_weights import QuantWeights


@dataclass
class RowContext:
    """The table rows of the batch that is running, and the codes it produced when someone asked for them."""

    row_map: Tensor
    rows: Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.int64))
    codes: dict[str, Tensor] | None = None
    listeners: list[Callable[[], None]] = field(default_factory=list)
    timestep_scale: float = 1.0

    def set_timestep(self, timestep: object, batch: int) -> None:
        """Look the rows of `timestep` up; one a sample."""
        values = broadcast_timestep(timestep, batch, self.timestep_scale).cpu()
        outside = values[(values < 0) | (values >= self.row_map.numel())]
        if outside.numel():
            raise CalibrationError(f"timestep {int(outside[0])} outside the table's 0 to {self.row_map.numel() - 1}")
        self.rows = self.row_map[values]
        for listener in self.listeners:
            listener()


class ActivationQuantizer(nn.Module):
    """Canonical activation quantizer (numerics of the graph): Mul rho, clip or shift, Q/DQ with a constant scale.

    `axis` is where the channels of the tensor lie (1 before a convolution, -1 before a linear layer); it matters only
    to quantizers with a channel factor. With `remainder`, what rounding leaves over is quantized too and added; the
    graph multiplies both codes each on its own and adds the products.
    """

    rho: Tensor
    inv_rho: Tensor
    lo: Tensor
    hi: Tensor
    shift: Tensor
    correction: Tensor
    scale_ref: Tensor
    remainder_scale: Tensor

    def __init__(
        self, name: str, qparams: ActivationQuant, context: RowContext, axis: int = -1, remainder: bool = False
    ) -> None:
        super().__init__()
        constants = qparams.constants()
        self.remainder = remainder
        rest = remainder_of(qparams).scale_ref if remainder else 0.0
        self.register_buffer("remainder_scale", torch.tensor(rest, dtype=torch.float32), persistent=False)
        self.name, self.context, self.rows, self.axis = name, context, qparams.rows, axis
        self.has_rho, self.has_rescale = constants.has_rho, constants.has_rescale
        self.has_clip, self.has_shift = constants.has_clip, constants.has_shift
        # A buffer of its own: a scalar left on another device would be multiplied by its reciprocal, and round apart.
        self.register_buffer("scale_ref", torch.tensor(constants.scale_ref, dtype=torch.float32), persistent=False)
        for key in ("rho", "inv_rho", "lo", "hi", "shift", "correction"):
            self.register_buffer(key, torch.from_numpy(getattr(constants, key).copy()), persistent=False)

    def per_sample(self, table: Tensor, like: Tensor) -> Tensor:
        """Gather `table` [rows] or [rows, channels] for each sample, shaped to broadcast over `like` [batch, ...]."""
        shape = [1] * (like.ndim - 1)
        if table.ndim == 2:
            shape[self.axis - 1 if self.axis > 0 else self.axis] = table.shape[1]
        if self.rows == 1:
            return table.reshape(shape) if table.ndim == 2 else table
        rows = self.context.rows
        if like.shape[0] != rows.shape[0]:
            raise CalibrationError(f"{self.name}: batch {like.shape[0]} but {rows.shape[0]} timesteps")
        return table[rows.to(table.device)].reshape(-1, *shape)

    def forward(self, tensor: Tensor) -> Tensor:
        """Return codes * scale_ref, float32, same shape."""
        if self.has_rho:
            tensor = tensor * self.per_sample(self.rho, tensor)
        if self.has_clip:
            tensor = torch.maximum(tensor, self.per_sample(self.lo, tensor))
            tensor = torch.minimum(tensor, self.per_sample(self.hi, tensor))
        if self.has_shift:
            tensor = tensor + self.per_sample(self.shift, tensor)
        values = self._rounded(tensor, self.scale_ref, self.name)
        if not self.remainder:
            return values
        return values + self._rounded(tensor - values, self.remainder_scale, remainder_name(self.name))

    def _rounded(self, tensor: Tensor, scale: Tensor, name: str) -> Tensor:
        codes = torch.round(tensor / scale).clamp_(-128, 127)
        if self.context.codes is not None:
            self.context.codes[name] = codes.to(torch.int8)
        return codes * scale

    def rescale(self, output: Tensor) -> Tensor:
        """Undo the row's part of rho after the operator; a channel factor is undone by the weight."""
        return output * self.per_sample(self.inv_rho, output) if self.has_rescale else output


class QuantizedLayer(nn.Module):
    """A Conv2d or Linear with quantized weights and activations, one part a segment."""

    def __init__(
        self, base: nn.Conv2d | nn.Linear, plan: LayerQuant, weights: QuantWeights, context: RowContext
    ) -> None:
        super().__init__()
        bias = base.bias if plan.bias is None else torch.from_numpy(plan.bias.copy())
        self.base_bias = None if bias is None else bias.to(base.weight.device)
        self.conv = base if isinstance(base, nn.Conv2d) else None
        self.spans = [(segment.start, segment.stop) for segment in plan.segments]
        self.quantizers = nn.ModuleList()
        axis = -1 if self.conv is None else 1
        for index, segment in enumerate(plan.segments):
            codes = weights.codes(plan.name, index)
            values = torch.from_numpy(dequantize_weight(codes, segment.weight))
            self.register_buffer(f"weight_{index}", values, persistent=False)
            self.quantizers.append(
                nn.Identity()
                if segment.activation is None
                else ActivationQuantizer(f"{plan.name}#{index}", segment.activation, context, axis, segment.remainder)
            )
        self.to(base.weight.device)

    def forward(self, tensor: Tensor) -> Tensor:
        """Same shapes as the float layer."""
        axis = 1 if self.conv is not None else tensor.ndim - 1
        total: Tensor | None = None
        for index, (start, stop) in enumerate(self.spans):
            part = tensor.narrow(axis, start, stop - start) if len(self.spans) > 1 else tensor
            output = self._segment(part, index)
            total = output if total is None else total + output
        assert total is not None
        if self.base_bias is None:
            return total
        return total + (self.base_bias.reshape(-1, 1, 1) if self.conv is not None else self.base_bias)

    def _segment(self, part: Tensor, index: int) -> Tensor:
        weight: Tensor = getattr(self, f"weight_{index}")
        quantizer = self.quantizers[index]
        if not isinstance(quantizer, ActivationQuantizer):
            return self._operator(part, weight, padded=False)
        padded = quantizer.has_shift and self.conv is not None
        if padded:
            part = F.pad(part, _spatial_pads(self.conv))
        output = quantizer.rescale(self._operator(quantizer(part), weight, padded))
        if quantizer.has_shift:
            sums = weight.double().flatten(1).sum(dim=1).float()
            sums = sums.reshape(-1, 1, 1) if self.conv is not None else sums
            output = output - quantizer.per_sample(quantizer.correction, output) * sums
        return output

    def _operator(self, tensor: Tensor, weight: Tensor, padded: bool) -> Tensor:
        if self.conv is None:
            return F.linear(tensor, weight)
        padding: Any = 0 if padded else self.conv.padding
        return F.conv2d(tensor, weight, None, self.conv.stride, padding, self.conv.dilation, self.conv.groups)


def _spatial_pads(conv: nn.Conv2d | None) -> list[int]:
    assert conv is not None
    if isinstance(conv.padding, str):
        raise CalibrationError(f"padding {conv.padding!r} is not supported with shifted 8-bit activations")
    vertical, horizontal = conv.padding
    return [horizontal, horizontal, vertical, vertical]


class QuantizedAttention:
    """The two attention matmuls with quantized operands, as the graph computes them."""

    def __init__(self, plan: AttentionQuant, context: RowContext) -> None:
        self.quantizers = {
            operand: ActivationQuantizer(f"{plan.name}#{operand}", getattr(plan, operand), context)
            for operand in ("query", "key", "probability", "value")
        }

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, extra: dict[str, Any]) -> Tensor:
        """query, key, value [batch, heads, tokens, channels]; returns the attention output."""
        for quantizer in self.quantizers.values():
            quantizer.to(query.device)
        scaled_query, scaled_key = scaled_operands(query, key, extra)
        scores = self._matmul("query", scaled_query, "key", scaled_key)
        return self._matmul("probability", torch.softmax(scores, dim=-1), "value", value)

    def _matmul(self, left_name: str, left: Tensor, right_name: str, right: Tensor) -> Tensor:
        first, second = self.quantizers[left_name], self.quantizers[right_name]
        right_values = second(right)
        output = first.rescale(first(left) @ right_values)
        if first.has_shift:
            sums = right_values.sum(dim=-2, keepdim=True)
            output = output - first.per_sample(first.correction, output) * sums
        return second.rescale(output)


Attend = Callable[[Tensor, Tensor, Tensor, dict[str, Any]], Tensor]


@contextmanager
def simulate(denoiser: nn.Module, plan: QuantPlan, weights: QuantWeights) -> Iterator[RowContext]:
    """Swap the planned layers of `denoiser` for fake-quantized ones inside the block; restores them after.

    The denoiser may be called as usual (diffusers pipelines included): rows follow the timestep it is called with.
    Raises CalibrationError when a planned layer is not in the model.
    """
    context = RowContext(torch.from_numpy(plan.row_map.copy()), timestep_scale=plan.timestep_scale)
    attentions = {item.name: QuantizedAttention(item, context) for item in plan.attentions}

    def make(layer: LayerQuant, base: nn.Conv2d | nn.Linear) -> nn.Module:
        return QuantizedLayer(base, layer, weights, context)

    with swapped(denoiser, plan, make, attentions, context):
        yield context


def follow_timesteps(
    denoiser: nn.Module, context: RowContext, called: Callable[[], None] | None = None
) -> RemovableHandle:
    """Let `context` have the rows of every call of `denoiser`; `called` is told of each. Returns the hook's handle.

    Calls raise CalibrationError where sample or timestep is missing.
    """
    parameters = list(inspect.signature(denoiser.forward).parameters)

    def set_rows(module: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        given = {**dict(zip(parameters, args, strict=False)), **kwargs}
        sample, timestep = given.get(parameters[0]), given.get(TIMESTEP)
        if sample is None or timestep is None:
            raise CalibrationError(f"the denoiser must be called with {parameters[0]!r} and {TIMESTEP!r}")
        context.set_timestep(timestep, sample.shape[0])
        if called is not None:
            called()

    return denoiser.register_forward_pre_hook(set_rows, with_kwargs=True)


@contextmanager
def swapped(
    denoiser: nn.Module,
    plan: QuantPlan,
    make: Callable[[LayerQuant, nn.Conv2d | nn.Linear], nn.Module],
    attentions: Mapping[str, Attend],
    context: RowContext,
) -> Iterator[None]:
    """Put what `make` gives in the place of every planned layer, and `attentions` in that of the attention matmuls.

    `context` follows the timestep the denoiser is called with. Everything is restored at the end. Raises
    CalibrationError when a planned layer is not in the model, or its inputs are rotated in one of them only.
    """
    rotated = rotated_layers(denoiser)
    for layer in plan.layers:
        if rotated.get(layer.name) != layer.rotation:
            raise CalibrationError(
                f"{layer.name}: the plan has blocks of {layer.rotation} of its inputs rotated, the model of "
                f"{rotated.get(layer.name)}",
                hint="both need the same quantization.rotation: calib.rotation.rotate_feed_forward rotates a model",
            )
    originals: dict[str, nn.Module] = {}

    def attend(name: str, query: Tensor, key: Tensor, value: Tensor, extra: dict[str, Any]) -> Tensor:
        if name in attentions:
            return attentions[name](query, key, value, extra)
        return F.scaled_dot_product_attention(query, key, value, **extra)

    try:
        for layer in plan.layers:
            try:
                base = denoiser.get_submodule(layer.name)
            except AttributeError as error:
                raise CalibrationError(f"the plan names {layer.name!r}, which this model does not have") from error
            assert isinstance(base, (nn.Conv2d, nn.Linear))
            originals[layer.name] = base
            denoiser.set_submodule(layer.name, make(layer, base))
        with removing([follow_timesteps(denoiser, context)]), ExitStack() as extras:
            if attentions:
                stack = extras.enter_context(ModuleStack(denoiser))
                extras.enter_context(AttentionMode(stack, attend))
            yield
    finally:
        for name, module in originals.items():
            denoiser.set_submodule(name, module)
