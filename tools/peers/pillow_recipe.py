"""The recipe of those who write their own loop: stock Pillow, shorter side to 256 (bicubic), centre crop, JPEG 95."""

import io

from PIL import Image

from tools.peers.job import QUALITY, SIDE


def stored_jpeg(path: str) -> bytes:
    """The JPEG to store for the picture at `path`."""
    with Image.open(path) as opened:
        image = opened.convert("RGB")
    short = min(image.size)
    width, height = (max(SIDE, round(side * SIDE / short)) for side in image.size)
    left, top = (width - SIDE) // 2, (height - SIDE) // 2
    image = image.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + SIDE, top + SIDE))
    out = io.BytesIO()
    image.save(out, "JPEG", quality=QUALITY)
    return out.getvalue()
