"""The integer weights beside a plan, read layer by layer."""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from dmqexport.errors import BundleError
from dmqexport.quant_types import CodeArray

WEIGHT_CODES = "quant_weights.safetensors"


class QuantWeights:
    """Signed weight codes on disk, int8 in torch layout, one tensor a segment: `layer#segment`. Read one at a time."""

    def __init__(self, path: Path) -> None:
        """Open `path` lazily; raises BundleError when it cannot be read."""
        self.path = path
        try:
            with safe_open(str(path), framework="numpy") as handle:
                self._names = frozenset(handle.keys())
        except Exception as error:
            raise BundleError(f"{path}: weight codes cannot be read ({error})") from error

    @staticmethod
    def save(path: Path, codes: Mapping[str, CodeArray]) -> None:
        """Write `codes` keyed by `layer#segment`."""
        save_file({name: np.ascontiguousarray(array) for name, array in codes.items()}, str(path))

    @staticmethod
    @contextmanager
    def writing(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[Callable[[str, CodeArray], None]]:
        """Yield a function that takes (`layer#segment`, its codes), in any order, and writes them at once: the file
        that `save` makes of all of them, without their being in memory together. shapes: of every one.
        """
        start, places, header = 0, {}, {}
        for key in sorted(shapes):
            places[key] = start
            stop = start + math.prod(shapes[key])
            header[key] = {"dtype": "I8", "shape": list(shapes[key]), "data_offsets": [start, stop]}
            start = stop
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)  # the layout of safetensors: length of the header, header, data
        with path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)

            def write(key: str, codes: CodeArray) -> None:
                assert codes.shape == shapes[key], f"{key}: codes {codes.shape}, announced {shapes[key]}"
                assert codes.dtype == np.int8
                file.seek(8 + len(text) + places[key])
                file.write(np.ascontiguousarray(codes).data)
                del places[key]

            yield write
        assert not places, f"never written: {sorted(places)[:3]}"

    def codes(self, layer: str, segment: int) -> CodeArray:
        """Return the codes of one segment, int8 [out_channels, segment channels, ...]."""
        key = f"{layer}#{segment}"
        if key not in self:
            raise BundleError(
                f"{self.path}: no weight codes for {key!r}", hint="plan and codes are of different builds"
            )
        with safe_open(str(self.path), framework="numpy") as handle:
            array: CodeArray = handle.get_tensor(key)
        return array

    def shape(self, layer: str, segment: int) -> tuple[int, ...]:
        """Shape of the codes of one segment; their values are not read."""
        with safe_open(str(self.path), framework="numpy") as handle:
            return tuple(handle.get_slice(f"{layer}#{segment}").get_shape())

    def __contains__(self, key: str) -> bool:
        return key in self._names
