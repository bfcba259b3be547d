"""Sensitivities of all layers and widths at once, from random vector-Jacobian products.

For a small error δ at a layer's output, the output's distortion is δᵀJᵀHJδ with J the Jacobian of what follows and H
the curvature of the metric. A random v of covariance H (`Metric.probe`) makes (v·Jδ)² = (g·δ)² an unbiased estimate,
where g = Jᵀv comes for every layer from one backward pass. δ itself is exact: the layer's quantized output minus the
float one, on the same inputs. The cost is a few passes, whatever the number of layers; the sweep's is layers × widths.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from calib.candidates import Candidates, WidthPair
from calib.metrics import Metric
from calib.probe import removing
from calib.quantizer import RowContext
from calib.sampling import TIMESTEP, CalibrationSet
from calib.sensitivity import Journal, Progress, Run, Sensitivity
from dmqexport.errors import CalibrationError
from dmqexport.ranks import ALONE, Ranks


def measure_sketch(
    denoiser: nn.Module,
    candidates: Candidates,
    pairs: Mapping[str, Sequence[WidthPair]],
    calibration: CalibrationSet,
    run: Run,
    metric: Metric,
    batch_size: int,
    probes: int,
    seed: int,
    journal: Path,
    progress: Progress | None = None,
    ranks: Ranks = ALONE,
) -> Sensitivity:
    """Estimate the distortion of every layer at each of its `pairs` with `probes` backward passes a batch.

    `run` must build an autograd graph (no torch.no_grad inside); where it gives fewer outputs than it reads entries,
    neighbouring entries are judged together. Memory: the activations of one batch and `probes` gradients of each
    layer's output. Finished (batch, layer) parts are read from `journal` and new ones appended; `ranks` share the
    others.
    """
    kept = Journal(journal, ranks)
    context = RowContext(torch.from_numpy(candidates.row_map.copy()), timestep_scale=calibration.timestep_scale)
    batches = list(calibration.batches(batch_size))
    shared = kept.missing(len(batches), pairs)
    total, done = sum(len(names) for names in shared.values()), 0
    for number, missing in shared.items():
        entries, inputs = batches[number]
        context.set_timestep(inputs[TIMESTEP], len(entries))
        generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
        read, gradients, outputs = _gradients(denoiser, missing, partial(run, inputs), metric, probes, generator)
        for name in missing:
            with torch.no_grad():
                base = denoiser.get_submodule(name)
                grads = gradients.pop(name)
                values = _contract(base, name, read.pop(name), grads, outputs, candidates, pairs[name], context)
            kept.add(number, name, values)
            done += 1
            if progress is not None:
                progress(done, total)
    return kept.finish(len(calibration))


def _gradients(
    denoiser: nn.Module, names: Sequence[str], run: Any, metric: Metric, probes: int, generator: torch.Generator
) -> tuple[dict[str, Tensor], dict[str, Tensor], int]:
    """Each layer's input [batch, ...], the gradients at its output [probes, batch, ...], how many outputs `run` has."""
    read: dict[str, Tensor] = {}
    written: dict[str, Tensor] = {}

    def hook(name: str) -> Any:
        def observe(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            read[name] = args[0].detach()
            # A leaf of its own where nothing before it needs gradients.
            written[name] = output if output.requires_grad else output.detach().requires_grad_()
            return written[name]

        return observe

    frozen = {parameter: parameter.requires_grad for parameter in denoiser.parameters()}
    handles = [denoiser.get_submodule(name).register_forward_hook(hook(name)) for name in names]
    try:
        for parameter in frozen:
            parameter.requires_grad_(False)
        with removing(handles), torch.enable_grad():
            output = run()
        if not output.requires_grad:
            raise CalibrationError(
                "the model's output carries no gradients, so sensitivities cannot be sketched",
                hint="use allocation.sensitivity=exact",
            )
        targets = [written[name] for name in names]
        found: list[list[Tensor]] = []
        for index in range(probes):
            probe = metric.probe(output.detach(), generator)
            last = index == probes - 1
            grads = torch.autograd.grad(output, targets, probe, retain_graph=not last, allow_unused=True)
            found.append(
                [torch.zeros_like(at) if grad is None else grad for at, grad in zip(targets, grads, strict=True)]
            )
    finally:
        for parameter, needed in frozen.items():
            parameter.requires_grad_(needed)
    gradients = {name: torch.stack([part[index] for part in found]) for index, name in enumerate(names)}
    return read, gradients, len(output)


def _contract(
    base: nn.Module,
    name: str,
    read: Tensor,
    gradient: Tensor,
    outputs: int,
    candidates: Candidates,
    pairs: Sequence[WidthPair],
    context: RowContext,
) -> dict[WidthPair, float]:
    """Sum over outputs of the mean over probes of (g·δ)², for every pair. gradient [probes, batch, ...]."""
    assert isinstance(base, (nn.Conv2d, nn.Linear))
    probes, batch = gradient.shape[:2]
    flat = gradient.reshape(probes, batch, -1)

    def projected(output: Tensor) -> Tensor:
        """g·output, summed over the entries that are judged together, [probes, outputs]."""
        return (flat * output.reshape(batch, -1)).sum(dim=2).reshape(probes, outputs, -1).sum(dim=2)

    reference = projected(_operate(base, read, base.weight))
    weights = {
        bits: base.weight if bits is None else _rounded(base, name, bits, candidates, context)
        for bits in dict.fromkeys(pair.weight for pair in pairs)
    }
    result: dict[WidthPair, float] = {}
    for activation in dict.fromkeys(pair.activation for pair in pairs):
        values = read if activation is None else candidates.input_values(base, name, activation, context)(read)
        chosen = [pair for pair in pairs if pair.activation == activation]
        for pair in chosen:
            output = _operate(base, values, weights[pair.weight])
            result[pair] = float((projected(output) - reference).double().square().mean(dim=0).sum())
    return result


def _operate(base: nn.Conv2d | nn.Linear, tensor: Tensor, weight: Tensor) -> Tensor:
    """The layer without its bias."""
    if isinstance(base, nn.Linear):
        return F.linear(tensor, weight)
    return F.conv2d(tensor, weight, None, base.stride, base.padding, base.dilation, base.groups)


def _rounded(base: nn.Module, name: str, bits: int, candidates: Candidates, context: RowContext) -> Tensor:
    module = candidates.module(base, name, WidthPair(bits, None), context)
    parts = [getattr(module, f"weight_{index}") for index in range(len(module.spans))]
    return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
