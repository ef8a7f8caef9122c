"""TIFF, BMP, AVIF and HEIC, what is named instead of decoded, and photographs of large sensors."""

import importlib.util
import io
import struct
import sys
from typing import Any, Literal

import numpy as np
import pytest
from PIL import Image

from clipflow_ray import images, sandbox
from clipflow_ray.config import OPENAI_VIEW, ImageLimits
from clipflow_ray.containers import sniff
from clipflow_ray.errors import ImageError
from clipflow_ray.images import decode
from clipflow_ray.recognise import HEAD, claims_image, picture_kind
from tests.conftest import encoded, photo

LIMITS = ImageLimits()
PHOTO = photo(1, (120, 160))
GREY = PHOTO[..., 1]
heic = pytest.mark.skipif(importlib.util.find_spec("pillow_heif") is None, reason="no pillow-heif")


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.copy().save(out, kind, **options)
    return out.getvalue()


def refusal(data: bytes, limits: ImageLimits = LIMITS) -> tuple[str, str]:
    with pytest.raises(ImageError) as caught:
        decode(data, limits)
    return caught.value.item_code, str(caught.value)


def tiff(rows: np.ndarray, tags: dict[int, tuple[int, list[int]]], order: Literal["<", ">"] = "<") -> bytes:
    """A TIFF of one uncompressed strip, written by hand; `tags` are (type, values) by number."""
    height, width = rows.shape[:2]
    bits, samples = rows.dtype.itemsize * 8, rows.size // (height * width)
    pixels = rows.astype(rows.dtype.newbyteorder(order)).tobytes()
    entries: dict[int, tuple[int, list[int]]] = {
        256: (4, [width]),
        257: (4, [height]),
        258: (3, [bits] * samples),
        259: (3, [1]),
        262: (3, [2 if samples >= 3 else 1]),
        273: (4, [8]),
        277: (3, [samples]),
        278: (4, [height]),
        279: (4, [len(pixels)]),
        **tags,
    }
    start = 8 + len(pixels)
    extra_at = start + 2 + 12 * len(entries) + 4
    directory, extra = struct.pack(order + "H", len(entries)), b""
    for tag, (kind, values) in sorted(entries.items()):
        packed = struct.pack(f"{order}{len(values)}{'H' if kind == 3 else 'I'}", *values)
        if len(packed) > 4:
            place = struct.pack(order + "I", extra_at + len(extra))
            extra += packed
        else:
            place = packed.ljust(4, b"\0")
        directory += struct.pack(order + "HHI", tag, kind, len(values)) + place
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", start)
    return head + pixels + directory + bytes(4) + extra


@pytest.mark.parametrize("compression", [None, "tiff_lzw", "tiff_adobe_deflate", "packbits"])
@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "CMYK", "LA"])
def test_a_tiff_has_the_pixels_of_the_png_of_the_same_image(mode: str, compression: str | None) -> None:
    image = Image.fromarray(PHOTO).convert("RGBA" if mode == "LA" else mode)
    if mode in ("RGBA", "LA"):
        image.putalpha(Image.fromarray(GREY))
        image = image.convert(mode)
    reference = image.convert("RGB") if mode == "CMYK" else image
    found = decode(saved(image, "TIFF", compression=compression), LIMITS)
    assert (found.format, found.mode, found.frames, found.width, found.height) == ("TIFF", mode, 1, 160, 120)
    expected = decode(saved(reference, "PNG"), LIMITS).rgb
    np.testing.assert_allclose(found.rgb.astype(int), expected.astype(int), atol=2)


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("channels", [1, 3])
def test_sixteen_bits_of_a_tiff_are_scaled_and_not_clipped(channels: int, order: Literal["<", ">"]) -> None:
    wide = PHOTO.astype(np.uint16) * 257
    rows = wide if channels == 3 else wide[..., 1]
    found = decode(tiff(rows, {}, order), LIMITS)
    expected = PHOTO if channels == 3 else np.repeat(GREY[..., None], 3, 2)
    np.testing.assert_allclose(found.rgb.astype(int), expected.astype(int), atol=2)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_a_tiff_in_which_white_is_zero_is_not_inverted(dtype: type) -> None:
    rows: np.ndarray = (255 - GREY).astype(dtype) * (257 if dtype is np.uint16 else 1)
    found = decode(tiff(rows.astype(dtype), {262: (3, [0])}), LIMITS)
    np.testing.assert_allclose(found.rgb[..., 0].astype(int), GREY.astype(int), atol=2)


def test_the_first_page_of_a_tiff_is_scored_and_pages_are_counted() -> None:
    more = [Image.fromarray(255 - PHOTO), Image.fromarray(PHOTO[::-1].copy())]
    found = decode(saved(Image.fromarray(PHOTO), "TIFF", save_all=True, append_images=more), LIMITS)
    assert found.frames == 3
    np.testing.assert_array_equal(found.rgb, PHOTO)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA"])
def test_a_bmp_has_the_pixels_of_the_png_of_the_same_image(mode: str) -> None:
    image = Image.fromarray(PHOTO).convert(mode)
    found, expected = decode(saved(image, "BMP"), LIMITS), decode(saved(image, "PNG"), LIMITS)
    assert (found.format, found.frames) == ("BMP", 1)
    np.testing.assert_array_equal(found.rgb, expected.rgb)


@pytest.mark.parametrize("kind", ["AVIF", pytest.param("HEIF", marks=heic)])
def test_avif_and_heic_have_the_colours_that_were_saved(kind: str) -> None:
    rgb = np.asarray(Image.fromarray(photo(2, (24, 32))).resize((160, 120), Image.Resampling.BICUBIC))
    options: dict[str, Any] = {"AVIF": {"quality": 100, "subsampling": "4:4:4"}, "HEIF": {"quality": -1, "chroma": 444}}
    found = decode(saved(Image.fromarray(rgb), kind, **options[kind]), LIMITS)
    assert (found.format, found.frames, found.width, found.height) == (kind, 1, 160, 120)
    np.testing.assert_allclose(found.rgb.astype(int), rgb.astype(int), atol=2)


@pytest.mark.parametrize("kind", ["AVIF", pytest.param("HEIF", marks=heic)])
def test_a_turned_avif_or_heic_is_upright(kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = Image.fromarray(PHOTO).transpose(Image.Transpose.ROTATE_90)
    found = decode(saved(stored, kind, exif=exif.tobytes(), quality=95), LIMITS)
    assert (found.width, found.height, found.has_exif) == (160, 120, True)
    assert np.abs(found.rgb.astype(int) - PHOTO).mean() < 6


@pytest.mark.skipif(importlib.util.find_spec("pillow_heif") is not None, reason="pillow-heif is installed")
def test_without_its_package_a_heic_is_named_with_what_to_do() -> None:
    code, message = refusal(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(200))
    assert code == "unsupported_format" and "HEIC" in message and "pillow-heif" in message


@pytest.mark.parametrize(
    ("start", "named"),
    [
        (b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL"),
        (b"\xff\x0a", "JPEG XL"),
        (b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG 2000"),
        (b"8BPS\0\1", "Photoshop"),
        (b"II*\0\x10\0\0\0CR\2\0", "raw"),
        (b"\0\0\0\x18ftypcrx ", "raw"),
        (b"\0\0\0\x18ftypmp42", "video"),
        (b"II+\0\x08\0\0\0", "BigTIFF"),
        (b"  \n<!DOCTYPE html><html>404</html>", "HTML"),
        (b"<?xml version='1.0'?>\n<svg xmlns='x'/>", "SVG"),
        (b"%PDF-1.7", "PDF"),
        (b"PK\x03\x04", "zip"),
        (b"\x1f\x8b\x08", "gzip"),
        (b"PAR1", "parquet"),
        (b"a caption", "no image"),
    ],
)
def test_what_is_not_decoded_is_named(start: bytes, named: str) -> None:
    code, message = refusal(start + bytes(300))
    assert code == "unsupported_format" and named in message and message.endswith("decoded.")


def test_the_preview_in_a_camera_s_raw_file_is_not_taken_for_the_photograph() -> None:
    for tags in ({254: (4, [1])}, {50706: (1, [1])}):
        code, message = refusal(tiff(GREY, tags))
        assert code == "unsupported_format" and "raw" in message
    assert decode(tiff(GREY, {254: (4, [0])}), LIMITS).format == "TIFF"


@pytest.mark.parametrize("mode", ["F", "I"])
def test_a_tiff_whose_values_have_no_known_scale_is_refused(mode: str) -> None:
    code, message = refusal(saved(Image.fromarray(GREY).convert(mode), "TIFF"))
    assert code == "unsupported_format" and "16 bits" in message


@pytest.mark.parametrize("kind", ["TIFF", "BMP", "AVIF"])
def test_limits_hold_before_the_pixels_are_decoded(kind: str) -> None:
    data = encoded(PHOTO, kind)
    assert refusal(data, ImageLimits(max_pixels=120 * 160 - 1))[0] == "too_large_pixels"
    assert refusal(data, ImageLimits(max_side=159))[0] == "too_large_pixels"
    assert refusal(data, ImageLimits(min_side=121))[0] == "too_small"
    assert decode(data, ImageLimits(max_pixels=120 * 160, max_side=160, min_side=120)).width == 160


def test_a_tiff_that_claims_to_be_huge_is_refused_and_one_without_its_data_is_truncated() -> None:
    huge = {256: (4, [60_000]), 257: (4, [60_000]), 278: (4, [60_000])}
    assert refusal(tiff(GREY, huge))[0] == "too_large_pixels"
    assert refusal(tiff(GREY, {279: (4, [10**6])}))[0] == "truncated"
    looped = bytearray(tiff(GREY, {}))
    at = 8 + GREY.size
    looped[at + 2 + 12 * 9 : at + 6 + 12 * 9] = struct.pack("<I", at)  # the directory names itself as the next one
    assert decode(bytes(looped), LIMITS).frames == 1


def test_files_are_told_from_images_by_name_or_content() -> None:
    for name in ("a.JPG", "b.heic", "c.tiff", "d.bmp"):
        assert claims_image(name)
    for kind in ("JPEG", "PNG", "BMP", "TIFF", "AVIF"):
        assert picture_kind(encoded(PHOTO, kind)[:HEAD]) == kind
    assert picture_kind(b"\0\0\0\x0cJXL \r\n\x87\n") == "JPEG XL"
    for name, start in (("a.txt", b"a caption"), ("README.md", b"# card"), ("shard.tar", b"a.jpg" + bytes(250))):
        assert not claims_image(name) and picture_kind(start) is None


def test_a_turned_panorama_of_64_megapixels_gets_its_view_within_the_memory_of_the_sandbox() -> None:
    small = Image.fromarray(photo(3, (491, 2047)))
    exif = Image.Exif()
    exif[0x0112] = 6
    large = np.asarray(small.resize((16_382, 3_932), Image.Resampling.BILINEAR))
    found = sandbox.decode(encoded(large, "JPEG", quality=80, exif=exif.tobytes()), LIMITS, OPENAI_VIEW)
    assert (found.width, found.height) == (3_932, 16_382)
    expected = images.views(np.array(small.transpose(Image.Transpose.ROTATE_270)), OPENAI_VIEW).astype(int)
    assert np.abs(found.rgb - expected).mean() < 2


def test_the_decoders_of_the_sandbox_use_one_thread() -> None:
    from PIL import AvifImagePlugin

    assert AvifImagePlugin.DEFAULT_MAX_THREADS == 1
    if "pillow_heif" in sys.modules:
        assert sys.modules["pillow_heif"].options.DECODE_THREADS == 1
    assert sniff(encoded(PHOTO, "AVIF")) == "AVIF"
