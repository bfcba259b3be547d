"""Per-channel factors of activations, chosen tensor by tensor: weight dilation and the scalings it is compared with.

Every method proposes factors; what a proposal does is measured on sampled input vectors: the readers' outputs with
quantized inputs and weights against float ones, at the planned bits. Where the layer before can take the factor in
(calib/equalize.py) it costs nothing and is folded; elsewhere it becomes part of the timestep table, by default only if
the measured output error falls.

Measured on the bundled model at W4A4 with second-order rounding, nothing trained, predicted noise at 40 points of ten
held-out trajectories after calibration on 120 entries: no factors 16.33 dB, SmoothQuant at 0.5 where it folds 16.39 and
everywhere 16.48, the choice tensor by tensor 16.73. Dilation everywhere, rounded to nearest, 15.23 against 15.47 dB
without (60 points, 200 entries): before training it does not pay, its factors know nothing of the activation.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from torch import Tensor, nn

from calib.equalize import fold_sites, folds_of
from calib.freeze import LayerBits
from calib.probe import ProbeResult
from calib.range_search import quick_range
from calib.sampling import CalibrationSet
from calib.scaling_samples import Geometry, ScaledTensor, TensorSamples, gather_samples, scaled_tensors
from calib.weight_dilation import (
    LARGEST_FACTOR,
    ScalingEffect,
    dilation_factors,
    scaled_columns,
    weight_scale_ratio,
)
from dmqexport.errors import CalibrationError
from dmqexport.quant_plan import ChannelFold
from dmqexport.quant_types import BitWidths, FloatArray, IntArray

Method = Literal[
    "none", "dilation", "dilation-symmetric", "capped-dilation", "smoothquant", "awq", "omniquant", "dgq", "os+",
    "auto",
]  # fmt: skip
Merge = Literal["never", "when-better", "always"]

_DOCUMENT, _ARRAYS = "channel_scaling.json", "channel_scaling.safetensors"
_SMALLEST = 1e-4  # dead channels neither blow up nor vanish
_VECTORS = 768
_JUDGED_WEIGHTS = 2**19  # of a layer: output channels err alike, and some of them tell what a factor does
_MERGE_MUST_GAIN = 0.97  # a wide table costs memory and a fused product; float rounding alone must not choose it
_AWQ_SHARE, _DGQ_SHARE = 0.01, 0.005  # of the channels, as DilateQuant's Appendix G sets both
_STRENGTHS = (0.25, 0.4, 0.55, 0.7)
_THRESHOLDS = (1.0, 0.6, 0.3)
_LEARNING_STEPS, _LEARNING_RATE, _LEARNING_REFRESH = 60, 0.02, 10


@dataclass(frozen=True)
class ScalingSettings:
    """method: how factors are proposed. merge: where they cannot be folded, whether they enter the timestep table.
    strength: SmoothQuant's alpha, the activation's share. cap: largest factor of capped-dilation. weight_error: what of
    the weight's rounding error counts when proposals are judged, 1 where weights are rounded to nearest, less where
    rounding compensates (calib/second_order.py), which leaves the activation's share the larger one."""

    method: Method = "auto"
    merge: Merge = "when-better"
    strength: float = 0.5
    cap: float = 2.0
    weight_error: float = 1.0


@dataclass(frozen=True)
class ChannelScaling:
    """folds: to be folded into the layer before. factors: float32 [channels] by `source#index`, to be merged with the
    timestep table. record: what was chosen and what it did, for `QuantPlan.scaling`."""

    folds: tuple[ChannelFold, ...] = ()
    factors: Mapping[str, FloatArray] = field(default_factory=dict)
    record: Mapping[str, Any] = field(default_factory=dict)

    def save(self, folder: Path) -> None:
        """Write `channel_scaling.json` and `channel_scaling.safetensors` into `folder`."""
        arrays = {f"factor|{key}": np.asarray(array) for key, array in self.factors.items()}
        arrays |= {f"fold|{fold.consumers[0]}": np.asarray(fold.factor) for fold in self.folds}
        places = [{"producer": fold.producer, "consumers": fold.consumers} for fold in self.folds]
        save_file(arrays, str(folder / _ARRAYS))
        text = json.dumps({"folds": places, "record": self.record}, indent=1)
        (folder / _DOCUMENT).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> "ChannelScaling":
        """Read what `save` wrote."""
        document = json.loads((folder / _DOCUMENT).read_text(encoding="utf-8"))
        arrays = load_file(str(folder / _ARRAYS))
        folds = tuple(
            ChannelFold(item["producer"], tuple(item["consumers"]), arrays[f"fold|{item['consumers'][0]}"])
            for item in document["folds"]
        )
        factors = {key.removeprefix("factor|"): array for key, array in arrays.items() if key.startswith("factor|")}
        return cls(folds, factors, document["record"])


def choose_scaling(
    denoiser: nn.Module,
    found: ProbeResult,
    bits: Mapping[str, LayerBits],
    row_map: IntArray,
    calibration: CalibrationSet,
    run: Callable[[Mapping[str, Tensor]], object],
    batch_size: int,
    settings: ScalingSettings,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
) -> ChannelScaling:
    """Choose the factors of every tensor that a quantized layer reads; the denoiser is only run, not changed.

    row_map: int64 [timesteps]; `calibration` should visit every row. Readers of one tensor share its factors, halves of
    a split concat have their own. Raises CalibrationError when the calibration set is empty.
    """
    if settings.method == "none":
        return ChannelScaling(record={"method": "none", "tensors": {}})
    if len(calibration) == 0:
        raise CalibrationError("scaling: the calibration set is empty")
    sites = {site.consumers[0]: site for site in fold_sites(denoiser)}
    tensors = scaled_tensors(denoiser, found, lambda name: bits[name].widths is not None)
    folded: dict[str, FloatArray] = {}
    factors: dict[str, FloatArray] = {}
    entries: dict[str, Any] = {}
    samples = gather_samples(denoiser, tensors, row_map, calibration, run, batch_size, _VECTORS, seed)
    for position, (tensor, seen) in enumerate(samples):
        if progress is not None:
            progress(position + 1, len(tensors))
        source = tensor.key.rpartition("#")[0]
        foldable = source in sites and sites[source].channels == tensor.channels
        widths = {name: bits[name].widths for name in tensor.readers}
        quantizes = any(item is not None and item.activation is not None for item in widths.values())
        if not foldable and (settings.merge == "never" or not quantizes):
            continue
        quantized = {name: item for name, item in widths.items() if item is not None}
        judge = _Judge(denoiser, tensor, seen, quantized, settings.weight_error)
        label, factor, error = judge.best(settings)
        bound = _MERGE_MUST_GAIN if settings.method == "auto" or settings.merge == "when-better" else float("inf")
        used = label != "none" and (foldable or error <= bound * judge.plain_error)
        entry: dict[str, Any] = {"choice": label if used else "none", "applied": "none"}
        if used:
            array = factor.numpy().astype(np.float32)
            (folded if foldable else factors)[source if foldable else tensor.key] = array
            entry["applied"] = "folded" if foldable else "merged"
            entry |= judge.effect(factor, error).rounded()
        entries[tensor.key] = entry
    folds = folds_of(list(sites.values()), folded)
    return ChannelScaling(folds, factors, {"method": settings.method, "tensors": entries})


class _Judge:
    """Proposes factors for one tensor and measures what they do to its readers' outputs."""

    def __init__(
        self,
        denoiser: nn.Module,
        tensor: ScaledTensor,
        samples: TensorSamples,
        widths: Mapping[str, BitWidths],
        weight_error: float,
    ) -> None:
        self._tensor, self._samples, self._widths, self._weight_error = tensor, samples, widths, weight_error
        #: whole weights, which factors are proposed from, and the output channels that they are judged by
        self._whole = {
            name: denoiser.get_parameter(f"{name}.weight").detach()[:, tensor.start : tensor.stop].float().cpu()
            for name in tensor.readers
        }
        self._weights = {name: _judged_channels(weight) for name, weight in self._whole.items()}
        self._geometry: dict[str, Geometry] = dict(zip(tensor.readers, tensor.geometries, strict=True))
        self._rows = _RowLayout(samples.rows)
        self._outputs = {name: self._columns(name) @ weight.flatten(1).T for name, weight in self._weights.items()}
        self._ones = torch.ones(tensor.channels)
        self.plain_error = self.error(self._ones)

    def best(self, settings: ScalingSettings) -> tuple[str, Tensor, float]:
        """(name, factor [channels], error) of the method's best proposal; for `auto`, no factor is one of them."""
        found = [(label, factor, self.error(factor)) for label, factor in self._proposals(settings)]
        if settings.method == "auto":
            found.append(("none", self._ones, self.plain_error))
        return min(found, key=lambda item: item[2])

    def error(self, factor: Tensor) -> float:
        """Squared output error of all readers with quantized inputs and weights, each relative to its own output."""
        inputs: dict[tuple[Geometry, int | None], Tensor] = {}
        total = 0.0
        for name, weight in self._weights.items():
            widths = self._widths[name]
            key = (self._geometry[name], widths.activation)
            if key not in inputs:
                inputs[key] = self._quantized_columns(name, factor, widths.activation)
            exact = scaled_columns(weight, factor).flatten(1)
            rounded = exact.lerp(self._quantized_weight(weight, factor, widths.weight), self._weight_error)
            reference = self._outputs[name]
            difference = (inputs[key] @ rounded.T).sub_(reference)
            total += float(difference.square().sum() / reference.square().sum().clamp_min(1e-30))
        return total

    def effect(self, factor: Tensor, error: float) -> ScalingEffect:
        """DilateQuant's Table 8 for this tensor."""
        activations = [widths.activation for widths in self._widths.values() if widths.activation is not None]
        scale_ratio = clip_ratio = 1.0
        if activations:
            before, after = self._range(self._ones, activations[0]), self._range(factor, activations[0])
            scale_ratio = float((after[0] / before[0]).mean())
            clipped = self._clipped(self._ones, activations[0], before)
            clip_ratio = self._clipped(factor, activations[0], after) / clipped if clipped > 0 else 1.0
        return ScalingEffect(
            grown=float((factor > 1.0 + 1e-6).float().mean()),
            weight_scale=weight_scale_ratio(self._weights.values(), factor),
            activation_scale=scale_ratio,
            clip_error=clip_ratio,
            output_error=error / max(self.plain_error, 1e-30),
        )

    # Proposals

    def _proposals(self, settings: ScalingSettings) -> Iterator[tuple[str, Tensor]]:
        weights, method = list(self._whole.values()), settings.method
        if method in ("dilation", "auto"):
            yield "dilation", dilation_factors(weights)
        if method == "dilation-symmetric":
            yield "dilation-symmetric", dilation_factors(weights, symmetric=True)
        if method in ("capped-dilation", "auto"):
            yield f"capped-dilation {settings.cap:g}", dilation_factors(weights, cap=settings.cap)
        if method in ("smoothquant", "auto"):
            for strength in (settings.strength,) if method == "smoothquant" else _STRENGTHS:
                yield f"smoothquant {strength:g}", self._smooth(strength)
        if method == "awq":
            yield "awq", self._salient(settings.strength)
        if method == "omniquant":
            yield "omniquant", self._learned(settings.strength)
        if method == "dgq":
            yield "dgq", self._outlying()
        if method in ("os+", "auto"):
            for threshold in _THRESHOLDS:
                yield f"os+ {threshold:g}", self._suppressed(threshold)

    def _largest(self) -> Tensor:
        return torch.maximum(-self._samples.low, self._samples.high).clamp_min(_SMALLEST)

    def _smooth(self, strength: float) -> Tensor:
        """max|x_k|^a / max|w_k|^(1 - a), geometric mean 1 (SmoothQuant, arXiv:2211.10438, Eq. 4)."""
        columns = torch.stack([weight.abs().flatten(2).amax(dim=(0, 2)) if weight.ndim > 2 else weight.abs().amax(dim=0)
                               for weight in self._whole.values()]).amax(dim=0)  # fmt: skip
        factor = self._largest() ** strength / columns.clamp_min(_SMALLEST) ** (1 - strength)
        return (factor / factor.log().mean().exp()).clamp(1 / LARGEST_FACTOR, LARGEST_FACTOR)

    def _salient(self, strength: float) -> Tensor:
        """SmoothQuant's factor for the 1 % of channels with the largest mean |x|, one elsewhere (AWQ's salience)."""
        count = max(1, round(_AWQ_SHARE * self._tensor.channels))
        chosen = self._samples.mean.topk(count).indices
        factor = self._ones.clone()
        factor[chosen] = self._smooth(strength)[chosen].clamp_min(1.0)
        return factor

    def _outlying(self) -> Tensor:
        """The 0.5 % of channels that reach farthest are brought back to the clipping threshold (DGQ)."""
        count = max(1, round(_DGQ_SHARE * self._tensor.channels))
        largest = self._largest()
        chosen = largest.topk(count).indices
        factor = self._ones.clone()
        factor[chosen] = (largest[chosen] / self._threshold()).clamp(1.0, LARGEST_FACTOR)
        return factor

    def _suppressed(self, share: float) -> Tensor:
        """Every channel beyond `share` of the clipping threshold is brought back to it (Outlier Suppression+,
        arXiv:2304.09145, Eq. 5, the threshold chosen by output error).

        Its per-channel shift is left out: a shifted zero is no longer code 0, which convolutions pad with.
        """
        return (self._largest() / (share * self._threshold())).clamp(1.0, LARGEST_FACTOR)

    def _threshold(self) -> Tensor:
        """Where the tensor's own quantizer clips, the largest over its rows."""
        bits = next((item.activation for item in self._widths.values() if item.activation is not None), None)
        if bits is None:
            return self._largest().max()
        scale, zero = self._range(self._ones, bits)
        reach = torch.maximum(zero.float(), (2**bits - 1) - zero.float())
        return (scale * reach).max()

    def _learned(self, strength: float) -> Tensor:
        """SmoothQuant's factors, moved down the gradient of the readers' output error (OmniQuant's learnable scaling).

        Rounding passes gradients straight through; ranges follow the factors' extremes, at a fixed share of them.
        """
        logarithm = self._smooth(strength).log().requires_grad_(True)
        optimizer = torch.optim.Adam([logarithm], lr=_LEARNING_RATE)
        best, least = self._ones, float("inf")
        with torch.enable_grad():
            for step in range(_LEARNING_STEPS + 1):
                if step % _LEARNING_REFRESH == 0:
                    candidate = logarithm.detach().exp()
                    error = self.error(candidate)
                    best, least = (candidate, error) if error < least else (best, least)
                    shares = self._shares(candidate)
                loss = self._straight_through(logarithm.exp(), shares)
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
        return best.clamp(1 / LARGEST_FACTOR, LARGEST_FACTOR)

    def _shares(self, factor: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """For every reader, searched ÷ min-max scale of its weight [out, 1] and of its input (all rows as one)."""
        shares: dict[str, tuple[Tensor, Tensor]] = {}
        flat = self._samples.values.div(factor).reshape(1, -1)
        for name, weight in self._weights.items():
            columns = scaled_columns(weight, factor).flatten(1)
            widths = self._widths[name]
            weight_scale, _ = quick_range(columns, torch.ones_like(columns), widths.weight)
            bits = widths.activation
            input_scale = torch.ones(1) if bits is None else quick_range(flat, torch.ones_like(flat), bits)[0]
            span = 1.0 if bits is None else _min_max_scale(flat, bits)
            shares[name] = ((weight_scale / _min_max_scale(columns, widths.weight)).unsqueeze(1), input_scale / span)
        return shares

    def _straight_through(self, factor: Tensor, shares: Mapping[str, tuple[Tensor, Tensor]]) -> Tensor:
        total = torch.zeros(())
        for name, weight in self._weights.items():
            widths, (weight_share, input_share) = self._widths[name], shares[name]
            columns = scaled_columns(weight, factor).flatten(1)
            scale = _min_max_scale(columns, widths.weight).unsqueeze(1) * weight_share
            rounded = _fake_quantize(columns, scale, widths.weight)
            taps = self._columns(name).reshape(len(self._samples.rows), self._tensor.channels, -1)
            inputs = (taps / factor.unsqueeze(1)).flatten(1)
            if widths.activation is not None:
                span = _min_max_scale((self._samples.values / factor).reshape(1, -1), widths.activation)
                inputs = _fake_quantize(inputs, span * input_share, widths.activation)
            reference = self._outputs[name]
            total = total + (inputs @ rounded.T - reference).square().sum() / reference.square().sum().clamp_min(1e-30)
        return total

    # Quantization as judged

    def _columns(self, name: str) -> Tensor:
        return self._samples.columns[self._geometry[name]].flatten(1)

    def _range(self, factor: Tensor, bits: int) -> tuple[Tensor, Tensor]:
        values, weights = self._rows.pack(self._samples.values / factor)
        return quick_range(values, weights, bits)

    def _clipped(self, factor: Tensor, bits: int, qparams: tuple[Tensor, Tensor]) -> float:
        """Norm of what clipping takes away, in codes (E_clip of Eq. 9)."""
        values, weights = self._rows.pack(self._samples.values / factor)
        codes = values / qparams[0].unsqueeze(1)
        low = -qparams[1].float().unsqueeze(1)
        return float(((codes - codes.clamp(low, low + (2**bits - 1))) * weights).norm())

    def _quantized_columns(self, name: str, factor: Tensor, bits: int | None) -> Tensor:
        taps = self._samples.columns[self._geometry[name]] / factor.unsqueeze(1)
        if bits is not None:
            scale, zero = self._range(factor, bits)
            step = scale[self._rows.row].reshape(-1, 1, 1)
            low = -zero[self._rows.row].float().reshape(-1, 1, 1)
            taps = torch.minimum(torch.maximum(torch.round(taps / step), low), low + (2**bits - 1)) * step
        return taps.flatten(1)

    def _quantized_weight(self, weight: Tensor, factor: Tensor, bits: int) -> Tensor:
        columns = scaled_columns(weight, factor)
        flat = columns.flatten(1)
        moment = (self._samples.values / factor).square().mean(dim=0)
        moment = moment.clamp_min(1e-4 * float(moment.mean()) + 1e-12).repeat_interleave(flat.shape[1] // len(moment))
        scale, zero = quick_range(flat, moment.expand_as(flat), bits)
        low = -zero.float().unsqueeze(1)
        codes = torch.minimum(torch.maximum(torch.round(flat / scale.unsqueeze(1)), low), low + (2**bits - 1))
        return codes * scale.unsqueeze(1)


def _judged_channels(weight: Tensor) -> Tensor:
    """Evenly spread output channels of a large weight [out, ...], all of a small one."""
    channels = max(1, _JUDGED_WEIGHTS // weight[0].numel())
    if channels >= len(weight):
        return weight
    return weight[torch.arange(channels) * len(weight) // channels]


class _RowLayout:
    """Vectors sorted into their table rows, padded to one length: what range searches take."""

    def __init__(self, rows: Tensor) -> None:
        present, self.row = torch.unique(rows, return_inverse=True)
        counts = torch.bincount(self.row, minlength=len(present))
        order = torch.argsort(self.row, stable=True)
        position = torch.arange(len(rows)) - (counts.cumsum(0) - counts)[self.row[order]]
        self._index = torch.zeros(len(present), int(counts.max()), dtype=torch.int64)
        self._index[self.row[order], position] = order
        self._weight = torch.zeros(self._index.shape)
        self._weight[self.row[order], position] = 1.0

    def pack(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """values [n, channels] → (values, weights) [rows, longest · channels]; padding has weight 0."""
        weights = self._weight.unsqueeze(2).expand(*self._weight.shape, values.shape[1])
        return (values[self._index] * weights).flatten(1), weights.flatten(1)


def _min_max_scale(values: Tensor, bits: int) -> Tensor:
    """(max - min) / (2^bits - 1) of every row (DilateQuant, Eq. 3), zero always inside. values [rows, n]."""
    span = values.amax(dim=1).clamp_min(0.0) - values.amin(dim=1).clamp_max(0.0)
    scale: Tensor = (span / (2**bits - 1)).clamp_min(1e-12)
    return scale


def _fake_quantize(values: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Round to the grid and clip to about the range's share of it; gradients pass straight through."""
    levels = 2**bits - 1
    low = -torch.round(-values.detach().amin(dim=-1, keepdim=True).clamp_max(0.0) / scale.detach()).clamp(0, levels)
    codes = values / scale
    rounded = codes + (torch.round(codes) - codes).detach()
    return torch.minimum(torch.maximum(rounded, low), low + levels) * scale
