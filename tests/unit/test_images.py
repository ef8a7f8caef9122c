"""Colours, orientations and limits of `images.decode`, and both views, compared with numpy, Pillow and open_clip."""

import hashlib
import io
import resource
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torchvision.transforms import Compose

from clipflow_ray.config import OPENAI_VIEW, ImageLimits, ViewSpec
from clipflow_ray.errors import ITEM_CODES, ImageError
from clipflow_ray.images import DecodedImage, by_size, decode, stratum, view, views
from tests.conftest import photo

pytestmark = [
    pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:PIL"),
]
LIMITS = ImageLimits()
INT32_MAX = 2**31 - 1
NOISE = np.random.default_rng(0).integers(0, 256, (80, 96, 3), dtype=np.uint8)
SMOOTH = np.full((80, 96, 3), 90.0)
SMOOTH[..., 0], SMOOTH[..., 1] = np.meshgrid(np.linspace(40, 215, 96), np.linspace(215, 40, 80))
SMOOTH = SMOOTH.astype(np.uint8)  # low frequencies only, which JPEG preserves


def encoded(pixels: np.ndarray | Image.Image, image_format: str, **options: object) -> bytes:
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def refusal(data: bytes, limits: ImageLimits = LIMITS) -> str:
    with pytest.raises(ImageError) as caught:
        decode(data, limits)
    assert caught.value.item_code in ITEM_CODES
    return caught.value.item_code


def on_white(rgb: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    share = alpha[..., None] / 255.0
    return rgb * share + 255.0 * (1.0 - share)


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(
    samples: np.ndarray, depth: int, colour: int, *, size: tuple[int, int], before: bytes = b"", after: bytes = b""
) -> bytes:
    """A PNG written by hand from big-endian rows of `samples`, with extra chunks around its data."""
    rows = b"".join(b"\0" + row.tobytes() for row in samples)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", *size, depth, colour, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + header + before + data + after + chunk(b"IEND", b"")


def exif(orientation: int, *, order: str = "<", more: tuple[bytes, ...] = ()) -> bytes:
    """An EXIF block written by hand: the orientation tag, then raw 12-byte directory entries."""
    entries = (struct.pack(order + "HHIHH", 0x0112, 3, 1, orientation, 0), *more)
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "IH", 8, len(entries))
    return b"Exif\0\0" + head + b"".join(entries) + b"\0\0\0\0"


def around_last_scan(data: bytes) -> tuple[bytes, bytes, bytes]:
    """The bytes before the last scan of a JPEG, that scan, and the end marker. FFDA never occurs inside a scan."""
    place = data.rindex(b"\xff\xda")
    return data[:place], data[place:-2], data[-2:]


SAMPLES = {
    "JPEG": encoded(SMOOTH, "JPEG", quality=95),
    "progressive": encoded(NOISE, "JPEG", quality=95, progressive=True),
    "PNG": encoded(NOISE, "PNG"),
    "WEBP": encoded(NOISE, "WEBP", lossless=True),
    "GIF": encoded(NOISE, "GIF", save_all=True, append_images=[Image.fromarray(NOISE[::-1])]),
    "TIFF": encoded(NOISE, "TIFF"),
    "deflated TIFF": encoded(NOISE, "TIFF", compression="tiff_adobe_deflate"),
    "BMP": encoded(NOISE, "BMP"),
    "AVIF": encoded(SMOOTH, "AVIF", speed=10),
}


@pytest.mark.parametrize(
    ("image_format", "tolerance"), [("JPEG", 6), ("PNG", 0), ("WEBP", 0), ("GIF", 0), ("TIFF", 0), ("BMP", 0)]
)
def test_each_format_decodes_to_the_pixels_that_were_saved(image_format: str, tolerance: int) -> None:
    levels = SMOOTH // 64 * 64 if image_format == "GIF" else SMOOTH  # a GIF holds 256 colours
    image = decode(encoded(levels, image_format, **({"lossless": True} if image_format == "WEBP" else {})), LIMITS)
    assert (image.format, image.width, image.height, image.frames) == (image_format, 96, 80, 1)
    assert image.rgb.dtype == np.uint8
    np.testing.assert_allclose(image.rgb.astype(int), levels.astype(int), atol=tolerance)


def as_stored(upright: np.ndarray, orientation: int) -> np.ndarray:
    """The pixels as a file with this EXIF orientation stores them: quarter turns, then a left-right mirror."""
    turns, mirrored = [(0, 0), (0, 1), (2, 0), (2, 1), (3, 1), (1, 0), (1, 1), (3, 0)][orientation - 1]
    turned = np.rot90(upright, turns)
    return np.ascontiguousarray(turned[:, ::-1] if mirrored else turned)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(("image_format", "tolerance"), [("PNG", 0), ("WEBP", 0), ("TIFF", 0), ("JPEG", 6)])
def test_all_eight_rotated_copies_decode_to_the_same_upright_pixels(
    image_format: str, tolerance: int, orientation: int
) -> None:
    upright = NOISE if tolerance == 0 else SMOOTH
    options: dict[str, dict[str, Any]] = {"JPEG": {"quality": 95}, "WEBP": {"lossless": True}, "PNG": {}, "TIFF": {}}
    for order in "<>":
        stored = as_stored(upright, orientation)
        image = decode(
            encoded(stored, image_format, exif=exif(orientation, order=order), **options[image_format]), LIMITS
        )
        assert image.has_exif or image_format == "TIFF"  # a TIFF has the orientation among its own tags
        assert (image.width, image.height) == (96, 80)
        np.testing.assert_allclose(image.rgb.astype(int), upright.astype(int), atol=tolerance)


@pytest.mark.parametrize("block", [exif(0), exif(9), exif(65535), b"Exif\0\0" + NOISE.tobytes()[:500], exif(6)[:20]])
@pytest.mark.parametrize("image_format", ["PNG", "JPEG"])
def test_an_invalid_orientation_is_ignored(image_format: str, block: bytes) -> None:
    stored = np.asarray(Image.open(io.BytesIO(encoded(SMOOTH, image_format))))
    assert np.array_equal(decode(encoded(SMOOTH, image_format, exif=block), LIMITS).rgb, stored)


def test_a_valid_orientation_counts_even_beside_a_broken_tag() -> None:
    broken_gps = struct.pack("<HHIBBBB", 0x8825, 6, 1, 0x8E, 0x96, 0x3F, 0xE0)
    data = encoded(as_stored(NOISE, 6), "PNG", exif=exif(6, more=(broken_gps,)))
    assert np.array_equal(decode(data, LIMITS).rgb, NOISE)


def test_exif_is_found_before_and_after_the_pixels_of_a_png() -> None:
    block = chunk(b"eXIf", exif(3)[6:])
    for place in ({"before": block}, {"after": block}):
        image = decode(png(NOISE.reshape(80, -1), 8, 2, size=(96, 80), **place), LIMITS)
        assert np.array_equal(image.rgb, NOISE[::-1, ::-1])
        assert image.has_exif
    assert not decode(SAMPLES["PNG"], LIMITS).has_exif


def test_cmyk_jpeg_follows_the_plain_formula() -> None:
    inks = np.concatenate([SMOOTH, SMOOTH[..., :1] // 2], 2)
    data = encoded(Image.frombytes("CMYK", (96, 80), inks.tobytes()), "JPEG", quality=100)
    image = decode(data, LIMITS)
    assert image.mode == "CMYK"
    for source, tolerance in ((np.asarray(Image.open(io.BytesIO(data))), 2), (inks, 6)):
        paper = 1.0 - source / 255.0
        np.testing.assert_allclose(image.rgb, 255.0 * paper[..., :3] * paper[..., 3:], atol=tolerance)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "P+alpha", "P+tRNS", "RGBA"])
def test_every_png_mode_is_composited_on_white(mode: str) -> None:
    """The colour of fully transparent pixels must not be visible."""
    alpha, opaque = np.tile(np.linspace(0, 255, 96).astype(np.uint8), (80, 1)), np.full((80, 96), 255)
    grey, index, palette = NOISE[..., 0], NOISE[..., 1] % 64, NOISE[0, :64]
    bits, triple = grey > 99, np.repeat(grey[..., None], 3, 2)
    indexed = Image.frombytes("P", (96, 80), index.tobytes())
    indexed.putpalette(palette.tobytes())
    cases: dict[str, tuple[Any, np.ndarray, np.ndarray, dict[str, Any]]] = {
        "1": (bits, np.repeat(bits[..., None] * 255, 3, 2), opaque, {}),
        "L": (grey, triple, opaque, {}),
        "LA": (np.dstack([grey, alpha]), triple, alpha, {}),
        "P": (indexed, palette[index], opaque, {}),
        "P+alpha": (indexed, palette[index], index * 4, {"transparency": bytes(range(0, 256, 4))}),
        "P+tRNS": (indexed, palette[index], np.where(index == 5, 0, 255), {"transparency": 5}),
        "RGBA": (np.dstack([NOISE, alpha]), NOISE, alpha, {}),
    }
    saved, rgb, shown, options = cases[mode]
    image = decode(encoded(saved, "PNG", **options), LIMITS)
    assert image.mode == mode.split("+")[0]
    np.testing.assert_allclose(image.rgb, on_white(rgb, shown), atol=1)


@pytest.mark.parametrize("colour", [0, 2, 4, 6])
def test_sixteen_bit_png_is_scaled_and_not_clipped(colour: int) -> None:
    channels = {0: 1, 2: 3, 4: 2, 6: 4}[colour]
    ramp = np.tile(np.round(np.linspace(0, 65535, 256)).astype(">u2")[None, :, None], (64, 1, channels))
    if colour in (4, 6):
        ramp[..., -1] = 65535
    image = decode(png(ramp.reshape(64, -1), 16, colour, size=(256, 64)), LIMITS)
    grey = ramp[..., :1].astype(float) * 255 / 65535
    np.testing.assert_allclose(image.rgb, np.broadcast_to(grey, image.rgb.shape), atol=2)
    assert abs(image.rgb.mean() - 127.5) <= 1


@pytest.mark.parametrize("depth", [4, 8, 16])
def test_the_transparent_grey_of_a_png_is_white_at_every_depth(depth: int) -> None:
    level = {4: 0x5, 8: 0x55, 16: 0x5555}[depth]
    rows = np.full((64, 64 * depth // 8), 0x55, np.uint8)
    transparent = png(rows, depth, 0, size=(64, 64), before=chunk(b"tRNS", struct.pack(">H", level)))
    assert np.all(decode(png(rows, depth, 0, size=(64, 64)), LIMITS).rgb == 0x55)
    assert np.all(decode(transparent, LIMITS).rgb == 255)


@pytest.mark.parametrize(("kind", "expected"), [("MPO", "JPEG"), ("GIF", "GIF"), ("PNG", "PNG"), ("WEBP", "WEBP")])
def test_the_first_frame_is_scored_and_frames_are_counted(kind: str, expected: str) -> None:
    first = SMOOTH // 64 * 64 if kind == "GIF" else SMOOTH
    more = [Image.fromarray(255 - first), Image.fromarray(first[::-1].copy())]
    options: dict[str, dict[str, Any]] = {"WEBP": {"lossless": True}, "MPO": {"quality": 95}}
    image = decode(encoded(first, kind, save_all=True, append_images=more, **options.get(kind, {})), LIMITS)
    assert (image.format, image.frames) == (expected, 3)
    np.testing.assert_allclose(image.rgb.astype(int), first.astype(int), atol=6 if kind == "MPO" else 0)


def test_a_png_that_claims_billions_of_frames_still_fits_the_ledger() -> None:
    control = chunk(b"acTL", struct.pack(">II", 2**31, 0))
    assert decode(png(NOISE.reshape(80, -1), 8, 2, size=(96, 80), before=control), LIMITS).frames <= INT32_MAX


@pytest.mark.parametrize(
    "options",
    [
        {"subsampling": 0},
        {"subsampling": 1},
        {"subsampling": 2},
        {"subsampling": "4:1:1"},
        {"progressive": True},
        {"optimize": True, "quality": 30},
        {"restart_marker_blocks": 5},
        {"keep_rgb": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("size", [(32, 33), (97, 61), (240, 320)])
def test_jpegs_decode_to_exactly_the_pixels_of_pillow(
    mode: str, size: tuple[int, int], options: dict[str, Any]
) -> None:
    buffer = io.BytesIO()
    Image.fromarray(photo(3, size)).convert(mode).save(buffer, "JPEG", **options)
    np.testing.assert_array_equal(decode(buffer.getvalue(), LIMITS).rgb, np.asarray(Image.open(buffer).convert("RGB")))


def test_damaged_jpegs_decode_to_exactly_the_pixels_of_pillow_or_are_refused() -> None:
    data, rng, same = encoded(photo(4, (96, 128)), "JPEG", quality=85), np.random.default_rng(0), 0
    for _ in range(300):
        broken = bytearray(data)
        broken[int(rng.integers(len(data) // 4, len(data)))] ^= 1 << int(rng.integers(8))
        try:
            ours = decode(bytes(broken), LIMITS)
        except ImageError:
            continue
        np.testing.assert_array_equal(ours.rgb, np.asarray(Image.open(io.BytesIO(broken)).convert("RGB")))
        same += 1
    assert same > 200


@pytest.mark.parametrize("quality", [50, 60, 70, 75, 80, 85, 90, 95])
def test_jpeg_quality_is_estimated_within_two(quality: int) -> None:
    estimate = decode(encoded(NOISE, "JPEG", quality=quality), LIMITS).jpeg_quality
    assert estimate is not None
    assert abs(estimate - quality) <= 2
    assert decode(SAMPLES["PNG"], LIMITS).jpeg_quality is None


REFUSED = {
    "text": b"hello " * 99,
    "html": b"<!doctype html><img src=x>",
    "svg": b'<svg xmlns="http://www.w3.org/2000/svg"/>',
    "pdf": b"%PDF-1.7\n1 0 obj",
    "zip": b"PK\x03\x04" + bytes(99),
    "bm_text": b"BM is the start of this text" * 9,
    "mp4": b"\0\0\0\x20ftypisom" + bytes(99),
    "riff_audio": b"RIFF\x24\0\0\0WAVEfmt ",
}


@pytest.mark.parametrize("kind", REFUSED)
def test_other_file_types_are_refused_as_unsupported(kind: str) -> None:
    assert refusal(REFUSED[kind]) == "unsupported_format"


def test_byte_and_side_limits_are_exact() -> None:
    data = SAMPLES["PNG"]
    assert refusal(b"") == "empty"
    assert refusal(data, ImageLimits(max_bytes=len(data) - 1)) == "too_large_bytes"
    assert refusal(data, ImageLimits(max_pixels=96 * 80 - 1)) == "too_large_pixels"
    assert refusal(data, ImageLimits(max_side=95)) == "too_large_pixels"
    assert refusal(data, ImageLimits(min_side=81)) == "too_small"
    exact = ImageLimits(max_bytes=len(data), max_pixels=96 * 80, max_side=96, min_side=80)
    assert np.array_equal(decode(data, exact).rgb, NOISE)


@pytest.mark.parametrize("side", [11_900, 13_000, 2**31 - 1])
def test_a_pixel_bomb_is_refused_before_its_pixels_take_memory(side: int) -> None:
    """A black bilevel square, valid if `side` is below 20,000. Decoding it would take `side` squared bytes."""
    rows = np.zeros((side, (side + 7) // 8), np.uint8) if side < 20_000 else np.zeros((1, 8), np.uint8)
    bomb = png(rows, 1, 0, size=(side, side))
    del rows
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert refusal(bomb) == "too_large_pixels"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20 * 1024


def test_a_jpeg_scan_bomb_is_refused() -> None:
    start, last, end = around_last_scan(SAMPLES["progressive"])
    assert decode(start + last * 80 + end, LIMITS).width == 96
    assert refusal(start + last * 101 + end) == "decode_failed"


def test_scans_hidden_behind_a_stuffed_zero_are_refused_too() -> None:
    """libjpeg skips 0xFF00 between segments. Code that took it for a segment would not count the scans behind it."""
    start, last, end = around_last_scan(encoded(SMOOTH, "JPEG", quality=60, progressive=True))
    hidden = last * 200
    comment, stuffed = b"\xff\xfe\x00\x02", b"\xff\x00" + struct.pack(">H", len(hidden) + 2)
    assert refusal(start + comment + stuffed + hidden + last + end) in {"decode_failed", "truncated"}


@pytest.mark.parametrize("kind", SAMPLES)
def test_a_truncated_file_is_always_refused(kind: str) -> None:
    data = SAMPLES[kind]
    for end in {*range(0, len(data), max(1, len(data) // 100)), *range(1, 16), len(data) - 1}:
        recognised = 18 if kind == "BMP" else 12
        allowed = {"truncated"} if end >= recognised else {"truncated", "unsupported_format", "empty"}
        assert refusal(data[:end]) in allowed, end


def test_a_png_with_a_wrong_checksum_is_refused() -> None:
    data = bytearray(SAMPLES["PNG"])
    data[-13] ^= 1  # the last byte of the last IDAT's checksum
    assert refusal(bytes(data)) == "decode_failed"


def decoded_or_refused(data: bytes) -> DecodedImage | None:
    try:
        image = decode(data, LIMITS)
    except ImageError as error:
        assert error.item_code in ITEM_CODES
        return None
    assert image.rgb.shape == (image.height, image.width, 3)
    assert 1 <= image.frames <= INT32_MAX
    return image


MAGIC = [
    b"II*\0\x08\0\0\0",
    b"MM\0*\0\0\0\x08",
    b"BM" + bytes(12) + b"\x28\0\0\0",
    b"\0\0\0\x10ftypavif",
    b"\xff\xd8\xff",
    b"\x89PNG\r\n\x1a\n",
    b"RIFF\x40\0\0\0WEBP",
    b"GIF89a",
    b"GIF87a",
]


@settings(max_examples=50, deadline=None)
@given(st.sampled_from(MAGIC), st.binary(max_size=400))
def test_random_bytes_behind_a_magic_number_only_raise_image_errors(magic: bytes, rest: bytes) -> None:
    decoded_or_refused(magic + rest)


@settings(max_examples=50, deadline=None)
@given(st.sampled_from(sorted(SAMPLES)), st.lists(st.tuples(st.floats(0, 0.999), st.integers(1, 255)), min_size=1))
def test_flipped_bits_only_raise_image_errors(kind: str, flips: list[tuple[float, int]]) -> None:
    data = bytearray(SAMPLES[kind])
    for place, bits in flips:
        data[int(place * len(data))] ^= bits
    decoded_or_refused(bytes(data))


def spec(**changes: object) -> ViewSpec:
    return ViewSpec.model_validate({**OPENAI_VIEW.model_dump(), **changes})


def open_clips(rgb: np.ndarray, wanted: ViewSpec) -> np.ndarray:
    """The pixels that open_clip's own evaluation transform feeds to its normalisation, in 0..255."""
    own = wanted.model_dump(exclude={"kind", "sizes"}) | {"size": wanted.sizes[0]}
    whole = image_transform_v2(PreprocessCfg(**own), is_train=False)
    return np.asarray(Compose(whole.transforms[:-1])(Image.fromarray(rgb)).permute(1, 2, 0)) * 255


@pytest.mark.parametrize("resize_mode", ["shortest", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [224, 256, 336, 384])
@pytest.mark.parametrize(("width", "height"), [(640, 480), (300, 900), (2000, 1500), (150, 400), (224, 224)])
def test_the_resize_view_of_a_photograph_equals_open_clips_within_one_grey_level(
    width: int, height: int, size: int, interpolation: str, resize_mode: str
) -> None:
    wanted = spec(sizes=(size,), interpolation=interpolation, resize_mode=resize_mode)
    rgb = photo(7, (height, width))
    actual = view(rgb, wanted, size)
    assert actual.shape == (size, size, 3) and actual.dtype == np.uint8
    np.testing.assert_allclose(actual, open_clips(rgb, wanted), atol=1.001)


@settings(max_examples=40, deadline=None)
@given(st.integers(32, 700), st.integers(32, 700), st.integers(0, 9))
def test_the_resize_view_of_pure_noise_equals_open_clips_except_at_few_values(
    width: int, height: int, seed: int
) -> None:
    rgb = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    expected = open_clips(rgb, OPENAI_VIEW)
    for kind in ("resize", "crop") if min(width, height) < 224 else ("resize",):
        actual = view(rgb, spec(kind=kind), 224)
        assert actual.shape == (224, 224, 3) and actual.dtype == np.uint8
        difference = np.abs(actual - expected)
        assert difference.max() <= 2 and (difference > 1.5).mean() < 1e-4


@pytest.mark.parametrize(
    ("width", "height", "left", "top", "size"),
    [(224, 224, 0, 0, 224), (500, 300, 138, 38, 224), (224, 624, 0, 200, 224), (500, 400, 58, 8, 384)],
)
@pytest.mark.parametrize("resize_mode", ["shortest", "squash"])
def test_the_crop_view_is_the_native_centre(
    width: int, height: int, left: int, top: int, size: int, resize_mode: str
) -> None:
    rgb = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    centre = view(rgb, spec(kind="crop", resize_mode=resize_mode), size)
    assert np.array_equal(centre, rgb[top : top + size, left : left + size])


def test_the_views_of_the_packaged_checkpoint_are_those_of_earlier_releases() -> None:
    rng = np.random.default_rng(0)
    noise = [rng.integers(0, 256, (*size, 3), np.uint8) for size in ((640, 480), (300, 900), (1500, 1100), (150, 400))]
    together = b"".join(views(rgb, OPENAI_VIEW).tobytes() for rgb in noise)
    assert hashlib.sha256(together).hexdigest() == "fc2b43c6c2b32dd607928228e7d31d70312f49f451dff6a119d5937bde552728"


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 90), min_size=1, max_size=3, unique=True),
    shapes=st.lists(st.tuples(st.integers(1, 120), st.integers(1, 120)), min_size=1, max_size=3),
    kind=st.sampled_from(["resize", "crop"]),
)
def test_the_views_of_several_sizes_are_packed_and_unpacked_to_the_bit(
    sizes: list[int], shapes: list[tuple[int, int]], kind: str
) -> None:
    wanted = spec(sizes=sizes, kind=kind)
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (*shape, 3), dtype=np.uint8) for shape in shapes]
    packed = np.stack([views(rgb, wanted) for rgb in images])
    assert packed.shape == (len(images), wanted.bytes) and packed.dtype == np.uint8
    for size, of_size in zip(sizes, by_size(packed, wanted.sizes), strict=True):
        np.testing.assert_array_equal(of_size, np.stack([view(rgb, wanted, size) for rgb in images]))


@pytest.mark.parametrize(
    ("long_side", "size_class"),
    [(1, "0-256"), (255, "0-256"), (256, "256-512"), (512, "512-1024"), (2047, "1024-2048"), (2048, "2048-")],
)
def test_a_stratum_is_named_by_format_and_long_side(long_side: int, size_class: str) -> None:
    assert stratum("JPEG", long_side, 1) == stratum("JPEG", 1, long_side) == f"jpeg|{size_class}"
