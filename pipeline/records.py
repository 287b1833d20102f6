"""Records: stored pictures decoded once, of one size, so that a view is cut out of one without decoding."""

import io
from base64 import b85decode
from functools import cache
from hashlib import sha256

import numpy as np
import simplejpeg
import xxhash
from PIL import Image

# "rgb": planes of red, green and blue, which a CPU mirrors and converts much faster than pixels of three bytes.
# "yuv420": the JPEG's own planes, Y, then Cb and Cr of half the side each, rounded up.
KINDS = ("rgb", "yuv420")
# 37 × 29 pixels, 4:2:0, to tell decoders apart
JPEG = b85decode(
    b"|JeWF01!$>Nk#wx0RR9200961|JwjV01XKW3knDg3knMk4h;_zAQcl55)&sJ9v2`kDKRiEDJ?8BI!Zn>HbyrrEkIX6ModmpQ&KWMT47pHU`k"
    b"O^PygEhLjevB4iga*CKVMXPc<zyPft%zPft%zPft%zPft%zPft%zPft%zPft%zPft%zPft%zPft%zPft%zPft%zPf!2A01*fP9RMW*0U`hb5"
    b"di}c0sq7R82|tS0RaI30000000000000051_S~F|HJ?)5C8!K0|EpE1poj500000009631Oo*TAu$pnK~V-"
    b"2ae=WD7D8c>|HJ?o0RRI50RR91000000000000RUC0S5oX03{Is0R#d71P1^B000000000100IL95g`Q<6EPJ*LQzv<k^kBN3<CiG0ucid06"
    b"zf1YL?h?1FCEY_D|&AD9xf9Oz-Hh%&=ye033QG&!p>Hz-"
    b"jBMcFpMA@M79pvkRS%TJB5=o@eTCoM+WgTW_)B(q$Ts)uXR<?`ew3@VMLoIMZEJ{ldsuDb8Wo<7GM3hY)dey5&}@Qw?|6_f>y!#^D--DFX%c"
    b"^!Y;2*g(RnIAla;D%yQkwTGKug)25On(jbI&vfGDpD&!Qd_2a~bxtqGIR2(#s@RxpcgK?Cqq~;%0N6^RO|5Nsrs7)Cd#9pIYSFlyL4Go(yi^"
    b"4_yqa#Y!;?_8ptz8FWd>-??XdFW*;jBPHas1@Kd4wAqmQx578g8&kJfiW2&<%D1e4`ItN+;"
)


def record_bytes(kind: str, size: int) -> int:
    """Return the bytes of a record of a picture of size × size pixels."""
    return size * size * 3 if kind == "rgb" else size * size + 2 * ((size + 1) // 2) ** 2


def record_of(jpeg: bytes | np.ndarray, kind: str, size: int, out: np.ndarray | None = None) -> np.ndarray:
    """Decode a stored JPEG to a record, (bytes,) uint8, in `out` if it is given.

    The pixels are those of libjpeg's accurate DCT and, of "rgb", its smooth chroma. Raises ValueError: it does not
    decode without a warning, has another size, or colours that such a record does not hold.
    """
    height, width, colours, subsampling = simplejpeg.decode_jpeg_header(jpeg)
    if (height, width) != (size, size) or colours in ("CMYK", "YCCK"):
        raise ValueError(f"{width}×{height}, {colours}, not RGB of {size}×{size}")
    record = np.empty(record_bytes(kind, size), np.uint8) if out is None else out
    if kind == "rgb":
        pixels = simplejpeg.decode_jpeg(jpeg, "RGB", strict=True)
        for plane, channel in zip(record.reshape(3, size, size), range(3)):
            plane[...] = pixels[..., channel]
        return record
    luma, chroma = record[: size * size], record[size * size :].reshape(2, -1)
    if colours == "Gray":
        chroma[...] = 128
    elif (colours, subsampling) == ("YCbCr", "420"):
        chroma[...] = _chroma(jpeg, height, width)
    else:
        raise ValueError(f"{colours}, {subsampling}, not YCbCr with 4:2:0")
    simplejpeg.decode_jpeg(jpeg, "GRAY", buffer=luma, strict=True)
    return record


def _chroma(jpeg: bytes | np.ndarray, height: int, width: int) -> np.ndarray:
    """Return the chroma of a 4:2:0 JPEG as it is stored, (2, pixels) uint8."""
    with Image.open(io.BytesIO(bytes(jpeg))) as image:
        image.draft("YCbCr", (width // 2, height // 2))  # at half the size libjpeg has no need to enlarge it
        try:
            return np.asarray(image).reshape(-1, 3).T[1:]
        except OSError as error:
            raise ValueError(str(error)) from error


def digest(record: np.ndarray) -> int:
    """Return the XXH3-64 of a record, which is checked whenever it is read: 15 times as fast as a CRC-32."""
    return xxhash.xxh3_64_intdigest(record.data)


@cache
def fingerprint(kind: str) -> str:
    """Return a digest of the pixels that this machine makes of a JPEG: decoders with equal pixels have the same one."""
    rgb = simplejpeg.decode_jpeg(JPEG, "RGB" if kind == "rgb" else "GRAY").tobytes()
    return sha256(rgb if kind == "rgb" else rgb + _chroma(JPEG, 29, 37).tobytes()).hexdigest()
