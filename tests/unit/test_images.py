"""One image loader: equal to the engine's, bounded in pixels, measured from headers; whatever is broken is said."""

import base64
import io
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image, PngImagePlugin

from spatialthinker.clients.model_api import encode_image
from spatialthinker.storage.images import (
    MAX_PIXELS,
    BrokenImage,
    check_image,
    encode,
    find_image,
    load_image,
    open_image,
    read_file,
    read_header,
    upright,
)

RAMP = Image.fromarray(np.arange(24 * 16, dtype=np.uint8).reshape(16, 24))
WIDE = np.arange(24 * 16).reshape(16, 24) * 170


def with_alpha(mode: str) -> Image.Image:
    image = RAMP.convert("RGB").convert("RGBA")
    image.putalpha(RAMP.transpose(Image.Transpose.FLIP_LEFT_RIGHT))
    return image.convert(mode)


def with_orientation(number: int, kind: str) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = number
    return encode(RAMP.convert("RGB"), kind, exif=exif)


FILES = {
    "1": encode(RAMP.convert("1"), "PNG"),
    "L": encode(RAMP, "PNG"),
    "L, one transparent value": encode(RAMP, "PNG", transparency=40),
    "LA": encode(with_alpha("LA"), "PNG"),
    "P": encode(RAMP.convert("P"), "PNG"),
    "P, one transparent entry": encode(RAMP.convert("P"), "PNG", transparency=40),
    "P, an alpha value for each entry": encode(RAMP.convert("P"), "PNG", transparency=bytes(range(256))),
    "P of a GIF": encode(RAMP.convert("P"), "GIF", transparency=40),
    "RGB": encode(RAMP.convert("RGB"), "PNG"),
    "RGB, one transparent colour": encode(RAMP.convert("RGB"), "PNG", transparency=(40, 40, 40)),
    "RGBA": encode(with_alpha("RGBA"), "PNG"),
    "RGBA of a WebP": encode(with_alpha("RGBA"), "WEBP", lossless=True),
    "CMYK": encode(RAMP.convert("CMYK"), "JPEG"),
    "YCbCr": encode(RAMP.convert("RGB").convert("YCbCr"), "TIFF"),
    "I;16": encode(Image.fromarray(WIDE.astype(np.uint16)), "PNG"),
    "I": encode(Image.fromarray(WIDE.astype(np.int32)), "TIFF"),
    "F up to 255": encode(Image.fromarray((WIDE / 257).astype(np.float32)), "TIFF"),
    "F up to 1": encode(Image.fromarray((WIDE / 65535).astype(np.float32)), "TIFF"),
    **{f"{kind} turned {n}": with_orientation(n, kind) for kind in ("JPEG", "PNG", "WEBP", "TIFF") for n in range(9)},
}


@pytest.mark.filterwarnings("ignore:a picture of mode")
@pytest.mark.parametrize("name", FILES)
def test_every_mode_is_loaded_as_the_engine_loads_it(name):
    media = pytest.importorskip("vllm.multimodal.media.image")
    expected = media.ImageMediaIO().load_bytes(FILES[name]).media
    picture = load_image(FILES[name])
    assert picture.mode == "RGB" and picture.tobytes() == expected.tobytes()
    assert check_image(FILES[name]) == read_header(FILES[name])[0] == picture.size == expected.size


def test_transparency_lies_on_white_also_for_clients():
    for mode in ("RGBA", "LA"):
        clear = encode(Image.new(mode, (8, 8)), "PNG")
        kind, text = encode_image(clear, 10**6, 100)
        for data in (clear, base64.b64decode(text)):
            assert load_image(data).getpixel((3, 3)) == (255, 255, 255)
    grey = encode(Image.new("L", (8, 8), 40), "PNG", transparency=40)
    assert Image.open(io.BytesIO(base64.b64decode(encode_image(grey, 10**6, 100)[1]))).getpixel((0, 0)) == (255,) * 3


@pytest.mark.parametrize("name", ["I;16", "I", "F up to 1"])
def test_values_that_rgb_cannot_hold_are_said(name):
    with pytest.warns(UserWarning, match="8 bits per channel"):
        load_image(FILES[name])


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "TIFF"])
def test_a_header_is_read_without_decoding(kind, monkeypatch):
    data = with_orientation(6, kind) if kind != "GIF" else encode(RAMP, "GIF")

    def refuse(self):
        raise AssertionError("decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", refuse)
    monkeypatch.setattr("PIL.TiffImagePlugin.TiffImageFile.load", refuse)
    monkeypatch.setattr("PIL.WebPImagePlugin.WebPImageFile.load", refuse)
    assert read_header(data)[0] == ((24, 16) if kind == "GIF" else (16, 24))


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def test_an_orientation_behind_the_pixels_of_a_png_counts():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(RAMP, "PNG")
    late = data[:-12] + png_chunk(b"eXIf", exif.tobytes()[6:]) + data[-12:]
    assert read_header(late)[0] == load_image(late).size == (16, 24)


def test_broken_texts_and_tags_leave_the_picture_as_it_lies():
    info = PngImagePlugin.PngInfo()
    info.add_text("Raw profile type exif", "\nexif\n  4\nzz\n")
    data = encode(RAMP, "PNG", pnginfo=info)
    assert read_header(data)[0] == load_image(data).size == (24, 16)


def huge_png(width: int, height: int) -> bytes:
    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes((width + 7) // 8 + 1) * height, 9)
    chunks = [png_chunk(b"IHDR", head), png_chunk(b"IDAT", rows), png_chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


@pytest.mark.parametrize("size", [(13_000, 13_000), (20_000, 20_000), (MAX_PIXELS + 1, 1)])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_too_many_pixels_are_refused_before_they_are_decoded(size):
    data = huge_png(*size)
    for read in (read_header, check_image, load_image):
        with pytest.raises(BrokenImage, match=f"more than {MAX_PIXELS}"):
            read(data)


def long_text_png() -> bytes:
    info = PngImagePlugin.PngInfo()
    info.add_text("comment", "x" * 2**21, zip=True)
    return encode(RAMP, "PNG", pnginfo=info)


BROKEN = {
    "truncated JPEG": encode(RAMP.convert("RGB").resize((400, 300)), "JPEG")[:-900],
    "truncated PNG": encode(RAMP.resize((400, 300)), "PNG")[:-500],
    "truncated WebP": encode(RAMP.convert("RGB").resize((400, 300)), "WEBP")[:-300],
    "truncated GIF": encode(RAMP.resize((400, 300)), "GIF")[:-3000],
    "corrupt AVIF": encode(RAMP.convert("RGB"), "AVIF")[:-20] + b"?" * 20,
    "truncated AVIF": encode(RAMP.convert("RGB"), "AVIF")[:-30],
    "PNG with a long text": long_text_png(),
    "text": b"no image",
    "nothing": b"",
    "Latin-1": "\xe9".encode("latin-1") * 100,
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_cannot_be_decoded_is_one_kind_of_error(name):
    for read in (check_image, load_image):
        with pytest.raises(BrokenImage, match="."):
            read(BROKEN[name])


@pytest.mark.parametrize("name", ["truncated JPEG", "truncated PNG"])
def test_a_file_without_its_end_is_found_with_the_header(name):
    with pytest.raises(BrokenImage):
        read_header(BROKEN[name])


def test_a_jpeg_with_bytes_behind_its_end_is_whole():
    data = encode(RAMP, "JPEG") + b"trailer"
    assert read_header(data) == ((24, 16), "L")


def test_an_image_is_bytes_base64_or_a_file_and_nothing_else(tmp_path):
    png = FILES["RGB"]
    (tmp_path / "a.png").write_bytes(png)
    text = base64.b64encode(png).decode()
    lines = "\n".join(text[i : i + 76] for i in range(0, len(text), 76))
    for cell in (png, text, lines, f"data:image/png;base64,{text}", "a.png", {"bytes": png, "path": None}):
        source = find_image(cell, tmp_path)
        assert source is not None and read_file(source) == png
    assert find_image({"bytes": None, "path": "a.png"}, tmp_path) == tmp_path / "a.png"
    assert [find_image(cell, tmp_path) for cell in (None, "", {"bytes": None})] == [None] * 3
    with pytest.raises(ValueError, match="there is no image file .*5... characters") as caught:
        find_image("A" * 5000 + "!", tmp_path)
    assert len(str(caught.value)) < 300
    with pytest.raises(ValueError, match="got float"):
        find_image(2.5, tmp_path)


@pytest.mark.filterwarnings("ignore:a picture of mode")
@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "I", "F", "I;16"]
)
def test_a_picture_of_any_mode_is_what_its_file_is(tmp_path, mode):
    drawn = RAMP.convert("I") if mode == "I;16" else with_alpha("RGB" if mode == "P" else "RGBA")
    drawn = drawn.convert(mode)
    stored = find_image(drawn, tmp_path)
    assert isinstance(stored, bytes) and load_image(stored).tobytes() == upright(drawn).tobytes()


@pytest.mark.parametrize("number", [3, 6, 8])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_an_opened_file_is_stored_upright(tmp_path, number, kind):
    data = with_orientation(number, kind)
    stored = find_image(Image.open(io.BytesIO(data)), tmp_path)
    assert isinstance(stored, bytes) and load_image(stored).tobytes() == load_image(data).tobytes()


def test_an_opened_file_that_breaks_off_is_a_broken_image(tmp_path):
    data = encode(Image.effect_noise((64, 64), 90).convert("RGB"), "JPEG")
    with pytest.raises(BrokenImage, match="a picture of mode RGB cannot be stored: "):
        find_image(Image.open(io.BytesIO(data[: len(data) // 2])), tmp_path)


def test_a_picture_that_is_a_program_is_refused_before_it_runs(monkeypatch):
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: pytest.fail("Ghostscript was started"))
    data = encode(Image.new("RGB", (4, 4)), "EPS")
    for read in (load_image, read_header, check_image):
        with pytest.raises(BrokenImage, match="PostScript"):
            read(data)


def test_devices_pipes_and_folders_are_no_images(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "link.png").symlink_to("/dev/zero")
    for name in ("pipe.png", "link.png", "/dev/zero", "/dev/stdin", "."):
        with pytest.raises(ValueError, match=r"no (regular|image) file"):
            find_image(name, tmp_path)
    for name in ("pipe.png", "link.png"):  # put there since
        with pytest.raises(ValueError, match="no regular file"):
            read_file(tmp_path / name)
        with pytest.raises(BrokenImage, match="no regular file"), open_image(tmp_path / name):
            pass


def test_a_file_of_no_end_is_not_read_whole(tmp_path, monkeypatch):
    monkeypatch.setattr("spatialthinker.storage.images.MAX_FILE_BYTES", 1000)
    (tmp_path / "a.png").write_bytes(bytes(1001))
    with pytest.raises(ValueError, match="larger than 1000 bytes"):
        read_file(tmp_path / "a.png")
