"""Which layer gets how many bits. Uniform bits with named exceptions; a budgeted allocator would enter here."""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from calib.freeze import LayerBits
from calib.probe import ProbeResult
from dmqexport.errors import RecipeError
from dmqexport.quant_types import MAX_BITS, BitWidths


def uniform(
    found: ProbeResult,
    bits: BitWidths,
    boundary: Sequence[str],
    overrides: Mapping[str, BitWidths],
    keep_float: Sequence[str],
) -> dict[str, LayerBits]:
    """Give every layer `bits`; `boundary` patterns get 8 bits, `overrides` their own, `keep_float` none.

    Patterns are shell globs over fully qualified names; the last override that matches wins. Raises RecipeError for a
    pattern that matches no layer: a silent exception is the commonest way to lose accuracy or speed unnoticed.
    """
    names = [layer.name for layer in found.layers]
    for label, patterns in (("boundary", boundary), ("overrides", overrides), ("keep_float", keep_float)):
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise RecipeError(
                    f"quantization.{label}: {pattern!r} matches no layer of the model",
                    hint=f"layers are named like {', '.join(names[:3])}",
                )
    return named_widths(names, bits, boundary, overrides, keep_float)


def named_widths(
    names: Sequence[str],
    bits: BitWidths,
    boundary: Sequence[str],
    overrides: Mapping[str, BitWidths],
    keep_float: Sequence[str],
) -> dict[str, LayerBits]:
    """What `uniform` gives layers of these names; patterns that match none of them are passed over."""
    chosen: dict[str, LayerBits] = {}
    for name in names:
        entry = LayerBits(bits)
        if any(fnmatchcase(name, pattern) for pattern in boundary):
            widths = BitWidths(max(MAX_BITS, bits.weight), None if bits.activation is None else MAX_BITS)
            entry = LayerBits(widths, "boundary layer: 8 bits by name")
        for pattern, widths in overrides.items():
            if fnmatchcase(name, pattern):
                entry = LayerBits(widths, f"override {pattern!r}")
        if any(fnmatchcase(name, pattern) for pattern in keep_float):
            entry = LayerBits(None, "kept in float by the recipe")
        chosen[name] = entry
    return chosen
