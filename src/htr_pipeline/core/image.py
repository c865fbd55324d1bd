"""Line images: read safely, normalised to one height with ink high and paper at zero."""

import contextlib
import io
import json
import math
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import cv2
import numpy as np
import PIL
from PIL import ExifTags, Image, UnidentifiedImageError

from htr_pipeline.core.config import UserError, config, setting

# Pixels of width that the network turns into one frame; core/model.py builds its pooling from it, and validation
# needs it to reject lines that are too narrow for their text, without TensorFlow.
DOWNSAMPLING = 4
MAX_IMAGE_PIXELS = 100_000_000
MAX_IMAGE_SIDE = 65_500  # the most that JPEG can have
IMAGE_FORMATS = ("PNG", "JPEG", "TIFF")
# Raised when the same image and the same settings give other pixels than before, here or in core/cutting.py.
_NORMALISATION_VERSION = 8
# How an image is brought upright, by its EXIF orientation, and the orientations that lie on the side.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ON_THE_SIDE = (5, 6, 7, 8)
_PIXELS_AT_A_TIME = 4_000_000  # that are brought to grey together
_MAX_FRAMES = 100  # of a TIFF, that are looked at
_WHITES_OF_16_BITS = (1023.0, 4095.0, 16383.0, 65535.0)
_ANGLES = np.arange(-45, 50, 5)  # degrees of slant that are told apart
_SPREAD = 5 / 64  # of the rows that hold letters, share of the height: about what the lines of copiste_fr have
_SPREAD_TRUST = 0.6  # share of the difference to it, in logarithms, that is taken away: capitals spread too
_SCALES = (0.75, 1.5)
_MIDDLE = 0.53  # where the middle of the letters is put, share of the height
_MAX_CUT_OFF = 0.1  # share of a line's ink that may get lost by that
_MAX_LETTERS_CUT_OFF = 0.08  # rows with the strokes of letters that may, share of the height
_STROKES_OF_LETTERS = 5.0  # along a row; ascenders and descenders have fewer
_SHARE_OF_STRIP = 0.15  # of its strongest row: with less, what reaches in at an edge has ended
_FAINT_STROKE = 1.0  # along a row: it begins and ends
_SAUVOLA_WEIGHT = 0.2  # of the local contrast in the threshold
_SAUVOLA_RANGE = 0.5  # largest standard deviation of brightness from 0 to 1
# read_image has a limit of its own, with an error instead of a warning.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


@config("features")
class ImageConfig:
    """How a line image becomes the network's input."""

    height_pixels: int = setting(default=64, minimum=16, maximum=256)
    max_width_pixels: int = setting(default=4096, minimum=64, maximum=16384)  # wider lines are squeezed to it
    even_paper: bool = setting(default=True)  # divide the paper's shading out
    find_polarity: bool = setting(default=True)  # turn light ink on dark paper round
    stretch_contrast: bool = setting(default=True)  # darkest ink of every line at full scale
    even_size: bool = setting(default=True)  # letters of every line equally high, in the middle
    deslant: bool = setting(default=True)  # shear leaning strokes upright
    binarise: bool = setting(default=False)  # ink or paper, nothing between
    shard_lines: int = setting(default=512, minimum=1, maximum=65536)
    num_workers: int | None = setting(default=None, minimum=1)  # null: all cores
    dask_address: str | None = setting(default=None)  # of a Dask scheduler; null: processes of this machine


@dataclass(frozen=True)
class NormalisedLine:
    """A line ready for the network, with figures of its quality.

    Attributes:
        pixels: (width, height) uint8, one frame column after the other, ink high.
        ink_share: share of pixels above half scale.
        contrast: difference of the 99th and the 1st percentile before stretching, 0 to 1.
        slant_degrees: leaning of the strokes; positive leans to the right.
    """

    pixels: np.ndarray
    ink_share: float
    contrast: float
    slant_degrees: float


def read_image(source: Path | bytes) -> np.ndarray:
    """(height, width) uint8 grey image of a PNG, JPEG or TIFF file; transparency is laid on white.

    Args:
        source: a file's path or its bytes.

    Raises:
        UserError: missing, unreadable, cut short, of another format, larger than MAX_IMAGE_PIXELS or MAX_IMAGE_SIDE, or
            of values that leave open what is white.
    """
    name = str(source) if isinstance(source, Path) else f"{len(source)} bytes of image data"
    try:
        with (
            # Not by its path: Pillow 13 maps such a file into memory and scrambles a TIFF that lies on its side.
            source.open("rb") if isinstance(source, Path) else io.BytesIO(source) as stream,
            Image.open(stream, formats=IMAGE_FORMATS) as image,
        ):
            width, height = image.size
            if width * height > MAX_IMAGE_PIXELS or max(width, height) > MAX_IMAGE_SIDE:
                raise UserError(
                    f"{name}: {width} x {height} pixels; at most {MAX_IMAGE_PIXELS} are read, and {MAX_IMAGE_SIDE} a "
                    "side. Cut the page into lines."
                )
            _check_single(image, name)
            image.load()  # which turns a TIFF
            turn = _TURNS.get(_orientation(image))
            return _to_grey(image if turn is None else image.transpose(turn), name)
    except FileNotFoundError:
        raise UserError(f"{name}: there is no such file.") from None
    except Image.DecompressionBombError:
        raise UserError(
            f"{name}: more than {MAX_IMAGE_PIXELS} pixels, which is the most that is read. Cut the page into lines."
        ) from None
    except UnidentifiedImageError:
        raise UserError(f"{name}: not an image in one of the formats {', '.join(IMAGE_FORMATS)}.") from None
    except UserError:
        raise
    except Exception as exc:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error and others
        raise UserError(f"{name}: the image cannot be decoded ({exc}). Export it again as PNG.") from exc


def image_size(file: Path) -> tuple[int, int]:
    """Width and height in pixels of an image as read_image gives it; only the file's beginning is read.

    Raises:
        UserError: it cannot be opened.
    """
    try:
        with Image.open(file, formats=IMAGE_FORMATS) as image:
            width, height = image.size  # of a TIFF as turned
            on_the_side = image.format != "TIFF" and _orientation(image) in _ON_THE_SIDE
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError) as exc:
        raise UserError(f"{file}: the image cannot be opened ({exc}).") from exc
    return (height, width) if on_the_side else (width, height)


def _orientation(image: Image.Image) -> int:
    """EXIF's, 1 to 8; 1, upright, also where EXIF is damaged, which makes the image no worse."""
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # struct.error, SyntaxError and others
        return 1
    return value if isinstance(value, int) else 1


def _check_single(image: Image.Image, name: str) -> None:
    """A TIFF of several pages is none of them; a small picture of the page that a scanner has added is no page."""
    if image.format != "TIFF":
        return
    width, height = image.size
    # One after the other, to the second page: a small file may claim thousands, and each is looked for from the first.
    with contextlib.suppress(EOFError):
        for frame in range(1, _MAX_FRAMES):
            image.seek(frame)
            if image.size[0] * image.size[1] > width * height / 2:
                raise UserError(
                    f"{name}: a TIFF of several pages; which one is meant cannot be known. Save each as a file."
                )
    image.seek(0)


def _to_grey(image: Image.Image, name: str) -> np.ndarray:
    """(height, width) uint8; a few rows at a time, so that only the image itself is in memory twice."""
    white = _white(image, name)
    rows = max(_PIXELS_AT_A_TIME // max(image.width, 1), 1)
    grey = np.empty((image.height, image.width), np.uint8)
    for top in range(0, image.height, rows):
        band = image.crop((0, top, image.width, min(top + rows, image.height)))
        if white:
            values = np.asarray(band, np.float64)
            if np.isnan(values).any():
                raise UserError(f"{name}: some pixels have no value (NaN). Save it with 8 bits a pixel.")
            grey[top : top + rows] = np.clip(values * (255.0 / white), 0, 255)
            continue
        if band.has_transparency_data:
            band = band.convert("RGBA")
            band = Image.alpha_composite(Image.new("RGBA", band.size, "white"), band)
        grey[top : top + rows] = np.asarray(band.convert("L"))
    return grey


def _white(image: Image.Image, name: str) -> float | None:
    """What white is in an image of more than 8 bits a pixel; None for one of 8 bits.

    16 bits may hold the 10, 12 or 14 of a camera: white is the least of their largest values that no pixel exceeds. 32
    bits and floating point have no white of their own: it is 1, 255 or 65535, the least that holds the values but for a
    little that resampling or sharpening adds.
    """
    if not image.mode.startswith("I;16") and image.mode not in ("I", "F"):
        return None
    lowest, highest = cast(tuple[float, float], image.getextrema())  # one band
    if image.mode.startswith("I;16"):
        return next(white for white in _WHITES_OF_16_BITS if highest <= white)
    for white in (1.0, 255.0, 65535.0):
        if -0.25 * white <= lowest and highest <= 1.25 * white:
            return white
    raise UserError(
        f"{name}: values from {lowest:g} to {highest:g}, which leave open what is black and what is white. "
        "Save it with 8 bits a pixel."
    )


def perceptual_hash(grey: np.ndarray) -> int:
    """128 bits that stay nearly the same when an image is scaled, compressed again or made lighter.

    The image is shrunk to 4 rows of 33 cells; a bit says whether a cell is clearly lighter than the one before it. Wide
    cells would make all lines alike; without "clearly" the grain of empty paper would decide.

    Args:
        grey: (height, width) uint8 image.

    Returns:
        0 to 2**128 - 1; 0 for an image without contrast.

    Source: the difference hash of the library imagehash (dhash), with cells for lines instead of pictures.
    """
    cells = cv2.resize(grey, (33, 4), interpolation=cv2.INTER_AREA).astype(np.float32)
    step = 0.02 * (float(cells.max()) - float(cells.min()))
    bits = cells[:, 1:] - cells[:, :-1] > max(step, 0.5)
    return int.from_bytes(np.packbits(bits).tobytes())


def find_near_duplicates(hashes: np.ndarray, max_distance: int) -> np.ndarray:
    """For each perceptual hash, the position of the first earlier one found that differs in few bits.

    The bits are cut into one block more than may differ, so that two such hashes agree in a block. Hashes are sorted
    once for each block, rotated so that it comes first, and compared with their next neighbours. Time grows as the
    sorting does, not as the number of pairs. A pair can be missed only among many hashes that agree in its block, of
    14 bits where 8 may differ and of 4 where 32 may.

    Args:
        hashes: (n, 2) uint64, upper and lower half.
        max_distance: bits that may differ, at most 127.

    Returns:
        (n,) int64, -1 where there is none. Hashes of 0 (no contrast) resemble nothing.

    Source: Manku, Jain and Das Sarma, Detecting near-duplicates for web crawling, WWW 2007, section 3.
    """
    num_neighbours = 16
    nearest = np.full(len(hashes), -1, np.int64)
    positions = np.flatnonzero(hashes.any(axis=1))
    halves = hashes[positions, 0], hashes[positions, 1]
    num_blocks = max_distance + 1
    for block in range(num_blocks):
        half, bits = divmod(128 * block // num_blocks, 64)
        upper, lower = halves[half], halves[1 - half]
        key = (upper << np.uint64(bits)) | (lower >> np.uint64(64 - bits)) if bits else upper
        order = np.argsort(key, kind="stable")
        places, high_bits, low_bits = positions[order], upper[order], lower[order]
        for step in range(1, min(num_neighbours, len(order) - 1) + 1):
            distance = np.bitwise_count(high_bits[:-step] ^ high_bits[step:])
            distance += np.bitwise_count(low_bits[:-step] ^ low_bits[step:])
            close = np.flatnonzero(distance <= max_distance)
            one, other = places[close], places[close + step]
            # As uint64, -1 is the largest number.
            np.minimum.at(nearest.view(np.uint64), np.maximum(one, other), np.minimum(one, other).view(np.uint64))
    return nearest


def scaled_width(width_pixels: int, height_pixels: int, config: ImageConfig) -> int:
    """Width of a line after scaling to the configured height with its aspect kept."""
    width = round(width_pixels * config.height_pixels / height_pixels)
    return min(max(width, 1), config.max_width_pixels)


def largest_width(width_pixels: int, height_pixels: int, config: ImageConfig) -> int:
    """The width of a line that a look at its pixels cannot exceed, but for deslanting: that of one of small letters."""
    enlarged = round(width_pixels * _SCALES[1]) if config.even_size else width_pixels
    return scaled_width(enlarged, height_pixels, config)


def num_frames(width_pixels: Any) -> Any:
    """Frames that the network makes of lines of these (scaled) widths: a whole number or an integer array."""
    return -(-width_pixels // DOWNSAMPLING)


def pixel_settings(config: ImageConfig) -> dict[str, Any]:
    """The settings that the pixels of a line depend on, by name."""
    settings = asdict(config)
    for name in ("shard_lines", "num_workers", "dask_address"):  # how lines are stored and by whom they are made
        del settings[name]
    return settings


def recorded_settings(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """The pixel_settings of a record, which may hold more; of one that is older than a setting, what was done then."""
    known = {name: recorded[name] for name in pixel_settings(ImageConfig()) if name in recorded}
    return {"even_size": False} | known if known else {}


def differing_settings(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> list[str]:
    """Words for each of recorded_settings that both have and that differs; other entries are not looked at."""
    theirs, ours = recorded_settings(theirs), recorded_settings(ours)
    names = theirs.keys() & ours.keys()
    return [f"{name} = {theirs[name]}, here {ours[name]}" for name in sorted(names) if theirs[name] != ours[name]]


def signature(config: ImageConfig) -> str:
    """What the pixels of a line depend on beside its image, as JSON: settings, and the libraries that compute them."""
    settings = pixel_settings(config)
    versions = {"normalisation": _NORMALISATION_VERSION, "opencv": cv2.__version__, "pillow": PIL.__version__}
    return json.dumps(settings | versions, sort_keys=True)


def normalise_line(grey: np.ndarray, config: ImageConfig) -> NormalisedLine:
    """Evens the paper out, makes ink high and scales to the configured height, aspect kept.

    The width is `scaled_width`, but that letters of an even size take 0.75 to 1.5 times as much, and that deslanting
    adds what the strokes need.

    Args:
        grey: (height, width) uint8 image of one line.
        config: which steps to take.

    Raises:
        UserError: the image is empty.
    """
    if grey.ndim != 2 or 0 in grey.shape:
        raise UserError(f"a line image needs two sides of at least one pixel, got shape {grey.shape}.")
    width, height = scaled_width(grey.shape[1], grey.shape[0], config), config.height_pixels
    scaled = _resize(grey, width, height)
    is_light_on_dark = config.find_polarity and _is_light_on_dark(scaled)
    ink, contrast = _ink(scaled, is_light_on_dark, config)
    if config.even_size:
        scale, middle = _size_of_letters(ink)
        rows = max(round(height * scale), 1)
        width = min(max(round(grey.shape[1] * rows / grey.shape[0]), 1), config.max_width_pixels)
        # From the image once more, which may be sharper.
        ink, _ = _ink(_resize(grey, width, rows), is_light_on_dark, config)
        ink = _placed(ink, round(_MIDDLE * height - rows / height * middle), height)
    slant = slant_degrees(ink)
    if config.deslant and slant:
        # Room for the strokes of both ends, which lean over the edge of the image.
        reach = math.ceil(height / 2.0 * abs(math.tan(math.radians(slant))))
        ink = _shear(cv2.copyMakeBorder(ink, 0, 0, reach, reach, cv2.BORDER_CONSTANT), -slant)
        if ink.shape[1] > config.max_width_pixels:
            ink = cv2.resize(ink, (config.max_width_pixels, height), interpolation=cv2.INTER_AREA)
    if config.binarise:
        ink = _binarise(ink)
    pixels = np.ascontiguousarray(np.rint(ink * 255.0).astype(np.uint8).T)
    return NormalisedLine(pixels, float(np.mean(pixels > 127)), contrast, slant)


def _resize(grey: np.ndarray, width: int, height: int) -> np.ndarray:
    smaller = height < grey.shape[0]
    return cv2.resize(grey, (width, height), interpolation=cv2.INTER_AREA if smaller else cv2.INTER_LINEAR)


def _ink(grey: np.ndarray, is_light_on_dark: bool, config: ImageConfig) -> tuple[np.ndarray, float]:
    """(height, width) float32, ink high and paper at zero, and the contrast before stretching."""
    if is_light_on_dark:
        grey = 255 - grey
    paper = np.maximum(_paper(grey), 1.0) if config.even_paper else np.float32(255.0)
    ink: np.ndarray = np.maximum(1.0 - grey / paper, 0.0)
    low, high = (value / 255.0 for value in _percentiles(np.rint(ink * 255.0).astype(np.uint8), 1, 99))
    if config.stretch_contrast:
        # At most fourfold: an empty line must not become a page of amplified grain.
        ink = np.clip((ink - low) / max(high - low, 0.25), 0.0, 1.0)
    return ink, high - low


def _size_of_letters(ink: np.ndarray) -> tuple[float, float]:
    """The scale that brings the letters to their usual height, and the row of their middle.

    Rows count by the square of how often ink begins and ends along them: many times where small letters are, seldom
    among ascenders, and hardly along a ruled line. Where much of the line would then be cut off, as with a large
    initial, it stays as it is.

    Source: the idea of Kozielski, Forster and Ney, Moment-based image normalization for handwritten text recognition
        (ICFHR 2012), with strokes in place of ink.
    """
    height = len(ink)
    clear = np.where(ink > 0.2, ink, 0.0)
    strokes = _without_neighbours(np.abs(np.diff(clear, axis=1)).sum(axis=1, dtype=np.float64))
    weights = np.square(strokes)
    total = weights.sum()
    as_it_is = 1.0, _MIDDLE * height
    if total == 0:
        return as_it_is
    rows = np.arange(height) + 0.5
    middle = float(weights @ rows) / total
    spread = math.sqrt(float(weights @ np.square(rows - middle)) / total)
    scale = (_SPREAD * height / max(spread, 1.0)) ** _SPREAD_TRUST
    scale = min(max(scale, _SCALES[0]), _SCALES[1])
    top = middle - _MIDDLE * height / scale
    is_cut_off = (rows < top) | (rows > top + height / scale)
    own_ink = np.where(strokes > 0, clear.sum(axis=1, dtype=np.float64), 0.0)
    loses_ink = own_ink[is_cut_off].sum() > _MAX_CUT_OFF * own_ink.sum()
    loses_letters = np.count_nonzero(strokes[is_cut_off] >= _STROKES_OF_LETTERS) > _MAX_LETTERS_CUT_OFF * height
    return as_it_is if loses_ink or loses_letters else (scale, middle)


def _without_neighbours(strokes: np.ndarray) -> np.ndarray:
    """Strokes along each row of a line, without those at an edge that reach in from the line above or below.

    Such a strip goes to the edge, ends within a third of the height, and holds fewer rows than what lies behind it.
    """
    own = strokes.copy()
    for rows in (own, own[::-1]):
        third = rows[: len(rows) // 3]
        least = _SHARE_OF_STRIP * third.max(initial=0.0)
        end = int(np.argmax(third < least))  # 0: the strip is higher, or there is none
        if end and np.count_nonzero(rows[end:] >= _FAINT_STROKE) > end:
            rows[:end] = 0.0
    return own


def _placed(ink: np.ndarray, top: int, height: int) -> np.ndarray:
    """(height, width): the rows of ink with its first one at `top`, cut off or filled up with paper."""
    placed = np.zeros((height, ink.shape[1]), ink.dtype)
    first, last = max(top, 0), min(top + len(ink), height)
    placed[first:last] = ink[first - top : last - top]
    return placed


def _is_light_on_dark(grey: np.ndarray) -> bool:
    """Whether this is a negative, by two signs that err on different lines: most are none, so both must say so."""
    # That paper is more than ink fails where a mask, a shadow or a glare is most of the line.
    low, middle, high = _percentiles(grey, 1, 50, 99)
    if middle - low + 8 >= high - middle:  # of blank paper, grain alone decides which of the two is larger
        return False
    # That strokes are narrower than what is around them fails where bold letters are cropped tightly. At this size the
    # window of the median, a quarter of the height, is wider than most strokes and narrower than shadows.
    height, width = grey.shape
    small = cv2.resize(grey, (max(round(21 * width / height), 1), 21), interpolation=cv2.INTER_AREA)
    around = cv2.medianBlur(small, 5)
    return float(cv2.subtract(small, around).sum()) > float(cv2.subtract(around, small).sum())


def _percentiles(values: np.ndarray, *shares: int) -> list[int]:
    """Percentiles of uint8 values, from their histogram: several times as fast as sorting."""
    counts = np.cumsum(cv2.calcHist([values], [0], None, [256], [0, 256]).ravel(), dtype=np.float64)
    return [int(np.searchsorted(counts, share / 100.0 * counts[-1])) for share in shares]


def _paper(grey: np.ndarray) -> np.ndarray:
    """(height, width) float32 brightness of the paper under the ink: a smoothed local maximum at a quarter scale."""
    height, width = grey.shape
    small = cv2.resize(grey, (max(width // 4, 1), max(height // 4, 1)), interpolation=cv2.INTER_AREA)
    reach = max(height // 4 // 2, 3) | 1
    small = cv2.dilate(cv2.medianBlur(small, 3), np.ones((reach, reach), np.uint8))
    for _ in range(2):  # nearly a Gaussian, in a time that does not grow with its width
        small = cv2.blur(small, (2 * reach + 1, 2 * reach + 1))
    return cv2.resize(small, (width, height), interpolation=cv2.INTER_LINEAR).astype(np.float32)


def _binarise(ink: np.ndarray) -> np.ndarray:
    """(height, width) float32, 1 where a pixel is darker than its surroundings by Sauvola's threshold, else 0.

    Source: Sauvola and Pietikäinen, Adaptive document image binarization, Pattern Recognition 33 (2000), equation 5.
    """
    brightness = 1.0 - ink
    side = ink.shape[0] // 2 | 1
    mean = cv2.boxFilter(brightness, cv2.CV_32F, (side, side))
    variance = cv2.sqrBoxFilter(brightness, cv2.CV_32F, (side, side)) - mean**2
    deviation = np.sqrt(np.maximum(variance, 0.0))
    threshold = mean * (1.0 + _SAUVOLA_WEIGHT * (deviation / _SAUVOLA_RANGE - 1.0))
    return (brightness < threshold).astype(np.float32)


def slant_degrees(ink: np.ndarray) -> float:
    """Leaning of the strokes: the shear after which the columns differ most, in steps of 5 degrees.

    Args:
        ink: (height, width) float32, ink high.

    Source: the projection-profile criterion of Vinciarelli and Luettin, A new normalization technique for cursive
        handwritten words, Pattern Recognition Letters 22 (2001).
    """
    small = cv2.resize(ink, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA) if min(ink.shape) > 1 else ink
    height, width = small.shape
    reach = height // 2 + 1
    flat = cv2.copyMakeBorder(small, 0, 0, reach, reach, cv2.BORDER_CONSTANT).ravel()
    rows = np.arange(height)
    # Whole pixels: what interpolation between them would blur, and most at middling angles, stays sharp.
    shifts = np.rint(np.tan(np.radians(_ANGLES))[:, None] * ((height - 1) / 2.0 - rows)).astype(int)  # (angles, height)
    starts = rows * (width + 2 * reach) + reach + shifts
    profiles = np.lib.stride_tricks.sliding_window_view(flat, width)[starts].sum(axis=1)  # (angles, width)
    sharpness = np.square(profiles).sum(axis=1)
    best = int(np.argmax(sharpness))
    # An image without strokes is as sharp at any angle.
    return float(_ANGLES[best]) if sharpness[best] > sharpness[len(_ANGLES) // 2] else 0.0


def _shear(ink: np.ndarray, degrees: float) -> np.ndarray:
    height, width = ink.shape
    slope = math.tan(math.radians(degrees))
    matrix = np.array([[1.0, -slope, slope * height / 2.0], [0.0, 1.0, 0.0]])
    return cv2.warpAffine(ink, matrix, (width, height))
