import dataclasses
import io
import struct

import cv2
import numpy as np
import pytest
from PIL import Image

from htr_pipeline.core import image as image_module
from htr_pipeline.core.config import UserError
from htr_pipeline.core.image import (
    ImageConfig,
    differing_settings,
    find_near_duplicates,
    image_size,
    largest_width,
    normalise_line,
    num_frames,
    perceptual_hash,
    pixel_settings,
    read_image,
    scaled_width,
    signature,
    slant_degrees,
)


def strokes(width=300, height=64, lean=0.0):
    """White paper with black strokes that lean to the right by `lean` pixels over their height."""
    grey = np.full((height, width), 255, np.uint8)
    for x in range(40, width - 40, 20):
        cv2.line(grey, (x, height - 12), (round(x + lean * (height - 24) / height), 12), 0, 3)
    return grey


def file_bytes(image, form="PNG", **options):
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


@pytest.mark.parametrize("form", ["PNG", "JPEG", "TIFF"])
def test_grey_images_of_every_format_are_read_as_they_are(form):
    grey = np.full((10, 30), 200, np.uint8)
    assert np.abs(read_image(file_bytes(Image.fromarray(grey), form)).astype(int) - grey).max() <= 2


def test_sixteen_bits_palettes_and_transparency_become_eight_bit_grey():
    sixteen = Image.fromarray(np.full((4, 5), 65535 // 2, np.uint16))
    assert np.all(read_image(file_bytes(sixteen)) == 127)
    assert np.all(read_image(file_bytes(Image.new("P", (5, 4), 0))) == 0)
    clear = Image.new("RGBA", (5, 4), (0, 0, 0, 0))
    assert np.all(read_image(file_bytes(clear)) == 255), "transparent is paper"


@pytest.mark.parametrize("white", [1023, 4095, 16383, 65535])
def test_white_of_images_of_16_bits_is_that_of_the_bits_that_they_use(white):
    values = np.full((6, 30), white, np.uint16)
    values[:, 10:14] = white // 3
    for form in ("PNG", "TIFF"):
        grey = read_image(file_bytes(Image.fromarray(values), form))
        assert (grey.max(), grey.min()) == (255, 85)


@pytest.mark.parametrize(("mode", "white"), [("F", 1.0), ("F", 255.0), ("I", 255.0), ("I", 65535.0)])
def test_white_of_images_of_32_bits_is_the_least_that_holds_them(mode, white):
    values = np.full((6, 30), white, np.float32)
    values[:, 10:14] = 0
    values[0, 0] = 1.1 * white  # sharpened
    values[0, 20] = -0.1 * white
    stream = io.BytesIO()
    Image.fromarray(values if mode == "F" else values.astype(np.int32)).save(stream, "TIFF")
    grey = read_image(stream.getvalue())
    assert grey[0, 0] == grey[3, 3] == 255
    assert grey[0, 20] == grey[3, 12] == 0


@pytest.mark.parametrize("value", [np.nan, np.inf, -(2.0**31), 2.0**31])
def test_values_that_leave_white_open_are_refused(value):
    values = np.full((6, 30), 0.5, np.float32)
    values[2, 2] = value
    stream = io.BytesIO()
    Image.fromarray(values).save(stream, "TIFF")
    with pytest.raises(UserError, match=r"(leave open what is black and what is white|\(NaN\))\. Save it with"):
        read_image(stream.getvalue())


def test_an_image_is_brought_to_grey_in_bands_without_a_seam(monkeypatch):
    noise = np.random.default_rng(0).integers(0, 256, (50, 40, 4), dtype=np.uint8)
    for values in (noise, noise[..., :3], noise[..., 0], noise[..., 0] * np.uint16(257)):
        image = Image.fromarray(values)
        monkeypatch.setattr(image_module, "_PIXELS_AT_A_TIME", 10**6)
        whole = read_image(file_bytes(image))
        monkeypatch.setattr(image_module, "_PIXELS_AT_A_TIME", 300)
        np.testing.assert_array_equal(read_image(file_bytes(image)), whole)


UPRIGHT = np.kron(np.array([[0, 80, 160], [255, 40, 120]], np.uint8), np.ones((32, 48), np.uint8))
STORED = {  # by EXIF orientation (CIPA DC-008, 4.6.5.1.6)
    1: UPRIGHT,
    2: UPRIGHT[:, ::-1],
    3: UPRIGHT[::-1, ::-1],
    4: UPRIGHT[::-1],
    5: UPRIGHT.T,
    6: UPRIGHT.T[::-1],
    7: UPRIGHT.T[::-1, ::-1],
    8: UPRIGHT.T[:, ::-1],
}


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("form", ["PNG", "JPEG", "raw TIFF", "packed TIFF"])
def test_an_image_is_turned_as_its_exif_says(tmp_path, orientation, form):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"compression": "tiff_lzw"} if form == "packed TIFF" else {}
    data = file_bytes(
        Image.fromarray(np.ascontiguousarray(STORED[orientation])), form.split()[-1], exif=exif, **options
    )
    file = tmp_path / "image"
    file.write_bytes(data)
    for source in (file, data):
        assert read_image(source).shape == UPRIGHT.shape
        assert np.abs(read_image(source).astype(int) - UPRIGHT).max() <= (20 if form == "JPEG" else 0)
    assert image_size(file) == (144, 64)


SIDEWAYS = struct.pack(">HHIHH", 0x0112, 3, 1, 6, 0)  # a number, as it should be
UNIT_IN_LETTERS = struct.pack(">HHI4s", 0x0128, 2, 4, b"cm\0\0")


@pytest.mark.parametrize(
    ("entries", "width"), [([SIDEWAYS], 10), ([SIDEWAYS, UNIT_IN_LETTERS], 10), ([b"\1\x12\0\2\0\0\0\0026\0\0\0"], 40)]
)
def test_a_damaged_exif_makes_no_image_unreadable(tmp_path, entries, width):
    directory = struct.pack(">H", len(entries)) + b"".join(entries) + bytes(4)
    data = file_bytes(Image.new("L", (40, 10)), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08" + directory)
    (tmp_path / "image.jpg").write_bytes(data)
    assert read_image(data).shape[1] == width
    assert image_size(tmp_path / "image.jpg")[0] == width


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not an image"),
        (b"hello", "not an image in one of the formats PNG, JPEG, TIFF"),
        (file_bytes(Image.effect_noise((60, 60), 50))[:500], "cannot be decoded"),
        (file_bytes(Image.new("L", (8, 8)), "GIF"), "not an image in one of the formats"),
    ],
)
def test_broken_images_are_refused_with_a_reason(data, message):
    with pytest.raises(UserError, match=message):
        read_image(data)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nothing\.png: there is no such file"):
        read_image(tmp_path / "nothing.png")


def test_a_decompression_bomb_is_refused_before_it_is_decoded(monkeypatch):
    monkeypatch.setattr(image_module, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(UserError, match="200 x 100 pixels; at most 1000 are read"):
        read_image(file_bytes(Image.new("L", (200, 100))))


@pytest.mark.parametrize("size", [(65501, 1), (1, 70000)])
def test_an_image_of_endless_rows_or_columns_is_refused_by_its_header(size):
    with pytest.raises(UserError, match=f"{size[0]} x {size[1]} pixels; .* and 65500 a side"):
        read_image(file_bytes(Image.new("L", size)))


def test_normalised_lines_are_columns_of_ink_on_zero():
    line = normalise_line(strokes(), ImageConfig(height_pixels=48, even_size=False))
    assert line.pixels.shape == (225, 48)
    assert line.pixels.dtype == np.uint8
    assert line.pixels.max() == 255
    assert np.median(line.pixels) == 0
    assert 0.05 < line.ink_share < 0.3


def test_aspect_is_kept_and_width_bounded():
    config = ImageConfig(height_pixels=32, max_width_pixels=200)
    assert scaled_width(300, 64, config) == 150
    assert scaled_width(3000, 64, config) == 200
    assert scaled_width(1, 640, config) == 1
    assert largest_width(200, 64, config) == 150
    assert largest_width(300, 64, config) == 200, "no line is wider than max_width_pixels"
    assert largest_width(200, 64, dataclasses.replace(config, even_size=False)) == 100
    assert normalise_line(strokes(3000), config).pixels.shape == (200, 32)


def test_light_ink_on_dark_paper_gives_the_same_line():
    usual, turned = (normalise_line(grey, ImageConfig()).pixels.astype(int) for grey in (strokes(), 255 - strokes()))
    assert np.abs(usual - turned).max() <= 2


def shadow(grey):
    return np.where(np.arange(grey.shape[1]) < 170, grey * 0.35, grey)


def glare(grey):
    row, column = np.indices(grey.shape)
    return grey * 0.6 + 102 * np.exp(-((row - 10) ** 2 + (column - 250) ** 2) / 200)


def mask(grey, colour):
    """As of a polygon that cuts the corners off."""
    row, column = np.indices(grey.shape)
    return np.where(np.abs(column - 150) / 150 + np.abs(row - 32) / 90 < 1, grey * 0.6, colour)


def stripe(grey):
    return np.where(np.arange(grey.shape[1]) < 285, grey * 0.55, 255)


@pytest.mark.parametrize("height", [16, 64, 128])
@pytest.mark.parametrize("light", [shadow, glare, lambda grey: mask(grey, 255), lambda grey: mask(grey, 0), stripe])
def test_a_line_is_not_a_negative_for_what_lies_on_it_or_beside_it(light, height):
    photo = light(strokes().astype(float)).astype(np.uint8)
    as_it_is = normalise_line(photo, ImageConfig(height_pixels=height, find_polarity=False)).pixels
    np.testing.assert_array_equal(normalise_line(photo, ImageConfig(height_pixels=height)).pixels, as_it_is)


@pytest.mark.parametrize("letter", ["O", "X"])
def test_bold_letters_cropped_tightly_are_no_negatives(letter):
    grey = np.full((64, 64), 255, np.uint8)
    if letter == "O":
        cv2.ellipse(grey, (32, 32), (27, 27), 0, 0, 360, 0, 9)
    else:
        cv2.line(grey, (4, 0), (59, 63), 0, 11)
        cv2.line(grey, (59, 0), (4, 63), 0, 11)
    as_it_is = normalise_line(grey, ImageConfig(find_polarity=False)).pixels
    np.testing.assert_array_equal(normalise_line(grey, ImageConfig()).pixels, as_it_is)


def test_shading_of_the_paper_is_divided_out():
    shaded = (strokes().astype(np.float32) * np.linspace(0.5, 1.0, 300)[None, :]).astype(np.uint8)
    even = normalise_line(shaded, ImageConfig()).pixels
    assert np.percentile(even, 60) < 25
    assert np.abs(even.astype(int) - normalise_line(strokes(), ImageConfig()).pixels).mean() < 10


def written(letters_pixels, baseline, *, height=64, ruled=False):
    """White paper with a word whose capitals are letters_pixels high and stand on the row baseline."""
    grey = np.full((height, 600), 255, np.uint8)
    scale = letters_pixels / cv2.getTextSize("H", cv2.FONT_HERSHEY_SIMPLEX, 1.0, 2)[0][1]
    cv2.putText(grey, "nous avons ecrit", (20, baseline), cv2.FONT_HERSHEY_SIMPLEX, scale, 0, 2, cv2.LINE_AA)
    if ruled:
        grey[baseline + 2 : baseline + 4] = 90
    return grey


def letters(pixels):
    """Height of the letters with neither ascender nor descender, and their middle, in rows."""
    strokes_per_row = np.abs(np.diff(pixels.T.astype(int), axis=1)).sum(axis=1)
    rows = np.flatnonzero(strokes_per_row > strokes_per_row.max() / 2)
    return rows[-1] - rows[0] + 1, rows.mean()


@pytest.mark.parametrize("ruled", [False, True])
def test_letters_of_every_size_and_place_become_equally_high_and_stand_in_the_middle(ruled):
    lines = [written(size, baseline, ruled=ruled) for size, baseline in ((18, 30), (18, 58), (34, 50))]
    as_they_are, even = (
        [letters(normalise_line(line, ImageConfig(even_size=on)).pixels) for line in lines] for on in (False, True)
    )
    ratio, even_ratio = (max(s for s, _ in found) / min(s for s, _ in found) for found in (as_they_are, even))
    assert ratio > 1.6
    assert even_ratio < 1.35
    assert np.ptp([middle for _, middle in as_they_are]) > 20
    assert all(abs(middle - 34) < 3 for _, middle in even)


def put(grey, text, baseline, scale=1.1, x=5):
    cv2.putText(grey, text, (x, baseline), cv2.FONT_HERSHEY_SCRIPT_SIMPLEX, scale, 40, 2)
    return grey


def ink_at_the_left(grey, **settings):
    pixels = normalise_line(grey, ImageConfig(deslant=False, **settings)).pixels
    return pixels[: len(pixels) // 2].sum() / len(pixels) ** 2


@pytest.mark.parametrize("text", ["nous avons bien recu", "a bientot", "fin."])
@pytest.mark.parametrize("visible", [8, 14, 20, 26])
@pytest.mark.parametrize("upside_down", [False, True])
def test_a_strip_of_another_line_does_not_push_the_line_out_of_the_image(text, visible, upside_down):
    paper = np.full((110, 1200), 235, np.uint8)
    grey = put(put(paper, text, 90), "votre honoree lettre du quinze courant et", visible, x=610)
    if upside_down:
        grey = np.ascontiguousarray(grey[::-1])
    assert ink_at_the_left(grey) > 0.7 * ink_at_the_left(grey, even_size=False)


def test_a_line_with_a_drawing_or_a_large_initial_stays_whole():
    hatched = put(np.full((140, 900), 235, np.uint8), "Figure", 130)
    for x in range(460, 880, 9):
        cv2.line(hatched, (x, 5), (x, 45), 40, 2)
    initial = put(np.full((160, 1600), 235, np.uint8), "eginning of the chapter with text", 40, x=810)
    cv2.putText(initial, "B", (5, 150), cv2.FONT_HERSHEY_SIMPLEX, 6, 40, 8)
    for grey in (hatched, initial):
        assert ink_at_the_left(grey) > 0.9 * ink_at_the_left(grey, even_size=False)


def test_small_letters_are_enlarged_from_the_image_itself():
    sharp = normalise_line(written(60, 120, height=256), ImageConfig()).pixels
    shrunk = cv2.resize(written(60, 120, height=256), (150, 64), interpolation=cv2.INTER_AREA)
    blurred = normalise_line(shrunk, ImageConfig()).pixels
    assert sharp.shape[0] == pytest.approx(blurred.shape[0], abs=4)
    assert sharp.shape[0] > 1.2 * 150
    sharpest, blurred_too = (np.sort(np.abs(np.diff(p.astype(int), axis=0)).ravel())[-500:] for p in (sharp, blurred))
    assert sharpest.mean() > 1.1 * blurred_too.mean()


def test_blank_paper_stays_blank():
    grain = np.random.default_rng(0).normal(230, 3, (64, 300)).astype(np.uint8)
    assert normalise_line(grain, ImageConfig()).pixels.mean() < 60


@pytest.mark.parametrize("lean", [-30.0, 0.0, 30.0])
def test_slant_is_measured_and_removed(lean):
    line = normalise_line(strokes(lean=lean), ImageConfig())
    degrees = np.degrees(np.arctan(lean / 64))
    assert abs(line.slant_degrees - degrees) <= 5
    upright = normalise_line(strokes(lean=lean), ImageConfig(deslant=True)).pixels.T.astype(np.float32)
    assert abs(slant_degrees(upright)) <= 5


def test_deslanting_keeps_the_strokes_that_lean_over_the_edge():
    grey = np.full((64, 80), 255, np.uint8)
    cv2.line(grey, (2, 60), (50, 4), 0, 3)
    cv2.line(grey, (30, 60), (77, 4), 0, 3)
    leaning, upright = (normalise_line(grey, ImageConfig(deslant=on)).pixels.astype(float) for on in (False, True))
    assert upright.shape[0] > leaning.shape[0]
    assert upright.sum() == pytest.approx(leaning.sum(), rel=0.02)
    narrow = ImageConfig(deslant=True, height_pixels=48, max_width_pixels=64)
    assert normalise_line(grey, narrow).pixels.shape == (64, 48)


def test_binarised_lines_are_ink_or_paper_where_the_grey_line_is_dark_or_light():
    shaded = (strokes().astype(np.float32) * np.linspace(0.4, 1.0, 300)[None, :]).astype(np.uint8)
    grey, binary = (normalise_line(shaded, ImageConfig(binarise=on)).pixels for on in (False, True))
    assert set(np.unique(binary)) == {0, 255}
    assert np.all(binary[grey > 200] == 255)
    assert np.all(binary[grey < 20] == 0)


@pytest.mark.parametrize("deviation", [1, 3, 8])
def test_blank_paper_is_not_turned_round(deviation):
    for seed in range(10):
        grain = np.random.default_rng(seed).normal(230, deviation, (64, 300)).clip(0, 255).astype(np.uint8)
        assert normalise_line(grain, ImageConfig()).contrast < 0.25


def test_binarised_blank_paper_has_no_ink():
    grain = np.random.default_rng(0).normal(230, 3, (64, 300)).astype(np.uint8)
    assert normalise_line(grain, ImageConfig(binarise=True)).ink_share < 0.02


@pytest.mark.parametrize(
    "step", ["even_paper", "find_polarity", "stretch_contrast", "even_size", "deslant", "binarise"]
)
def test_every_step_can_be_switched(step):
    faint = 255 - (255 - strokes(lean=30.0).astype(np.float32)) * 0.4
    photo = faint * np.linspace(0.5, 0.9, 300)[None, :]
    photo = 255 - photo.astype(np.uint8) if step == "find_polarity" else photo.astype(np.uint8)
    off, on = (normalise_line(photo, ImageConfig(**{step: on})).pixels for on in (False, True))
    assert off.shape != on.shape or np.abs(off.astype(int) - on).max() > 20


def test_signature_follows_what_changes_pixels_and_nothing_else():
    usual = signature(ImageConfig())
    for change in ({"num_workers": 3}, {"shard_lines": 7}, {"dask_address": "tcp://127.0.0.1:8786"}):
        assert signature(ImageConfig(**change)) == usual
    for change in ({"height_pixels": 32}, {"deslant": False}, {"binarise": True}, {"even_paper": False}):
        assert signature(ImageConfig(**change)) != usual


def test_lines_made_before_letters_had_one_size_differ_from_those_made_since():
    since = pixel_settings(ImageConfig())
    before = {name: value for name, value in since.items() if name != "even_size"} | {"opencv": "1.0"}
    assert differing_settings(before, since) == ["even_size = False, here True"]
    assert differing_settings(since, before) == ["even_size = True, here False"]
    assert differing_settings(before, before) == differing_settings(since, since) == []
    assert differing_settings({}, since) == [], "nothing is known of them"


@pytest.mark.parametrize("shape", [(1, 1), (1, 500), (500, 1), (2, 2), (3, 4000), (4000, 3)])
@pytest.mark.parametrize("fill", [0, 255, None])
def test_images_of_any_shape_and_content_become_lines(shape, fill):
    grey = np.random.default_rng(0).integers(0, 256, shape) if fill is None else np.full(shape, fill)
    line = normalise_line(grey.astype(np.uint8), ImageConfig(deslant=True, binarise=True))
    assert line.pixels.shape[1] == 64
    assert 1 <= line.pixels.shape[0] <= 4096
    assert 0 <= line.ink_share <= 1
    assert 0 <= line.contrast <= 1


def test_an_empty_image_is_refused():
    with pytest.raises(UserError, match=r"two sides of at least one pixel, got shape \(0, 5\)"):
        normalise_line(np.zeros((0, 5), np.uint8), ImageConfig())


def test_one_pixel_is_a_line():
    assert normalise_line(np.zeros((1, 1), np.uint8), ImageConfig()).pixels.shape == (64, 64)


def test_frames_are_rounded_up():
    assert [num_frames(width) for width in (0, 1, 4, 5)] == [0, 1, 1, 2]


def handwriting(seed):
    """(64, 600) uint8: blurred strokes at places of their own."""
    random = np.random.default_rng(seed)
    grey = np.full((64, 600), 230, np.uint8)
    for x in random.integers(10, 590, 60):
        top = random.integers(5, 35)
        cv2.line(grey, (int(x), int(top)), (int(x + random.integers(-8, 9)), int(top + 22)), 40, 3)
    return cv2.GaussianBlur(grey, (0, 0), 1.0)


def hash_distance(left, right):
    return (perceptual_hash(left) ^ perceptual_hash(right)).bit_count()


def test_perceptual_hash_survives_scaling_compression_and_light():
    grey = handwriting(1)
    smaller = cv2.resize(grey, None, fx=0.7, fy=0.7, interpolation=cv2.INTER_AREA)
    compressed = read_image(file_bytes(Image.fromarray(grey), "JPEG"))
    lighter = (grey * 0.8 + 40).astype(np.uint8)
    assert max(hash_distance(grey, other) for other in (smaller, compressed, lighter)) <= 8


def test_perceptual_hashes_of_different_lines_are_far_apart():
    lines = [handwriting(seed) for seed in range(8)]
    assert min(hash_distance(one, other) for one in lines for other in lines if one is not other) > 16


def test_perceptual_hash_of_an_empty_image_is_zero():
    assert perceptual_hash(np.full((40, 300), 200, np.uint8)) == perceptual_hash(np.zeros((1, 1), np.uint8)) == 0


def test_near_duplicates_are_found_and_name_the_earlier_line():
    random = np.random.default_rng(0)
    hashes = random.integers(0, 2**64, (2000, 2), dtype=np.uint64)
    expected = np.full(2000, -1)
    for earlier, later in random.permutation(2000)[:400].reshape(-1, 2):
        earlier, later = sorted((earlier, later))
        bits = random.choice(128, 7, replace=False)
        flip = [sum(1 << int(bit % 64) for bit in bits if bit // 64 == half) for half in (0, 1)]
        hashes[later] = hashes[earlier] ^ np.array(flip, np.uint64)
        expected[later] = earlier
    np.testing.assert_array_equal(find_near_duplicates(hashes, 7), expected)
    assert (find_near_duplicates(hashes, 6) == -1).all()


@pytest.mark.parametrize("most", [0, 1, 7, 8, 12, 16])
def test_near_duplicates_are_found_wherever_their_bits_differ(most):
    random = np.random.default_rng(0)
    hashes = random.integers(0, 2**64, (1000, 2), dtype=np.uint64)
    evenly = sum(1 << (127 - 128 * bit // most) for bit in range(most))  # one in each of as many blocks, its first
    flip = np.array([evenly >> 64, evenly % 2**64], np.uint64)
    hashes = np.concatenate([hashes, hashes ^ flip])
    np.testing.assert_array_equal(find_near_duplicates(hashes, most)[1000:], np.arange(1000))


def test_hashes_without_contrast_resemble_nothing():
    assert (find_near_duplicates(np.zeros((3, 2), np.uint64), 8) == -1).all()
    assert find_near_duplicates(np.zeros((0, 2), np.uint64), 8).shape == (0,)


@pytest.mark.parametrize(("mode", "factor"), [("F", 1.0), ("F", 1 / 255), ("I", 1), ("I", 257), ("F", 257.0)])
def test_white_of_32_bits_is_that_of_the_values(tmp_path, mode, factor):
    grey = np.tile(np.arange(0, 256, 5, dtype=np.uint8), (20, 1))
    values = (grey.astype(float) * factor).astype(np.float32 if mode == "F" else np.int32)
    Image.fromarray(values).save(tmp_path / "x.tif")
    np.testing.assert_allclose(read_image(tmp_path / "x.tif").astype(int), grey, atol=1)


def test_a_tiff_of_several_pages_is_refused_and_one_with_a_small_picture_of_the_page_read(tmp_path):
    page, other, small = (Image.new("L", size, 200) for size in ((60, 40), (50, 40), (15, 10)))
    page.save(tmp_path / "two.tif", save_all=True, append_images=[other])
    page.save(tmp_path / "small.tif", save_all=True, append_images=[small])
    with pytest.raises(UserError, match=r"two\.tif: a TIFF of several pages.*Save each as a file"):
        read_image(tmp_path / "two.tif")
    assert read_image(tmp_path / "small.tif").shape == (40, 60)
