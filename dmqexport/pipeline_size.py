"""How much is done at once and in all, from what a model costs: batches that fit memory, judging that ends."""

from dataclasses import dataclass

from dmqexport.models.footprint import Footprint
from dmqexport.recipe_sections import ValidationRecipe

#: Working memory for activations and moments where the recipe sets no limit.
WORKING_BYTES = 2 * 2**30
TORCH_SHARE = 3  # measured ÷ counted memory of a forward: the allocator keeps freed blocks, hooks make copies
GRAPH_SHARE = 2
_JUDGED_MACS = 2e12  # of each measure where the recipe names no number: minutes on two cores
_IMAGES, _ENTRIES, _LAYER_ENTRIES = 16, 400, 40


@dataclass(frozen=True)
class ValidationSize:
    """What the deployed graph is judged on. batch_size: of forwards; layer_batch: with every layer's result kept.
    reduced: whether there is less of anything than for a small model.
    """

    images: int
    entries: int
    layer_entries: int
    batch_size: int
    layer_batch: int
    reduced: bool


def batch_within(most: int, footprint: Footprint | None, memory: int = WORKING_BYTES) -> int:
    """Samples at once, at most `most`, that a forward of torch fits into `memory` bytes."""
    if footprint is None:
        return most
    return max(1, min(most, memory // (TORCH_SHARE * footprint.live_bytes)))


def sketch_bytes(footprint: Footprint, probes: int) -> int:
    """Memory of a sketch of sensitivities for one sample: every layer's input, output and graph, a gradient a probe."""
    return 2 * (3 + probes) * footprint.output_bytes


def sketch_within(most: int, footprint: Footprint | None, probes: int, memory: int = WORKING_BYTES) -> int:
    """Samples at once, at most `most`, that a sketch fits into `memory` bytes."""
    if footprint is None:
        return most
    return max(1, min(most, memory // max(sketch_bytes(footprint, probes), 1)))


def validation_size(
    recipe: ValidationRecipe, footprint: Footprint | None, calls: int, memory: int = WORKING_BYTES
) -> ValidationSize:
    """What the recipe says; where it leaves a number open, as much as for a small model, or what a large one allows.

    calls: denoiser evaluations of one picture, guidance counted.
    """
    macs = footprint.macs if footprint is not None else 0
    live = footprint.graph_bytes if footprint is not None else 0
    kept = footprint.output_bytes if footprint is not None else 0

    def within(limit: int, cost: float) -> int:
        return max(1, min(limit, int(_JUDGED_MACS / max(cost, 1.0))))

    def at_once(bytes_a_sample: int) -> int:
        return max(1, min(recipe.batch_size, memory // max(bytes_a_sample, 1)))

    images = recipe.images or within(_IMAGES, macs * calls)
    entries = recipe.entries or max(2, within(_ENTRIES, macs))
    layer_entries = recipe.layer_entries or max(2, within(_LAYER_ENTRIES, 4 * macs))
    large = macs * _ENTRIES > _JUDGED_MACS
    return ValidationSize(
        images=images,
        entries=entries,
        layer_entries=layer_entries,
        batch_size=at_once(GRAPH_SHARE * live),
        layer_batch=at_once(GRAPH_SHARE * live + 2 * kept),
        reduced=large and (images < _IMAGES or entries < _ENTRIES or layer_entries < _LAYER_ENTRIES),
    )
