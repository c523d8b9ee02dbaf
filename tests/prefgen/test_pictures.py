"""The one reader of pictures: whatever Pillow opens becomes what a viewer shows, or one sentence that names it."""

import io
import os
import struct
import subprocess
import sys
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, TiffImagePlugin
from PIL.PngImagePlugin import PngImageFile

from prefgen.files import guessed_text
from prefgen.history import PreferenceHistory
from prefgen.pictures import (
    LONG_SIDE,
    MAX_PIXELS,
    PUBLISHED,
    PictureError,
    clean_picture,
    picture_suffixes,
    read_picture,
)
from tests.prefgen.picture_files import broken_exif, chunk, encoded, photo, png, with_chunk

ROOT = Path(__file__).resolve().parents[2]
RNG = np.random.default_rng(0)
SCENE = np.asarray(
    Image.fromarray(RNG.integers(0, 256, (5, 7, 3), dtype=np.uint8)).resize((36, 24), Image.Resampling.BICUBIC)
)


# ---- every format and mode ------------------------------------------------------------------------------------------

MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "F", "I;16")
RESAMPLED = {"JPEG", "MPO", "WEBP", "AVIF", "GIF", "BLP", "DDS", "ICNS", "ICO", "JPEG2000"}  # not written as they were
WRITTEN_ONLY = {"EPS", "PDF", "PALM"}
Image.init()


def in_mode(mode) -> Image.Image:
    scene = Image.fromarray(SCENE)
    if mode in ("LA", "PA", "RGBA"):
        scene.putalpha(Image.fromarray(np.tile(np.linspace(0, 255, 36).astype(np.uint8), (24, 1))))
    if mode == "PA":
        return scene.convert("LA").convert("PA")
    if mode == "I;16":
        return Image.fromarray(np.asarray(scene.convert("L")).astype(np.uint16) * 257)
    return scene.convert(mode)


def on_white(image) -> np.ndarray:
    """The oracle: Pillow's own conversion, laid on white in float64."""
    if image.mode.startswith("I"):  # Pillow would cut at 255
        return np.repeat(np.asarray(image).astype(np.float64)[..., None] / 257, 3, -1)
    if image.mode == "F" and image.getextrema()[1] > 512:  # SPIDER has nothing else for 16 bits
        return np.repeat(np.asarray(image)[..., None] / 257, 3, -1)
    rgba = np.asarray(image.convert("RGBA")).astype(np.float64)
    alpha = rgba[..., 3:] / 255
    return rgba[..., :3] * alpha + 255 * (1 - alpha)


@pytest.mark.parametrize("form", sorted(set(Image.SAVE) - WRITTEN_ONLY))
def test_what_pillow_writes_is_read_as_it_looks(form):
    read = 0
    for mode in MODES if form != "ICNS" else ("RGB", "RGBA"):  # it writes twelve sizes
        try:
            data = encoded(in_mode(mode), form)
        except (OSError, ValueError, KeyError, TypeError, struct.error):  # Pillow doesn't write the mode there
            continue
        stored = Image.open(io.BytesIO(data))
        stored.load()
        expected = on_white(stored)
        pixels = read_picture(data)
        assert pixels.dtype == np.uint8 and pixels.shape == expected.shape, (form, mode)
        assert np.abs(pixels - expected).max() <= 1, (form, mode)  # the oracle doesn't round
        if form not in RESAMPLED and mode in ("L", "LA", "RGB", "RGBA", "I;16") and stored.mode == mode:
            assert np.abs(pixels - on_white(in_mode(mode))).max() <= 1, (form, mode)
        read += 1
    assert read or form in ("BUFR", "GRIB", "HDF5", "WMF")


@pytest.mark.parametrize("suffix", "png jpg jpeg jpe jfif webp gif bmp tif tiff avif tga ppm qoi jp2 ico".split())
def test_a_file_of_every_common_suffix_belongs_to_the_history(tmp_path, suffix):
    (tmp_path / "liked").mkdir()
    Image.fromarray(SCENE).save(tmp_path / "liked" / f"A.{suffix.upper()}")
    history = PreferenceHistory.from_folder(tmp_path)
    assert len(history) == 1 and not history.left_out


def test_of_an_animation_the_first_frame_is_read():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "green", "blue")]
    for form, options in (("GIF", {}), ("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {})):
        data = encoded(frames[0], form, save_all=True, append_images=frames[1:], **options)
        assert (read_picture(data) == (255, 0, 0)).all(), form


def test_lab_pictures_have_their_colours():
    from PIL import ImageCms

    lab = Image.new("LAB", (4, 4), (136, 208, 195))  # red of sRGB: L 53, a 80, b 67
    if ImageCms.core is None:
        pytest.skip("this Pillow has no littlecms")
    pixels = read_picture(encoded(lab, "TIFF")).reshape(-1, 3)
    assert pixels[0, 0] > 230 and pixels[0, 1:].max() < 60


# ---- transparency and deep grey -------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_a_grey_value_that_stands_for_nothing_is_white(bits):
    row = {1: b"\x80", 2: b"\x40", 4: b"\x10", 8: b"\x01\x00", 16: struct.pack(">HH", 1, 0)}[bits]
    data = png(2, bits, 0, row, chunk(b"tRNS", struct.pack(">H", 1)))
    assert read_picture(data)[0, :, 0].tolist() == [255, 0]


@pytest.mark.parametrize("bits", [8, 16])
def test_a_colour_that_stands_for_nothing_is_white(bits):
    key = (200, 0, 7) if bits == 8 else (200 * 256 + 3, 5, 7 * 256)
    row = struct.pack(">6B" if bits == 8 else ">6H", *key, *([0] * 3))
    data = png(2, bits, 2, row, chunk(b"tRNS", struct.pack(">3H", *key)))
    assert read_picture(data)[0].tolist() == [[255] * 3, [0] * 3]


@pytest.mark.parametrize("form", ["PNG", "TIFF", "PPM", "JPEG2000"])
def test_16_bit_grey_keeps_its_tones(form):
    values = np.linspace(0, 65535, 256 * 4).round().astype(np.uint16).reshape(4, 256)
    options = {"irreversible": False} if form == "JPEG2000" else {}
    pixels = read_picture(encoded(Image.fromarray(values), form, **options))
    assert np.abs(pixels[..., 0] - values / 257).max() <= 0.51


def test_big_endian_and_inverted_16_bit_tiffs_keep_their_tones():
    values = np.linspace(0, 65535, 64).round().astype(np.uint16).reshape(4, 16)
    swapped = Image.frombytes("I;16B", (16, 4), values.astype(">u2").tobytes())
    assert np.abs(read_picture(encoded(swapped, "TIFF"))[..., 0] - values / 257).max() <= 0.51
    inverted = encoded(Image.fromarray(values), "TIFF").replace(  # PhotometricInterpretation: white is zero
        struct.pack("<HHII", 262, 3, 1, 1), struct.pack("<HHII", 262, 3, 1, 0)
    )
    assert np.abs(read_picture(inverted)[..., 0] - (255 - values / 257)).max() <= 0.51


@pytest.mark.parametrize(("white", "kind"), [(1, "F"), (255, "F"), (65535, "F"), (255, "I"), (65535, "I")])
def test_32_bit_grey_is_read_by_the_range_it_fills(white, kind):
    ramp = np.linspace(0, white, 64).reshape(4, 16)
    image = Image.fromarray(ramp.astype(np.float32) if kind == "F" else ramp.round().astype(np.int32))
    assert image.mode == kind
    pixels = read_picture(encoded(image, "TIFF"))
    assert np.abs(pixels[..., 0] - np.linspace(0, 255, 64).reshape(4, 16)).max() <= 1


@pytest.mark.parametrize("high", [4.0, 1e6, float("nan"), float("inf")])
def test_floating_point_values_of_unknown_white_are_refused(high, one_sentence):
    with pytest.raises(PictureError) as raised:
        read_picture(encoded(Image.fromarray(np.full((4, 4), high, np.float32)), "TIFF"))
    assert "what is white" in one_sentence(raised)


def test_half_transparent_pictures_are_laid_on_white_and_shrunk_as_tensors_are():
    rgba = RNG.integers(0, 256, (700, 1400, 4), dtype=np.uint8)
    tensor = clean_picture(torch.from_numpy(rgba).float() / 255)
    file = read_picture(encoded(Image.fromarray(rgba), "PNG", compress_level=1))
    # Both lay on white in 8 bits; a value that lies half way between two may go either way.
    assert np.abs(file - (tensor * 255).numpy()).max() <= 1.01


# ---- EXIF and what else travels in a file ---------------------------------------------------------------------------


TURNED = {
    1: lambda p: p,
    2: lambda p: p[:, ::-1],
    3: lambda p: p[::-1, ::-1],
    4: lambda p: p[::-1],
    5: lambda p: p.swapaxes(0, 1),
    6: lambda p: np.rot90(p, -1),
    7: lambda p: p[::-1, ::-1].swapaxes(0, 1),
    8: lambda p: np.rot90(p, 1),
}


@pytest.mark.parametrize("orientation", [*TURNED, 0, 9])
@pytest.mark.parametrize("form", ["PNG", "WEBP", "JPEG", "TIFF"])
def test_a_picture_is_turned_though_the_rest_of_its_exif_is_broken(orientation, form):
    image, exif = Image.fromarray(SCENE), broken_exif(orientation)
    if form == "TIFF":
        tags = TiffImagePlugin.ImageFileDirectory_v2()
        tags.tagtype[271], tags[271], tags[274] = 5, TiffImagePlugin.IFDRational(1, 2), orientation
        data = encoded(image, form, tiffinfo=tags)
    elif form == "JPEG":
        data = encoded(image, form, exif=b"Exif\0\0" + exif, quality=100, subsampling=0)
    else:
        data = encoded(image, form, exif=exif, lossless=True)
    expected = TURNED.get(orientation, TURNED[1])(SCENE)
    pixels = read_picture(data)
    assert pixels.shape == expected.shape
    assert np.abs(pixels.astype(int) - expected).max() <= (12 if form == "JPEG" else 0)


@pytest.mark.parametrize("exif", [b"", b"II*\0", b"garbage", b"II*\0\x08\0\0\0\xff\xff" + b"\x12\x01" * 40])
@pytest.mark.parametrize("form", ["PNG", "WEBP", "JPEG"])
def test_exif_that_is_none_is_passed_over(form, exif):
    data = encoded(Image.fromarray(SCENE), form, exif=(b"Exif\0\0" if form == "JPEG" else b"") + exif, quality=95)
    assert read_picture(data).shape == SCENE.shape


LONG = b"a" * (2 << 20)
METADATA = {
    "a compressed text of 2 MB": (b"zTXt", b"parameters\0\0" + zlib.compress(LONG)),
    "a colour profile of 2 MB": (b"iCCP", b"icc\0\0" + zlib.compress(LONG)),
    "a compressed international text of 2 MB": (b"iTXt", b"workflow\0\1\0\0\0" + zlib.compress(LONG)),
    "texts of 70 MB": (b"tEXt", b"workflow\0" + b"b" * (70 << 20)),
    "a damaged text": (b"zTXt", b"parameters\0\0" + zlib.compress(LONG)[:50]),
    "a text without an end": (b"zTXt", b"parameters"),
    "XMP of 2 MB": (b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(LONG)),
    "a damaged profile": (b"iCCP", b"icc\0\7xx"),
}


@pytest.mark.parametrize("name", METADATA)
def test_a_sound_picture_is_read_whatever_its_metadata(name):
    data = with_chunk(encoded(Image.fromarray(SCENE), "PNG"), *METADATA[name])
    assert (read_picture(data) == SCENE).all()


def test_long_metadata_after_the_pixels_is_passed_over_and_pillows_limits_stay():
    from PIL import ImageFile, PngImagePlugin

    before = PngImagePlugin.MAX_TEXT_CHUNK, Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES
    data = encoded(Image.fromarray(SCENE), "PNG")
    data = data[:-12] + chunk(*METADATA["a compressed text of 2 MB"]) + data[-12:]
    assert (read_picture(data) == SCENE).all()
    assert before == (PngImagePlugin.MAX_TEXT_CHUNK, Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES)


def test_a_png_is_turned_by_xmp_and_by_imagemagicks_text():
    plain = encoded(Image.fromarray(SCENE), "PNG")
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><r tiff:Orientation="6"/></x:xmpmeta>'
    raw = b"Exif\0\0" + broken_exif(6)
    magick = b"\nexif\n%8d\n%s\n" % (len(raw), raw.hex().encode())
    for kind, content in (
        (b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp),
        (b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(xmp)),
        (b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(magick)),
    ):
        data = with_chunk(with_chunk(plain, kind, content), *METADATA["a colour profile of 2 MB"])
        assert (read_picture(data) == TURNED[6](SCENE)).all(), kind


# ---- one reader, one resampler --------------------------------------------------------------------------------------


def test_a_picture_that_a_history_keeps_whole_is_not_changed():
    scene = np.asarray(photo(LONG_SIDE, 700))
    assert (read_picture(encoded(Image.fromarray(scene), "PNG")) == scene).all()
    jpeg = encoded(Image.fromarray(scene), "JPEG")
    assert (read_picture(jpeg) == np.asarray(Image.open(io.BytesIO(jpeg)))).all()


@pytest.mark.parametrize(
    ("form", "size", "most", "mean"),
    [
        ("PNG", (1800, 1200), 0, 0),
        ("JPEG", (1100, 1800), 0, 0),
        ("JPEG", (4400, 2900), 4, 0.5),
        ("JPEG", (4301, 2903), 4, 0.5),
    ],
)
def test_a_large_file_becomes_what_load_image_and_the_graph_make_of_it(form, size, most, mean):
    """Bit-equal, but for JPEGs that are decoded at a part of their size: 4 of 255 at most, half a step on average."""
    data = encoded(photo(*size), form, **({"compress_level": 1} if form == "PNG" else {"quality": 92}))
    loaded = torch.from_numpy(np.array(Image.open(io.BytesIO(data)).convert("RGB")).astype(np.float32) / 255.0)
    connected = PreferenceHistory.from_images([loaded[None]]).items[0].image
    difference = np.abs(read_picture(data) - (connected * 255).numpy())
    assert max(read_picture(data).shape) == LONG_SIDE
    assert difference.max() <= most + 0.01 and difference.mean() <= mean + 0.01


def test_training_and_the_node_read_the_same_file_bit_for_bit(tmp_path):
    (tmp_path / "liked").mkdir()
    file = tmp_path / "liked" / "a.jpg"
    image = photo(2500, 1300)
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(file, quality=90, exif=exif)
    (item,) = PreferenceHistory.from_folder(tmp_path).items
    trained = read_picture(file.read_bytes(), formats=PUBLISHED)
    assert item.image.shape == (LONG_SIDE, 532, 3)
    assert torch.equal(item.image, torch.from_numpy(trained).float() / 255)


@pytest.mark.parametrize(("size", "expected"), [((8000, 50), (1024, 6)), ((1, 5000), (1, 1024)), ((1, 1), (1, 1))])
def test_thin_pictures_keep_a_pixel(size, expected):
    for form in ("PNG", "JPEG"):
        assert read_picture(encoded(Image.new("RGB", size), form)).shape == (expected[1], expected[0], 3)


# ---- bad files ------------------------------------------------------------------------------------------------------


def test_every_damage_is_a_picture_or_one_sentence(one_sentence):
    """Cut anywhere, and with bytes changed anywhere: nothing but a picture or the sentence ever comes back."""
    rng = np.random.default_rng(1)
    refused = 0
    sound = [
        encoded(Image.fromarray(SCENE), form)
        for form in ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "TGA", "QOI", "PPM", "ICO", "PCX", "JPEG2000", "SGI")
    ]
    sound += [encoded(Image.fromarray(SCENE).convert("P"), form) for form in ("PNG", "GIF", "TIFF", "BMP")]
    sound += [encoded(Image.fromarray(SCENE), "TIFF", compression=kind) for kind in ("tiff_lzw", "tiff_deflate")]
    sound += [
        encoded(in_mode("I;16"), "PNG"),
        encoded(Image.fromarray(SCENE), "JPEG", exif=b"Exif\0\0" + broken_exif(6)),
    ]
    for data in sound:
        for attempt in range(60):
            damaged = bytearray(data[: rng.integers(len(data))] if attempt % 3 == 0 else data)
            for place in rng.integers(0, max(1, len(damaged)), rng.integers(1, 12)):
                if damaged:
                    damaged[place] = rng.integers(256)
            try:
                pixels = read_picture(bytes(damaged), name="a.png in ada/liked")
                assert pixels.dtype == np.uint8 and pixels.ndim == 3 and max(pixels.shape) <= LONG_SIDE
            except PictureError as error:
                refused += 1
                assert "a.png in ada/liked" in str(error) and "\n" not in str(error) and len(str(error)) < 260
    assert refused > 100


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "it is empty"),
        (b"<!DOCTYPE html><html></html>", "it is a web page"),
        (b"\0\0\0\x18ftypheic\0\0\0\0", "HEIC"),
        (b"\xff\x0a" + bytes(40), "JPEG XL"),
        (b"<?xml version='1.0'?><svg/>", "SVG"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n", "isn't a picture"),
        (b"likes boats", "isn't a picture"),
    ],
)
def test_what_is_no_picture_is_called_what_it_is(tmp_path, content, words, one_sentence):
    file = tmp_path / "ada" / "liked" / "a.png"
    file.parent.mkdir(parents=True)
    file.write_bytes(content)
    with pytest.raises(PictureError) as raised:
        read_picture(file)
    assert words in one_sentence(raised) and "a.png in ada/liked" in str(raised.value)
    assert str(tmp_path) not in str(raised.value)


@pytest.mark.parametrize("suffix", ["heic", "svg", "jxl", "eps", "exr"])
def test_pictures_of_foreign_formats_are_named_and_left_out(tmp_path, suffix):
    (tmp_path / "liked").mkdir()
    Image.fromarray(SCENE).save(tmp_path / "liked" / "a.png")
    (tmp_path / "liked" / f"b.{suffix}").write_bytes(b"\0\1\2\3" * 50)
    history = PreferenceHistory.from_folder(tmp_path)
    assert len(history) == 1 and f"b.{suffix}" in history.left_out and "isn't read here" in history.left_out


def test_of_a_cameras_raw_file_the_thumbnail_is_not_taken_for_the_picture(tmp_path):
    file = tmp_path / "a.dng"
    Image.fromarray(SCENE).save(file, "TIFF")
    with pytest.raises(PictureError, match="raw file"):
        read_picture(file)


@pytest.mark.parametrize("limit", [None, Image.MAX_IMAGE_PIXELS])
def test_a_decompression_bomb_is_refused_whatever_the_process_allows(monkeypatch, limit, one_sentence):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0))
    data = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
    with pytest.raises(PictureError, match="178 million pixels") as raised:
        read_picture(data, name="a.png in ada/liked")
    one_sentence(raised)


def test_a_photo_of_100_megapixels_is_read_without_a_warning():
    data = encoded(Image.new("L", (12_000, 8_400), 130), "JPEG")
    assert 12_000 * 8_400 < MAX_PIXELS
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (read_picture(data) == 130).all()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_a_pipe_and_a_link_to_nowhere_are_named_and_nothing_waits(tmp_path):
    (tmp_path / "liked").mkdir()
    Image.fromarray(SCENE).save(tmp_path / "liked" / "a.png")
    os.mkfifo(tmp_path / "liked" / "b.png")
    (tmp_path / "liked" / "c.png").symlink_to(tmp_path / "nowhere.png")
    history = PreferenceHistory.from_folder(tmp_path)
    assert len(history) == 1 and "b.png" in history.left_out and "c.png" in history.left_out


def test_suffixes_of_videos_and_data_are_no_pictures():
    encoded(Image.new("F", (4, 4)), "SPIDER")  # with which old Pillows take every file without a suffix for a picture
    assert not picture_suffixes() & {
        "",
        ".mpg",
        ".mpeg",
        ".h5",
        ".hdf",
        ".pdf",
        ".txt",
        ".json",
        ".npy",
        ".mp4",
        ".grib",
    }


# ---- what a folder costs --------------------------------------------------------------------------------------------

MEASURE = r"""
import os, re, sys
import torch
from prefgen.history import PreferenceHistory
PreferenceHistory.from_images([torch.rand(8, 8, 3)])
idle = int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
history = PreferenceHistory.from_folder(sys.argv[1])
PreferenceHistory.from_images([item.image[None] for item in history.items])
peak = int(re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read())[1]) * 1024
print(len(history), peak - idle)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="counts memory as Linux does")
def test_photos_of_24_megapixels_never_stand_in_memory_together(tmp_path):
    """Kept are 8.4 MB a photo, on the way at most one photo at half its size: 40 photos stay far below 1 GB."""
    (tmp_path / "liked").mkdir()
    photo(1500, 1000).resize((6000, 4000)).save(tmp_path / "liked" / "00.jpg", quality=90)
    for number in range(1, 12):
        os.link(tmp_path / "liked" / "00.jpg", tmp_path / "liked" / f"{number:02d}.jpg")
    command = [sys.executable, "-c", MEASURE, str(tmp_path)]
    count, over_idle = map(int, subprocess.check_output(command, cwd=ROOT, text=True).split())
    assert count == 12
    assert over_idle < 12 * 8.4e6 + 150e6


# ---- texts beside pictures ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "cp1252"])
def test_a_text_is_read_however_an_editor_saved_it(encoding):
    text = "café, naïve"
    assert guessed_text(text.encode(encoding)) == text


@pytest.mark.parametrize("data", [b"", b"\xff", b"\xff\xfe", b"\xff\xfea", b"\0", b"\x81\x8d", b"\xef\xbb\xbf"])
def test_no_bytes_are_too_odd_for_a_text(data):
    assert isinstance(guessed_text(data), str)


def test_a_picture_larger_than_the_memory_is_told_so(monkeypatch, one_sentence):
    out = io.BytesIO()
    Image.new("RGB", (4, 4)).save(out, "PNG")

    def refuse(self):
        raise MemoryError

    monkeypatch.setattr(PngImageFile, "load", refuse)
    with pytest.raises(PictureError) as raised:
        read_picture(out.getvalue())
    assert "(it needs more memory than is free): shrink or remove it" in one_sentence(raised)


def test_a_grey_tensor_of_two_sides_is_a_picture():
    grey = torch.rand(4, 6)
    assert torch.equal(clean_picture(grey), grey[..., None].expand(-1, -1, 3))


def test_a_png_text_that_does_not_unpack_turns_nothing():
    out = io.BytesIO()
    Image.new("RGB", (4, 6)).save(out, "PNG")
    data = out.getvalue()
    body = b"zTXt" + b"Raw profile type exif" + bytes(2) + b"not packed"
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    assert read_picture(data[:33] + chunk + data[33:]).shape == (6, 4, 3)
