"""What pictures say of themselves: read where it is well formed, else passed over, and left out on request."""

import io
import json
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms
from PIL.PngImagePlugin import PngInfo

from prefgen.pictures import PictureError, read_picture
from prefgen.tastes.bare import bare
from prefgen.tastes.origin import Origin, of_graph, of_parameters, origin_of, stars_of, verdict_of_stars

GRAPH = {
    "4": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "sdxl.safetensors"}},
    "10": {"class_type": "LoraLoader", "inputs": {"model": ["4", 0], "lora_name": "style.safetensors"}},
    "6": {"class_type": "CLIPTextEncode", "inputs": {"text": "a red\nboat", "clip": ["4", 1]}},
    "7": {"class_type": "CLIPTextEncode", "inputs": {"text": "blurry", "clip": ["4", 1]}},
    "3": {
        "class_type": "KSampler",
        "inputs": {"seed": 2**60, "model": ["10", 0], "positive": ["6", 0], "negative": ["7", 0]},
    },
}
XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF><rdf:Description xmp:Rating="%d"/></rdf:RDF></x:xmpmeta>'


def drawn(size=(40, 30)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (*size[::-1], 3), dtype=np.uint8))


def test_a_picture_of_comfyuis_says_prompt_seed_and_model(tmp_path):
    info = PngInfo()
    info.add_text("prompt", json.dumps(GRAPH))
    drawn().save(tmp_path / "a.png", pnginfo=info)
    assert origin_of(tmp_path / "a.png") == Origin("a red boat", 2**60, "sdxl.safetensors")


def test_an_animated_webp_of_comfyuis_says_it_in_its_exif(tmp_path):
    exif = Image.Exif()
    exif[0x0110] = "prompt:" + json.dumps(GRAPH)
    drawn().save(tmp_path / "a.webp", exif=exif)
    assert origin_of(tmp_path / "a.webp").prompt == "a red boat"


def test_a_prompt_that_comes_from_another_node_is_followed():
    graph = GRAPH | {
        "6": {"class_type": "CLIPTextEncode", "inputs": {"text": ["20", 0], "clip": ["4", 1]}},
        "20": {"class_type": "PrimitiveString", "inputs": {"value": "two owls"}},
    }
    assert of_graph(json.dumps(graph)).prompt == "two owls"


def test_the_parameters_of_others_are_read():
    text = "a cat, masterpiece\nNegative prompt: dog\nSteps: 20, Seed: 42, Model: dream, Size: 64x64"
    assert of_parameters(text) == Origin("a cat, masterpiece", 42, "dream")
    assert of_parameters("only a prompt") == Origin("only a prompt")


LOOP = {"3": {"inputs": {"seed": 1, "positive": ["6", 0]}}, "6": {"inputs": {"conditioning": ["6", 0]}}}


@pytest.mark.parametrize(
    "text",
    ["", "[]", "null", "{", '{"3": 5}', '{"3": {"inputs": []}}', '{"3": {"inputs": {"seed": true, "positive": 1}}}',
     "[" * 100_000, json.dumps(LOOP), '{"3": {"inputs": {"seed": 1, "positive": ["9", 0]}}}', "x" * 2_000_000],
)  # fmt: skip
def test_odd_metadata_says_nothing_and_stops_nothing(text, tmp_path):
    assert of_graph(text).prompt == ""
    info = PngInfo()
    info.add_text("prompt", text[:100_000])
    drawn().save(tmp_path / "a.png", pnginfo=info)
    assert origin_of(tmp_path / "a.png").prompt == ""
    (tmp_path / "b.png").write_text(text[:1000])
    assert origin_of(tmp_path / "b.png") == Origin()


@pytest.mark.parametrize(
    ("stars", "verdict"), [(5, "liked"), (4, "liked"), (3, ""), (2, ""), (1, "disliked"), (-1, "disliked"), (0, "")]
)
def test_stars_become_verdicts(stars, verdict, tmp_path):
    for name, options in (("a.jpg", {"xmp": XMP % stars}), ("a.webp", {"xmp": XMP % stars})):
        drawn().save(tmp_path / name, **options)
        assert stars_of(tmp_path / name) == stars and verdict_of_stars(stars_of(tmp_path / name)) == verdict
    drawn().save(tmp_path / "b.png")
    assert stars_of(tmp_path / "b.png") is None and verdict_of_stars(None) == ""
    (tmp_path / "b.xmp").write_bytes(b"<rdf:RDF><xmp:Rating>%d</xmp:Rating></rdf:RDF>" % stars)
    assert stars_of(tmp_path / "b.png") == stars


def test_the_sidecar_counts_before_the_file_and_darktables_name_is_known(tmp_path):
    drawn().save(tmp_path / "a.jpg", xmp=XMP % 1)
    (tmp_path / "a.jpg.xmp").write_bytes(XMP % 5)
    assert stars_of(tmp_path / "a.jpg") == 5


def exif_with_gps(turn: int = 1) -> bytes:
    exif = Image.Exif()
    exif[0x0112], exif[0x010F], exif[0x9286] = (turn, "SECRETCAMERA", b"ASCII\0\0\0SECRETCOMMENT")
    exif.get_ifd(0x8825).update({1: "N", 2: (52.0, 31.0, 12.0)})
    return exif.tobytes()


FORMS = {
    "png": {"format": "PNG"},
    "jpeg": {"format": "JPEG", "quality": 90, "comment": "SECRETCOMMENT"},
    "webp": {"format": "WEBP", "lossless": True},
    "tiff": {"format": "TIFF"},
}


@pytest.mark.parametrize("turn", [1, 6, 3])
@pytest.mark.parametrize("form", list(FORMS))
def test_a_bare_file_is_the_same_picture_without_a_word_about_anybody(form, turn):
    options = dict(FORMS[form])
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    if form == "png":
        info = PngInfo()
        info.add_text("prompt", "SECRETPROMPT")
        info.add_itxt("XML:com.adobe.xmp", "SECRETXMP")
        options["pnginfo"] = info
    elif form != "tiff":
        options["xmp"] = b"<x:xmpmeta>SECRETXMP</x:xmpmeta>"
    out = io.BytesIO()
    drawn().save(out, exif=exif_with_gps(turn), icc_profile=profile, **options)
    data = out.getvalue()
    assert b"SECRET" in data
    clean, suffix = bare(data)
    assert b"SECRET" not in clean and suffix == {"jpeg": ".jpg", "tiff": ".png"}.get(form, f".{form}")
    assert np.array_equal(read_picture(clean), read_picture(data))
    with Image.open(io.BytesIO(clean)) as image:
        assert not image.getexif().get_ifd(0x8825) and not image.info.get("comment") and not image.info.get("xmp")
        assert form == "tiff" or image.info.get("icc_profile") == profile


def test_a_second_frame_behind_a_jpeg_goes_with_what_it_says():
    frames = [drawn((40, 30)), drawn((20, 20))]
    out = io.BytesIO()
    frames[0].save(out, "MPO", save_all=True, append_images=frames[1:], exif=exif_with_gps())
    clean, suffix = bare(out.getvalue())
    assert b"SECRET" not in clean and suffix == ".jpg" and clean.endswith(b"\xff\xd9")
    assert np.array_equal(read_picture(clean), read_picture(out.getvalue()))


def test_what_is_no_picture_is_refused():
    with pytest.raises(PictureError):
        bare(b"no picture")


def test_content_credentials_of_a_png_are_left_out():
    out = io.BytesIO()
    drawn().save(out, "PNG")
    data = out.getvalue()
    body = b"SECRETCREDENTIALS"
    chunk = struct.pack(">I", len(body)) + b"caBX" + body + struct.pack(">I", zlib.crc32(b"caBX" + body))
    clean, _ = bare(data[:33] + chunk + data[33:])
    assert clean == data


def test_padding_before_a_marker_of_a_jpeg_is_passed_over():
    """JPEG allows any number of FF before a marker's code."""
    out = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(out, "JPEG", comment="SECRET")
    data = out.getvalue()
    padded = data.replace(b"\xff\xfe", b"\xff\xff\xff\xfe").replace(b"\xff\xdb", b"\xff\xff\xdb")
    assert padded != data
    assert bare(padded) == bare(data) and b"SECRET" not in bare(padded)[0]
