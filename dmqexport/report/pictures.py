"""The float model's pictures against the quantized model's, from the same seeds."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from dmqexport.report.document import CAP_DB, ReportError

DIFFERENCE_GAIN = 4
"""Differences are shown this many times brighter, because a good result shows nothing at all otherwise."""

_SHOWN_SIDE = 256
_LOSSLESS_SIDE = 128
_PAPER = (255, 255, 255)
_INK = (36, 41, 47)

Pixels = NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class ReportImages:
    """Pictures of both models, uint8 [N, H, W, 3], picture by picture from the same seed and prompt."""

    fp: Pixels
    quantized: Pixels
    captions: Sequence[str]

    def __post_init__(self) -> None:
        """Refuse pictures that cannot be compared one to one."""
        for name, pixels in (("fp", self.fp), ("quantized", self.quantized)):
            if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[-1] != 3 or 0 in pixels.shape:
                raise ReportError(
                    f"report images, {name}: got {pixels.dtype} {list(pixels.shape)}, expected uint8 [N, H, W, 3]",
                    hint="map the model's range to 0..255, round, clip, and put the channels last",
                )
        if self.fp.shape != self.quantized.shape:
            raise ReportError(
                f"report images: fp has shape {list(self.fp.shape)}, quantized {list(self.quantized.shape)}",
                hint="sample both models with the same seeds",
            )
        if len(self.captions) != len(self.fp):
            raise ReportError(f"report images: {len(self.captions)} captions for {len(self.fp)} pictures")
        for name in ("fp", "quantized"):
            pixels = getattr(self, name).copy()
            pixels.flags.writeable = False
            object.__setattr__(self, name, pixels)
        object.__setattr__(self, "captions", tuple(str(caption) for caption in self.captions))

    def __len__(self) -> int:
        return len(self.fp)


@dataclass(frozen=True)
class Picture:
    """One column of the report's picture grid, ready for an <img>."""

    caption: str
    fp: str
    quantized: str
    difference: str
    psnr_db: float
    width: int
    height: int
    pixelated: bool


def embed(images: ReportImages, limit: int) -> list[Picture]:
    """Return the first `limit` pictures as data URIs with their difference and PSNR."""
    return [
        _picture(images.fp[index], images.quantized[index], images.captions[index])
        for index in range(min(limit, len(images)))
    ]


def psnr_db(reference: Pixels, other: Pixels) -> float:
    """Return the peak signal-to-noise ratio of 8-bit pixels, at most CAP_DB."""
    error = float(np.mean((reference.astype(np.float64) - other) ** 2))
    return CAP_DB if error == 0 else float(10 * np.log10(255**2 / error))


def difference(images: ReportImages) -> Pixels:
    """Return |quantized - fp|, brightened by DIFFERENCE_GAIN."""
    return _difference(images.fp, images.quantized)


def picture_grid(
    images: ReportImages,
    scale: int,
    *,
    labels: tuple[str, str] = ("FP32", "quantized"),
    with_difference: bool = False,
) -> Image.Image:
    """Return one picture: the float row above the quantized row, and their difference below if asked.

    Every pixel becomes `scale` × `scale`; small pictures keep their hard edges, because smoothing hides exactly the
    noise that quantization adds.
    """
    if scale < 1:
        raise ReportError(f"picture grid: scale is {scale}, expected a whole number from 1 up")
    rows = [(labels[0], images.fp), (labels[1], images.quantized)]
    if with_difference:
        rows.append((f"difference ×{DIFFERENCE_GAIN}", difference(images)))
    number, high, wide = (int(side) for side in images.fp.shape[:3])
    high, wide = high * scale, wide * scale
    gap = max(4, wide // 24)
    font = ImageFont.load_default(size=min(28, max(13, high // 7)))
    margin = 2 * gap + max(int(font.getlength(label)) for label, _ in rows)
    sheet = Image.new("RGB", (margin + number * (wide + gap), gap + len(rows) * (high + gap)), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for line, (label, pixels) in enumerate(rows):
        top = gap + line * (high + gap)
        draw.text((margin - gap, top + high / 2), label, fill=_INK, font=font, anchor="rm")
        for column, one in enumerate(pixels):
            tile = Image.fromarray(one).resize((wide, high), Image.Resampling.NEAREST)
            sheet.paste(tile, (margin + column * (wide + gap), top))
    return sheet


def _picture(fp: Pixels, quantized: Pixels, caption: str) -> Picture:
    high, wide = fp.shape[:2]
    shrink = min(1.0, _SHOWN_SIDE / max(high, wide))
    side = (max(1, round(wide * shrink)), max(1, round(high * shrink)))
    # The difference is taken before shrinking, which would average it away.
    return Picture(
        caption=caption,
        fp=_data_uri(fp, side),
        quantized=_data_uri(quantized, side),
        difference=_data_uri(_difference(fp, quantized), side),
        psnr_db=psnr_db(fp, quantized),
        width=side[0],
        height=side[1],
        pixelated=max(side) <= _LOSSLESS_SIDE,
    )


def _difference(fp: Pixels, quantized: Pixels) -> Pixels:
    gap: NDArray[np.int16] = np.abs(fp.astype(np.int16) - quantized.astype(np.int16)) * np.int16(DIFFERENCE_GAIN)
    return gap.clip(0, 255).astype(np.uint8)


def _data_uri(pixels: Pixels, side: tuple[int, int]) -> str:
    image = Image.fromarray(pixels)
    if image.size != side:
        image = image.resize(side, Image.Resampling.LANCZOS)
    small = max(side) <= _LOSSLESS_SIDE
    kind = "png" if small else "webp"
    options: dict[str, Any] = {"optimize": True} if small else {"quality": 90, "method": 4}
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
