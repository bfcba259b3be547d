"""Weights re-fitted to what they will really read, then rounded by second-order error compensation; closed form.

A layer's output error depends on the quantized input x̂, not on x. Least squares first moves the weight to
W* = W (E[x x̂ᵀ] + λI)(E[x̂ x̂ᵀ] + λI)⁻¹, which uses the correlation of neighbouring inputs against their quantization
noise. That is best for single calls; but it also shortens what a layer says, as regression on noisy inputs does, alike
at every step, and over a sampler that adds up: trajectories end nearer where W stays as it is (`refit`).

Then columns are rounded one by one, each rounding error spread over the columns still open (GPTQ, arXiv:2210.17323,
Algorithm 1, in its Cholesky form). That only ever looks forward, so codes are then improved one column at a time, all
others given, and scales fitted to them: half a decibel less error in the bundled model's layers. Nothing is trained and
nothing changes at run time.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from calib.input_moments import Moments, Sampling
from calib.probe import removing
from calib.quantizer import ActivationQuantizer, RowContext
from calib.range_search import search_fitted
from calib.sampling import TIMESTEP, CalibrationSet
from calib.weight_dilation import scaled_columns
from dmqexport.quant_plan import LayerOp, LayerQuant, QuantPlan, Segment
from dmqexport.quant_types import CodeArray, WeightQuant
from dmqexport.quant_weights import QuantWeights

_RIDGE = 0.1  # of the mean diagonal; pulls W* back to W where calibration says little
_DAMPING = 0.01  # of the mean diagonal, as in the paper
_BLOCK = 128
_SWEEPS = 4  # of coordinate descent; more change little
_LARGEST_INPUT = 4608  # a 3 × 3 convolution over 512 channels; two square matrices of this size take 170 MB
_WIDE_BLOCK = 1152  # 128 channels of such a convolution: wider inputs are compensated within blocks of about this size
_POSITIONS = 2**16  # output positions seen in all: more entries say more than more positions of each
_TIMESTEPS = 256  # all over the table, that layers which read the timestep alone are fitted to as well
_ELSEWHERE = 0.25  # what all of them weigh beside the sampling steps
MEMORY_BYTES = 2**30


def refine_weights(
    denoiser: nn.Module,
    plan: QuantPlan,
    weights: QuantWeights,
    calibration: CalibrationSet,
    run: Callable[[Mapping[str, Tensor]], object],
    batch_size: int,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
    memory: int = MEMORY_BYTES,
    timestep_only: Collection[str] = (),
    refit: bool = True,
) -> tuple[QuantPlan, dict[str, CodeArray]]:
    """Return the plan with refitted weight scales, and every weight's codes keyed `layer#segment`.

    Grouped convolutions keep their codes. Inputs too wide for a square matrix are taken in blocks of channels, errors
    compensated within a block. Layers are taken in groups whose moments fit `memory` bytes (one layer may exceed it),
    however large the model is: one pass over `calibration` each. timestep_only: layers that read nothing but the
    timestep; they are also fitted to timesteps all over the table, so that a sampler of other steps finds them right.
    refit: move weights to W* before they are rounded.
    """
    chosen = [layer for layer in plan.layers if refinable(denoiser, layer.name)]
    refined: dict[str, LayerQuant] = {}
    codes: dict[str, CodeArray] = {}
    observed = _observed(denoiser, plan, chosen, calibration, run, batch_size, seed, progress, memory, timestep_only)
    for layer, moments in observed:
        refined[layer.name] = _refine(denoiser, layer, moments, codes, refit)
    for layer in plan.layers:
        for index in range(len(layer.segments)):
            key = f"{layer.name}#{index}"
            if key not in codes:
                codes[key] = weights.codes(layer.name, index)
    return replace(plan, layers=tuple(refined.get(layer.name, layer) for layer in plan.layers)), codes


def rounding_errors(
    denoiser: nn.Module,
    plan: QuantPlan,
    widths: Mapping[str, Sequence[int]],
    calibration: CalibrationSet,
    run: Callable[[Mapping[str, Tensor]], object],
    batch_size: int,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
    memory: int = MEMORY_BYTES,
    timestep_only: Collection[str] = (),
    refit: bool = True,
) -> Iterator[tuple[str, dict[int, Tensor]]]:
    """What `refine_weights` would leave at other widths: layer, and bits → rounded less refitted weight, in its shape.

    widths: layer → its candidates; of layers that `refinable` says no to, nothing comes. Activations are the plan's;
    timestep_only and refit as there.
    """
    chosen = [layer for layer in plan.layers if layer.name in widths and refinable(denoiser, layer.name)]
    observed = _observed(denoiser, plan, chosen, calibration, run, batch_size, seed, progress, memory, timestep_only)
    for layer, moments in observed:
        parts: dict[int, list[Tensor]] = {bits: [] for bits in widths[layer.name]}
        weight = denoiser.get_submodule(layer.name).get_parameter("weight")
        for _, part, factor, blocks in _fitted(denoiser, layer, moments, refit):
            fitted = torch.cat([block.weight.T for block in blocks], dim=1)
            for bits, found in parts.items():
                codes, qparams = _round(blocks, bits)
                error = (codes * torch.from_numpy(qparams.scale.copy()).unsqueeze(1) - fitted).reshape(part.shape)
                found.append(error if factor is None else scaled_columns(error, 1 / factor))
        yield layer.name, {bits: torch.cat(found, dim=1).reshape(weight.shape) for bits, found in parts.items()}


def _observed(
    denoiser: nn.Module,
    plan: QuantPlan,
    chosen: Sequence[LayerQuant],
    calibration: CalibrationSet,
    run: Callable[[Mapping[str, Tensor]], object],
    batch_size: int,
    seed: int,
    progress: Callable[[int, int], None] | None,
    memory: int,
    timestep_only: Collection[str],
) -> Iterator[tuple[LayerQuant, dict[str, Moments]]]:
    """Every layer with the moments of its group, out of which it takes its own."""
    groups = list(_groups(denoiser, chosen, memory))
    total = len(groups) * len(calibration)
    for number, group in enumerate(groups):
        offset = _offset(progress, number * len(calibration), total)
        moments = _observe(denoiser, plan, group, calibration, run, batch_size, seed, offset, timestep_only)
        for layer in group:
            yield layer, moments


def _offset(progress: Callable[[int, int], None] | None, start: int, total: int) -> Callable[[int], None]:
    """Progress of one group within all groups."""
    return lambda count: progress(start + count, total) if progress is not None else None


def refinable(denoiser: nn.Module, name: str) -> bool:
    """Whether `refine_weights` rounds the weight of this layer anew."""
    module = denoiser.get_submodule(name)
    return not (isinstance(module, nn.Conv2d) and (module.groups != 1 or isinstance(module.padding, str)))


def _spans(denoiser: nn.Module, layer: LayerQuant, segment: Segment) -> list[tuple[int, int]]:
    """Blocks of the columns that a segment's weight is multiplied with; whole channels each."""
    weight = denoiser.get_submodule(layer.name).get_parameter("weight")
    taps, channels = int(weight[0, 0].numel()), segment.stop - segment.start
    count = 1 if channels * taps <= _LARGEST_INPUT else -(-channels * taps // _WIDE_BLOCK)
    edges = [channels * index // count * taps for index in range(count + 1)]
    return list(pairwise(edges))


def _groups(denoiser: nn.Module, layers: Sequence[LayerQuant], memory: int) -> Iterator[list[LayerQuant]]:
    group: list[LayerQuant] = []
    size = 0
    for layer in layers:
        spans = [span for segment in layer.segments for span in _spans(denoiser, layer, segment)]
        needed = 8 * sum((stop - start) ** 2 for start, stop in spans)
        if group and size + needed > memory:
            yield group
            group, size = [], 0
        group.append(layer)
        size += needed
    if group:
        yield group


def _observe(
    denoiser: nn.Module,
    plan: QuantPlan,
    group: Sequence[LayerQuant],
    calibration: CalibrationSet,
    run: Callable[[Mapping[str, Tensor]], object],
    batch_size: int,
    seed: int,
    progress: Callable[[int], None],
    timestep_only: Collection[str],
) -> dict[str, Moments]:
    """Second moments of the group's inputs along the float model."""
    context = RowContext(torch.from_numpy(plan.row_map.copy()), timestep_scale=plan.timestep_scale)
    moments: dict[str, Moments] = {}
    positions = -(-_POSITIONS * batch_size // max(len(calibration), 1))  # of a batch
    sampling = Sampling(positions, torch.Generator().manual_seed(seed))

    def hook(layer: LayerQuant, gain: float = 1.0) -> Callable[..., None]:
        place = 1 if layer.op is LayerOp.CONV else -1
        quantizers = [
            None
            if segment.activation is None
            else ActivationQuantizer(f"{layer.name}#{index}", segment.activation, context, place, segment.remainder)
            for index, segment in enumerate(layer.segments)
        ]

        def observe(module: nn.Module, args: tuple[Any, ...]) -> None:
            tensor = args[0]
            axis = 1 if isinstance(module, nn.Conv2d) else tensor.ndim - 1
            for index, segment in enumerate(layer.segments):
                part = tensor.narrow(axis, segment.start, segment.stop - segment.start)
                quantizer = quantizers[index]
                if quantizer is not None:
                    quantizer.to(tensor.device)
                if segment.activation is not None and segment.activation.channel_factor is not None:
                    # Both moments are of the divided tensor: that is what the weight with its scaled columns reads.
                    spread = (-1,) + (1,) * (tensor.ndim - 2) if axis == 1 else (-1,)
                    factor = torch.from_numpy(segment.activation.channel_factor.copy()).to(tensor.device)
                    divided = part / factor.reshape(spread)
                else:
                    divided = part
                seen = divided
                if quantizer is not None:
                    seen = quantizer.rescale(quantizer(part))
                    if quantizer.has_shift:
                        seen = seen - quantizer.per_sample(quantizer.correction, seen)
                key = f"{layer.name}#{index}"
                if key not in moments:
                    taps = int(module.get_parameter("weight")[0, 0].numel())
                    moments[key] = Moments(_spans(denoiser, layer, segment), taps, tensor.device)
                if gain != 1:
                    divided, seen = divided * gain, seen * gain
                moments[key].add(module, divided, seen, sampling)

        return observe

    handles = [denoiser.get_submodule(layer.name).register_forward_pre_hook(hook(layer)) for layer in group]
    with removing(handles), torch.no_grad():
        for entries, batch in calibration.batches(batch_size):
            context.set_timestep(batch[TIMESTEP], len(entries))
            run(batch)
            progress(int(entries[-1]) + 1)
    alone = [layer for layer in group if layer.name in timestep_only]
    if alone:
        gain = (_ELSEWHERE * len(calibration) / _TIMESTEPS) ** 0.5
        handles = [denoiser.get_submodule(layer.name).register_forward_pre_hook(hook(layer, gain)) for layer in alone]
        spread = torch.linspace(0, (len(plan.row_map) - 1) / plan.timestep_scale, _TIMESTEPS, dtype=torch.float64)
        with removing(handles), torch.no_grad():
            for part in spread.split(batch_size):  # type: ignore[no-untyped-call]  # torch's own
                inputs = calibration.select(torch.arange(len(part)) % len(calibration))
                timesteps = part.round() if not inputs[TIMESTEP].is_floating_point() else part
                inputs = {**inputs, TIMESTEP: timesteps.to(inputs[TIMESTEP].dtype)}
                context.set_timestep(inputs[TIMESTEP], len(part))
                run(inputs)
    return moments


def _refine(
    denoiser: nn.Module, layer: LayerQuant, moments: dict[str, Moments], codes: dict[str, CodeArray], refit: bool
) -> LayerQuant:
    """The layer with refitted scales; takes its moments out of `moments`, which are the most that is in memory."""
    segments = []
    for index, part, _, blocks in _fitted(denoiser, layer, moments, refit):
        rounded, qparams = _round(blocks, layer.segments[index].weight.bits)
        codes[f"{layer.name}#{index}"] = rounded.reshape(part.shape).to(torch.int8).numpy()
        segments.append(replace(layer.segments[index], weight=qparams))
    return replace(layer, segments=tuple(segments))


def _fitted(
    denoiser: nn.Module, layer: LayerQuant, moments: dict[str, Moments], refit: bool
) -> Iterator[tuple[int, Tensor, Tensor | None, list["_Block"]]]:
    """Of every segment: its index, its columns of the weight, times its channel factor, that factor, and the refit
    (without `refit`, the weight itself)."""
    weight = denoiser.get_submodule(layer.name).get_parameter("weight").detach().cpu()
    for index, segment in enumerate(layer.segments):
        part, factor = weight[:, segment.start : segment.stop], None
        if segment.activation is not None and segment.activation.channel_factor is not None:
            factor = torch.from_numpy(segment.activation.channel_factor.copy())
            part = scaled_columns(part, factor)
        found, columns, blocks = moments.pop(f"{layer.name}#{index}"), part.flatten(1), []
        for start, stop in found.spans:
            quantized, mixed = found.pop()
            some = columns[:, start:stop]
            blocks.append(_fit(some, quantized, mixed) if refit else _as_it_is(some, quantized))
        yield index, part, factor, blocks


@dataclass(frozen=True)
class _Block:
    """Consecutive columns of a weight, in rows: those are whole in memory, and everything goes through them.

    weight [k, out]; moment [k, k], damped; pull [k, out]: their product.
    """

    weight: Tensor
    moment: Tensor
    pull: Tensor


def _damping(moment: Tensor) -> float:
    return float(_DAMPING * moment.diagonal().mean().clamp_min(1e-12))


def _raised(square: Tensor, by: float) -> Tensor:
    """A copy with `by` added to the diagonal."""
    raised = square.clone()
    raised.diagonal().add_(by)
    return raised


def fit_least_squares(weight: Tensor, quantized: Tensor, mixed: Tensor) -> Tensor:
    """The weight [out, k] that best maps quantized inputs to float outputs. weight [out, k]; both moments [k, k]."""
    return _fit(weight, quantized, mixed).weight.T


def _as_it_is(weight: Tensor, quantized: Tensor) -> _Block:
    moment, rows = _raised(quantized, _damping(quantized)), weight.T.contiguous()
    return _Block(rows, moment, moment @ rows)


def _fit(weight: Tensor, quantized: Tensor, mixed: Tensor) -> _Block:
    damping = _damping(quantized)
    ridge = _RIDGE / _DAMPING * damping
    lower = torch.linalg.cholesky(_raised(quantized, ridge))
    moment = _raised(quantized, damping)
    if len(weight) > 2 * len(quantized):  # solving for as many columns as there are inputs is less work
        fitted = torch.cholesky_solve(_raised(mixed.T, ridge), lower) @ weight.T
        return _Block(fitted, moment, moment @ fitted)
    wanted = torch.addmm(weight.T, mixed.T, weight.T, beta=ridge)
    fitted = torch.cholesky_solve(wanted, lower).contiguous()
    # The moment with its ridge times the solution is what was asked for: less of the ridge, it is the pull.
    return _Block(fitted, moment, wanted.sub_(fitted, alpha=ridge - damping))


def round_second_order(weight: Tensor, moments: Sequence[Tensor], bits: int) -> tuple[Tensor, WeightQuant]:
    """Signed codes [out, k] of `weight` and their quantizer, compensating each column's rounding in later columns, then
    descending from there, codes and scales in turn, in the error of the layer's output.

    moments: sums of x̂ x̂ᵀ of consecutive blocks of columns, [k, k] where there is one. Ranges are searched weighted by
    the moments' diagonals: as for plain rounding where rows are short, by fewer candidates where they are long.
    """
    parts = weight.T.contiguous().split([len(moment) for moment in moments])  # type: ignore[no-untyped-call]
    damped = [_raised(moment, _damping(moment)) for moment in moments]
    return _round([_Block(*pair, pair[1] @ pair[0]) for pair in zip(parts, damped, strict=True)], bits)


def _round(blocks: Sequence[_Block], bits: int) -> tuple[Tensor, WeightQuant]:
    diagonal = torch.cat([block.moment.diagonal() for block in blocks])
    weight = torch.cat([block.weight.T for block in blocks], dim=1)
    found = search_fitted(weight, diagonal / diagonal.mean().clamp_min(1e-12), bits)
    low = -found.zero_point.float()
    scale, states = found.scale, [_State(block, found.scale, low, bits) for block in blocks]
    for _ in range(_SWEEPS):
        scale = _fitted_scale(states, scale)
        for state in states:
            state.descend(scale)
    return torch.cat([state.codes for state in states]).T, WeightQuant(bits, scale.numpy(), found.zero_point.numpy())


class _State:
    """Codes of one block [k, out] on their way down in the squared output error tr((QS - W) H (QS - W)ᵀ).

    `power`, Q H Qᵀ of every output channel, is kept up to date: products with the moments are most of the work.
    """

    def __init__(self, block: _Block, scale: Tensor, low: Tensor, bits: int) -> None:
        self._block, self._low, self._highest = block, low, 2**bits - 1
        self.codes, self.power = self._compensated(scale)

    def _compensated(self, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Codes, and their power: columns are rounded one by one, each error spread over the columns still open.

        H is U D Uᵀ with U upper triangular, ones on its diagonal. What the errors made so far, times U, add to a column
        before it is rounded is what GPTQ has added by then with a factor of H's inverse, which is then never needed
        (QuIP, arXiv:2307.13304, Theorem 6).
        """
        # Of the matrix in reverse order, the usual lower factor is U's; rows of Uᵀ are then whole in memory.
        feedback = torch.linalg.cholesky(self._block.moment.flip(0, 1)).T.flip(0, 1).contiguous()
        roots = feedback.diagonal().unsqueeze(1).clone()
        feedback /= roots
        exact = self._block.weight / scale
        raised = exact - self._low
        aims, codes, errors = (torch.empty_like(exact) for _ in range(3))
        for start in range(0, len(exact), _BLOCK):
            block = slice(start, min(start + _BLOCK, len(exact)))
            torch.addmm(raised[block], feedback[block, :start], errors[:start], out=aims[block])
            _round_in_turn(
                aims[block], raised[block], feedback[block, block], codes[block], errors[block], self._highest
            )
        # D times squares of what rounding did to these sums is the error; the weight's own power tells the codes'.
        error = aims.sub_(codes).mul_(roots).square_().sum(dim=0)
        codes += self._low
        return codes, error + exact.neg_().add_(codes, alpha=2).mul_(self._block.pull).sum(dim=0) / scale

    @property
    def along(self) -> Tensor:
        """Q H Wᵀ of every output channel."""
        return (self._block.pull * self.codes).sum(dim=0)

    def descend(self, scale: Tensor) -> None:
        """Each column's codes in turn become the best for the codes of all others: the error cannot rise."""
        moment = self._block.moment
        for start in range(0, len(self.codes), _BLOCK):
            block = slice(start, min(start + _BLOCK, len(self.codes)))
            square, before = moment[block, block], self.codes[block] - self._low
            diagonal = square.diagonal().unsqueeze(1)
            wanted = self._block.pull[block] / scale
            aims = torch.addmm(wanted, moment[block], self.codes, alpha=-1).div_(diagonal).add_(before)
            after, moved = torch.empty_like(aims), torch.empty_like(aims)
            _round_in_turn(aims, before, square / diagonal, after, moved, self._highest)
            torch.add(after, self._low, out=self.codes[block])
            # A step adds twice its product with what the codes gave by then, and its own power.
            given = aims.sub_(before).mul_(diagonal).neg_().add_(wanted)
            self.power += given.mul_(-2).addcmul_(moved, diagonal).mul_(moved).sum(dim=0)


def _round_in_turn(aims: Tensor, exact: Tensor, feedback: Tensor, codes: Tensor, missing: Tensor, highest: int) -> None:
    """Round row after row to `codes`, 0 to `highest`, each aim raised by `feedback` times what earlier ones miss.

    aims, exact, codes, missing (exact less codes) [rows, out]; feedback [rows, rows], its lower triangle.
    """
    turned = missing.T
    rows = zip(aims.unbind(), exact.unbind(), feedback.unbind(), codes.unbind(), missing.unbind(), strict=True)
    for row, (aim, value, factors, code, missed) in enumerate(rows):
        if row:
            aim.addmv_(turned[:, :row], factors[:row])
        torch.round(aim, out=code)
        code.clamp_(0, highest)
        torch.sub(value, code, out=missed)


def _fitted_scale(states: Sequence[_State], scale: Tensor) -> Tensor:
    """The scale of every output channel, [out], that fits these codes best; `scale` where none does."""
    zeros = torch.zeros_like(scale)
    along, power = sum((state.along for state in states), zeros), sum((state.power for state in states), zeros)
    best = along / power.clamp_min(1e-30)
    return torch.where((along > 0) & (power > 0), torch.maximum(torch.minimum(best, 1.5 * scale), scale / 1.5), scale)
