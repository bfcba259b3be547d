"""The quantizers of every layer at every candidate width, made once and combined at will."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from calib.freeze import LayerBits, freeze
from calib.observer import ActivationStatistics
from calib.probe import ProbeResult
from calib.quantizer import ActivationQuantizer, QuantizedLayer, RowContext, simulate
from calib.range_search import RangeMethod
from calib.weight_dilation import scaled_columns
from dmqexport.errors import CalibrationError
from dmqexport.quant_plan import LayerQuant, QuantPlan
from dmqexport.quant_types import BitWidths, CodeArray, FloatArray, IntArray
from dmqexport.quant_weights import QuantWeights
from dmqexport.ranks import ALONE, Ranks, share

FLOAT_BITS = 16  # how names of pairs write "not quantized"


@dataclass(frozen=True, order=True)
class WidthPair:
    """Weight and activation bits of one layer while sensitivities are measured; None leaves that side in float."""

    weight: int | None
    activation: int | None

    def __str__(self) -> str:
        return f"w{self.weight or FLOAT_BITS}a{self.activation or FLOAT_BITS}"

    @classmethod
    def parse(cls, text: str) -> "WidthPair":
        """What `str` wrote."""
        weight, _, activation = text.removeprefix("w").partition("a")
        bits = [None if int(part) == FLOAT_BITS else int(part) for part in (weight, activation)]
        return cls(*bits)


class _MixedCodes(QuantWeights):
    """Weight codes of a mixed plan, each layer's from the file of its width."""

    def __init__(self, by_width: Mapping[int, QuantWeights], chosen: Mapping[str, int]) -> None:
        self.path = next(iter(by_width.values())).path
        self._by_width = by_width
        self._chosen = chosen

    def codes(self, layer: str, segment: int) -> CodeArray:
        return self._by_width[self._chosen[layer]].codes(layer, segment)

    def __contains__(self, key: str) -> bool:
        layer = key.rpartition("#")[0]
        return layer in self._chosen and key in self._by_width[self._chosen[layer]]


class Candidates:
    """One uniform plan a width; a layer of weight bits w and activation bits a takes its halves from two of them."""

    def __init__(self, folder: Path, widths: Sequence[int]) -> None:
        """Open what `build` wrote; raises BundleError for a damaged folder."""
        self.widths = tuple(widths)
        self._plans = {width: QuantPlan.load(folder / str(width)) for width in widths}
        self._weights = {width: QuantWeights(folder / str(width) / "codes.safetensors") for width in widths}
        self._layers = {width: {layer.name: layer for layer in plan.layers} for width, plan in self._plans.items()}

    @staticmethod
    def build(
        folder: Path,
        denoiser: nn.Module,
        found: ProbeResult,
        widths: Sequence[int],
        statistics: Mapping[str, ActivationStatistics],
        row_map: IntArray,
        model_fingerprint: str,
        *,
        quantized_activations: bool = True,
        search: RangeMethod = "mse",
        factors: Mapping[str, FloatArray] | None = None,
        progress: Callable[[int, int], None] | None = None,
        timestep_scale: float = 1.0,
        ranks: Ranks = ALONE,
    ) -> None:
        """Freeze every layer at each of `widths`, rounding to nearest, into `folder`; `search`, `factors` as `freeze`.

        Without `quantized_activations` the pairs of these candidates have activation None. ranks: processes that share
        the widths, and the folder.
        """
        ranks.meet("candidates")  # rank 0 makes the folder
        mine = share(ranks, widths)
        for number, width in enumerate(mine):
            target = folder / str(width)
            target.mkdir()

            def advance(done: int, total: int, number: int = number) -> None:
                if progress is not None:
                    progress(number * total + done, total * len(mine))

            widths_here = BitWidths(width, width if quantized_activations else None)
            bits = {info.name: LayerBits(widths_here) for info in found.layers}
            plan = freeze(
                denoiser, found, bits, statistics, row_map, None, model_fingerprint, str(widths_here),
                target / "codes.safetensors", progress=advance, search=search, factors=factors,
                timestep_scale=timestep_scale,
            )  # fmt: skip
            plan.save(target)
        ranks.meet("candidates")

    @property
    def row_map(self) -> IntArray:
        """int64 [timesteps], timestep value → table row."""
        return self._plans[self.widths[0]].row_map

    def layer(self, name: str, pair: WidthPair) -> LayerQuant:
        """Layer `name` at `pair`; float weights take any width's qparams, which `module` then ignores."""
        weights = self._at(pair.weight or self.widths[-1], name)
        activations = None if pair.activation is None else self._at(pair.activation, name)
        segments = tuple(
            replace(segment, activation=None if activations is None else activations.segments[index].activation)
            for index, segment in enumerate(weights.segments)
        )
        return replace(weights, segments=segments)

    def plan(self, choice: Mapping[str, WidthPair]) -> tuple[QuantPlan, QuantWeights]:
        """A plan of the layers in `choice` (the others stay in float) and its codes."""
        template = self._plans[self.widths[0]]
        layers = tuple(self.layer(layer.name, choice[layer.name]) for layer in template.layers if layer.name in choice)
        chosen = {layer.name: layer.weight_bits for layer in layers}
        return replace(template, layers=layers), _MixedCodes(self._weights, chosen)

    @contextmanager
    def simulated(self, denoiser: nn.Module, choice: Mapping[str, WidthPair]) -> Iterator[None]:
        """Inside the block, `denoiser` computes with every layer of `choice` fake-quantized at its pair."""
        plan, codes = self.plan(choice)
        with simulate(denoiser, plan, codes):
            for name, pair in choice.items():
                if pair.activation is None:
                    self._unscale(denoiser.get_submodule(name), name)
            yield

    def module(self, base: nn.Module, name: str, pair: WidthPair, context: RowContext) -> QuantizedLayer:
        """A fake-quantized module in place of `base`."""
        assert isinstance(base, (nn.Conv2d, nn.Linear))
        layer = self.layer(name, pair)
        module = QuantizedLayer(base, layer, self._weights[layer.weight_bits], context)
        for index, segment in enumerate(layer.segments):
            factor = self.factor(name, index)
            if pair.weight is None:
                part = base.weight.detach()[:, segment.start : segment.stop]
                if factor is not None and pair.activation is not None:
                    part = scaled_columns(part, factor)
                setattr(module, f"weight_{index}", part)
        if pair.weight is not None and pair.activation is None:
            self._unscale(module, name)
        return module

    def input_values(self, base: nn.Module, name: str, bits: int, context: RowContext) -> Callable[[Tensor], Tensor]:
        """From what layer `name` reads to the real values that its codes of `bits` bits stand for, same shape."""
        axis = 1 if isinstance(base, nn.Conv2d) else -1
        parts = []
        for index, segment in enumerate(self._at(bits, name).segments):
            assert segment.activation is not None
            quantizer = ActivationQuantizer(f"{name}#{index}", segment.activation, context, axis)
            parts.append((segment.start, segment.stop - segment.start, quantizer, self.factor(name, index)))

        def values(tensor: Tensor) -> Tensor:
            place, found = axis % tensor.ndim, []
            for start, length, quantizer, factor in parts:
                part = quantizer.rescale(quantizer.to(tensor.device)(tensor.narrow(place, start, length)))
                if quantizer.has_shift:
                    part = part - quantizer.per_sample(quantizer.correction, part)
                if factor is not None:  # the weight would undo it; here the value itself is wanted
                    part = part * factor.to(part.device).reshape(-1, *([1] * (tensor.ndim - 1 - place)))
                found.append(part)
            return torch.cat(found, dim=place) if len(found) > 1 else found[0]

        return values

    def _unscale(self, module: nn.Module, name: str) -> None:
        """Let weights whose codes were made for an input divided by a channel factor multiply one that is not."""
        for index in range(len(self._at(self.widths[0], name).segments)):
            factor = self.factor(name, index)
            if factor is not None:
                part = getattr(module, f"weight_{index}")
                setattr(module, f"weight_{index}", scaled_columns(part, 1.0 / factor))

    def factor(self, name: str, segment: int) -> Tensor | None:
        """The channel factor of a layer's input, float32 [channels], where it has one."""
        activation = self._at(self.widths[0], name).segments[segment].activation
        factor = None if activation is None else activation.channel_factor
        return None if factor is None else torch.from_numpy(factor.copy())

    def _at(self, width: int, name: str) -> LayerQuant:
        try:
            return self._layers[width][name]
        except KeyError as error:
            raise CalibrationError(
                f"no {width}-bit quantizer of {name!r} was prepared; widths are {self.widths}",
                hint="name the width in allocation.weight_bits or allocation.activation_bits",
            ) from error
