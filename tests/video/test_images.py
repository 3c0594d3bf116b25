"""Images: exact pixels, upright by their EXIF orientation, one picture for both frames, coded errors."""

from __future__ import annotations

import struct
import zlib
from fractions import Fraction

import av
import numpy as np
import pytest
import torch

from vrlt_fast.config import VideoConfig
from vrlt_fast.errors import VideoError
from vrlt_fast.model.load import CLIP_MEAN, CLIP_STD
from vrlt_fast.video.images import ImageLoader
from vrlt_fast.video.preprocess import Geometry, smart_resize

TURNED = {
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.transpose(1, 0, 2),
    6: lambda x: np.rot90(x, -1),
    7: lambda x: np.rot90(x, 2).transpose(1, 0, 2),
    8: lambda x: np.rot90(x),
}
"""What each EXIF orientation makes of a picture."""


@pytest.fixture
def picture(seed):
    """112 x 168, no corner like another."""
    blocks = np.random.default_rng(seed).integers(0, 255, (4, 6, 3), dtype=np.uint8)
    return blocks.repeat(28, 0).repeat(28, 1)


@pytest.fixture
def loader():
    return ImageLoader(VideoConfig(), Geometry())


def write(path, pictures, codec="png", pixels="rgb24", container="image2"):
    """Encode uint8 [H, W, 3] pictures into one file."""
    options = {"update": "1"} if container == "image2" else {}
    with av.open(str(path), "w", format=container, options=options) as file:
        stream = file.add_stream(codec, rate=Fraction(8))
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = pixels
        for each in pictures:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(each), format="rgb24")))
        file.mux(stream.encode())
    return path


def with_orientation(png, value):
    """The PNG file with an eXIf chunk."""
    tiff = b"MM\0*" + struct.pack(">IHHHIHHI", 8, 1, 0x0112, 3, 1, value, 0, 0)
    content = png.read_bytes()
    chunk = b"eXIf" + tiff
    chunk = struct.pack(">I", len(tiff)) + chunk + struct.pack(">I", zlib.crc32(chunk))
    png.write_bytes(content[:33] + chunk + content[33:])  # behind the header
    return png


def shown(clip):
    return clip.frames().permute(0, 2, 3, 1).numpy()


def test_an_image_is_a_clip_of_one_frame_pair(tmp_path, picture, loader):
    path = write(tmp_path / "a.png", [picture])
    clip = loader.load(path)
    assert (clip.kind, clip.grid, clip.n_tokens) == ("image", (1, 8, 12), 24)
    assert loader.n_tokens(path) == 24
    assert all(np.array_equal(frame, picture) for frame in shown(clip))
    assert loader.load(path) is clip
    assert ImageLoader(VideoConfig(), Geometry()).load(path).key == clip.key
    assert ImageLoader(VideoConfig(), Geometry(patch=16)).load(path).key != clip.key
    assert loader.load(write(tmp_path / "b.png", [picture[::-1]])).key != clip.key


@pytest.mark.parametrize("orientation", TURNED)
def test_pictures_are_upright(tmp_path, picture, loader, orientation):
    path = with_orientation(write(tmp_path / "a.png", [picture]), orientation)
    clip = loader.load(path)
    assert np.array_equal(shown(clip)[0], TURNED[orientation](picture))
    assert loader.n_tokens(path) == clip.n_tokens


def test_a_jpeg_is_close(tmp_path, picture, loader):
    clip = loader.load(write(tmp_path / "a.jpg", [picture], "mjpeg", "yuvj444p"))
    assert np.abs(shown(clip)[0].astype(int) - picture).mean() < 4


def test_sizes_follow_the_bounds(tmp_path, picture):
    path = write(tmp_path / "a.png", [picture])
    for least, most in ((784, 4704), (40_000, 60_000)):
        clip = ImageLoader(VideoConfig(image_min_pixels=least, image_max_pixels=most), Geometry()).load(path)
        height, width = smart_resize(112, 168, 28, least, most)
        assert clip.grid == (1, height // 14, width // 14)
        assert clip.n_tokens * 28**2 == height * width <= most


def test_what_is_kept_is_bounded(tmp_path, picture):
    loader = ImageLoader(VideoConfig(), Geometry(), kept_bytes=2 * 2 * picture.nbytes)
    paths = [write(tmp_path / f"{i}.png", [np.roll(picture, 28 * i, 1)]) for i in range(3)]
    first, second, _ = (loader.load(path) for path in paths)
    assert loader.load(paths[1]) is second
    again = loader.load(paths[0])
    assert again is not first
    assert torch.equal(again.patches, first.patches)


def test_pixels_are_those_of_transformers_processor(tmp_path, picture, loader):
    pytest.importorskip("PIL")
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    theirs = Qwen2VLImageProcessorPil()(images=[picture], return_tensors="pt")
    clip = loader.load(write(tmp_path / "a.png", [picture]))
    assert theirs["image_grid_thw"].tolist() == [list(clip.grid)]
    mean, std = (torch.tensor(x).repeat_interleave(392) for x in (CLIP_MEAN, CLIP_STD))
    torch.testing.assert_close((clip.patches.float() / 255 - mean) / std, theirs["pixel_values"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "content", "code"),
    [
        ("missing.png", None, "V01"),
        ("empty.png", b"", "V02"),
        ("text.png", b"no picture at all", "V04"),
        ("cut.png", 100, "V04"),
        ("film.gif", "film", "V10"),
        ("thin.png", "thin", "V06"),
    ],
)
def test_what_is_refused(tmp_path, picture, loader, name, content, code):
    path = tmp_path / name
    if content == "film":
        write(path, [picture, picture[::-1]], "gif", "rgb8", "gif")
    elif content == "thin":
        write(path, [picture[:1].repeat(2, 1).repeat(2, 1)])
    elif isinstance(content, int):
        path.write_bytes(write(path, [picture]).read_bytes()[:content])
    elif content is not None:
        path.write_bytes(content)
    for call in (loader.load, loader.n_tokens):
        with pytest.raises(VideoError) as caught:
            call(path)
        assert caught.value.code == f"VRLT-{code}"
        assert str(path) in str(caught.value)
        assert "image" in str(caught.value)
        assert "PNG" in caught.value.problems[0].fix


def test_a_config_with_crossed_bounds_is_refused():
    with pytest.raises(ValueError, match="image_min_pixels"):
        VideoConfig(image_min_pixels=5000, image_max_pixels=4000)


@pytest.mark.parametrize(("codec", "pixels"), [("png", "rgb24"), ("mjpeg", "yuvj420p")])
def test_bytes_give_what_their_file_gives(loader, picture, tmp_path, codec, pixels):
    path = write(tmp_path / f"a.{'png' if codec == 'png' else 'jpg'}", [picture], codec, pixels)
    found, wanted = loader.load_bytes(path.read_bytes(), "sent"), loader.load(path)
    assert found.key == wanted.key
    assert torch.equal(found.patches, wanted.patches)


def test_bytes_that_are_refused_name_what_was_sent(loader, picture, tmp_path):
    data = write(tmp_path / "a.png", [picture]).read_bytes()
    large = data[:16] + struct.pack(">II", 8192, 8192) + data[24:]
    jpeg = bytes.fromhex("ffd8ffff e0000400 00ffc0 0011 08 ffff ffff 03".replace(" ", ""))
    text = b"#EXTM3U\n/etc/passwd\n"
    cases = [(b"", "V02"), (text, "V02"), (data[:20], "V02"), (data[:40], "V0"), (large, "V06"), (jpeg, "V06")]
    for sent, code in cases:
        with pytest.raises(VideoError) as caught:
            loader.load_bytes(sent, "images[3]")
        (problem,) = caught.value.problems
        assert problem.code.startswith(f"VRLT-{code}")
        assert problem.where == "images[3]"
        assert "/tmp" not in str(caught.value)
