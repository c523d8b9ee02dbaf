"""Training reads pictures with the nodes' reader: the same file gives the same pixels wherever it is read."""

import io
import zlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from prefgen.history import PreferenceHistory
from prefgen.pictures import LONG_SIDE
from tests.prefgen.picture_files import broken_exif, encoded, with_chunk
from training.data.check import _pictures
from training.data.errors import DataError
from training.data.pickapic import looks
from training.data.worlds import DataSetWorld
from training.evaluation.study.make import opened

SOFT = Image.fromarray(np.random.default_rng(3).integers(30, 226, (7, 9, 3), dtype=np.uint8)).resize((180, 140))


def over_a_colour() -> Image.Image:
    """Half transparent over red, which only a reader that ignores transparency would see."""
    picture = Image.new("RGBA", SOFT.size, (255, 0, 0, 0))
    picture.paste(SOFT.convert("RGBA").crop((0, 0, 90, 140)), (0, 0))
    return picture


FILES = {
    "transparent.png": encoded(over_a_colour(), "PNG"),
    "transparent.webp": encoded(over_a_colour(), "WEBP", lossless=True, exact=True),
    "palette.gif": encoded(over_a_colour(), "GIF"),
    "deep grey.png": encoded(Image.fromarray(np.asarray(SOFT.convert("L")).astype(np.uint16) * 257), "PNG"),
    "turned.jpg": encoded(SOFT, "JPEG", exif=b"Exif\0\0" + broken_exif(6)),
    "long text.png": with_chunk(encoded(SOFT, "PNG"), b"zTXt", b"parameters\0\0" + zlib.compress(b"a" * (2 << 20))),
    "large.jpg": encoded(SOFT.resize((2600, 1500)), "JPEG"),
    "cmyk.jpg": encoded(SOFT.convert("CMYK"), "JPEG"),
    "scan.tif": encoded(SOFT, "TIFF"),
}


@pytest.fixture
def make(tmp_path):
    """A function that makes a data set of the common schema of pictures' bytes, one user who likes them all."""

    def write(images) -> DataSetWorld:
        (tmp_path / "pictures").mkdir()
        count = len(images)
        index = {
            "user": [0] * count,
            "verdict": ["liked"] * count,
            "prompt": [""] * count,
            "attributes": pa.array([None] * count, pa.list_(pa.string())),
            "split": ["train"] * count,
            "heldout": [False] * count,
            "shard": [0] * count,
            "row": list(range(count)),
        }
        pq.write_table(pa.table(index), tmp_path / "index.parquet")
        users = {"user": [0], "split": ["train"], "tastes": pa.array([None]), "dislikes": pa.array([None])}
        pq.write_table(pa.table(users), tmp_path / "users.parquet")
        pq.write_table(pa.table({"image": pa.array(images, pa.binary())}), tmp_path / "pictures/pictures-00000.parquet")
        (tmp_path / "manifest.json").write_text("{}")
        return DataSetWorld(tmp_path)

    return write


def test_a_data_set_gives_the_very_pixels_that_the_node_gives(tmp_path, make):
    world = make(list(FILES.values()))
    trained = world.pictures(range(len(FILES)))
    for number, (name, data) in enumerate(FILES.items()):
        folder = tmp_path / name / "liked"
        folder.mkdir(parents=True)
        (folder / name).write_bytes(data)
        (item,) = PreferenceHistory.from_folder(folder.parent).items
        assert torch.equal(item.image, torch.from_numpy(trained[number]).float() / 255), name
    assert (trained[0][:, 90:] == 255).all() and (trained[1][:, 90:] == 255).all()
    assert trained[4].shape == (180, 140, 3) and max(trained[6].shape) == LONG_SIDE
    assert list(_pictures(tmp_path)) == []


def test_what_a_base_is_trained_on_keeps_its_size(make):
    world = make([FILES["large.jpg"]] * 2)
    assert [picture.shape for picture in world.pictures([0, 1], long_side=None)] == [(1500, 2600, 3)] * 2


@pytest.mark.parametrize("image", [None, b"", b"words", FILES["turned.jpg"][:900], b"%!PS-Adobe-3.0 EPSF-3.0\n"])
def test_a_damaged_picture_of_a_set_is_named(make, image):
    world = make([FILES["scan.tif"], image])
    with pytest.raises(DataError, match=r"Picture 1 of .* can't be read \(.*\): run"):
        world.pictures([0, 1])
    faults = list(_pictures(world.folder))
    assert (["row 1" in fault for fault in faults] == [True]) is (image is not None)


@pytest.mark.parametrize("name", FILES)
def test_pick_a_pic_looks_at_what_will_be_trained_on(name):
    fault, hashed, _ = looks.look(FILES[name])
    assert fault is None
    flat = io.BytesIO()
    if name.startswith(("transparent", "palette")):
        with Image.open(io.BytesIO(FILES[name])) as image:
            seen = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    elif name == "deep grey.png":
        seen = SOFT.convert("L")
    else:
        seen = SOFT.transpose(Image.Transpose.ROTATE_270) if name == "turned.jpg" else SOFT
    seen.convert("RGB").save(flat, "PNG")
    _, expected, _ = looks.look(flat.getvalue())
    assert bin((hashed ^ expected) & (2**64 - 1)).count("1") <= looks.NEAR


def test_a_study_shows_pictures_as_they_are_seen(tmp_path):
    for name in ("transparent.png", "turned.jpg", "deep grey.png"):
        (tmp_path / name).write_bytes(FILES[name])
    assert (np.asarray(opened(tmp_path / "transparent.png"))[:, 90:] == 255).all()
    assert opened(tmp_path / "turned.jpg").size == (140, 180)
    assert np.asarray(opened(tmp_path / "deep grey.png")).mean() == pytest.approx(
        np.asarray(SOFT.convert("L")).mean(), 0.01
    )
