"""Any picture file becomes an image of a world or one clear sentence, and a strange one is called strange."""

import struct
import zlib

import numpy as np
import pytest
import torch
from diffclass import data
from diffclass.data import pictures
from PIL import Image

GREY = (1, 8, 8)
COLOUR = (3, 32, 32)


@pytest.fixture(scope="module")
def digits():
    return data.digits()


def save(tmp_path, array, name="picture.png", **options):
    path = tmp_path / name
    Image.fromarray(np.asarray(array, dtype=np.uint8)).save(path, **options)
    return path


def quarters(height=64, width=64):
    """Red, green, blue and white quarters: top left, top right, bottom left, bottom right."""
    array = np.zeros((height, width, 3), np.uint8)
    h = height // 2
    w = width // 2
    array[:h, :w, 0] = array[:h, w:, 1] = array[h:, :w, 2] = 255
    array[h:, w:] = 255
    return array


def corners(image):
    """The colours at the four corners of [1,3,H,W], in reading order, as 0/1."""
    return [image[0, :, i, j].round().int().tolist() for i in (1, -2) for j in (1, -2)]


RED = [1, 0, 0]
GREEN = [0, 1, 0]
BLUE = [0, 0, 1]
WHITE = [1, 1, 1]


# ---------------------------------------------------------------------------------------------------------------------
# Good pictures


@pytest.mark.parametrize(
    "name, options", [("a.png", {}), ("a.jpg", dict(quality=95)), ("a.webp", dict(lossless=True))]
)
def test_formats(tmp_path, name, options):
    image = pictures.load_picture(save(tmp_path, quarters(), name, **options), COLOUR)
    assert image.shape == (1, *COLOUR) and image.dtype == torch.float32
    assert (
        0 <= float(image.min())
        and float(image.max()) <= 1
        and corners(image) == [RED, GREEN, BLUE, WHITE]
    )


def test_same_size_is_exact(tmp_path):
    array = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    image = pictures.load_picture(save(tmp_path, array), COLOUR)
    assert torch.equal(image[0], torch.from_numpy(array).permute(2, 0, 1).float() / 255)


@pytest.mark.parametrize(
    "orientation, expected",
    [
        (1, [RED, GREEN, BLUE, WHITE]),
        (3, [WHITE, BLUE, GREEN, RED]),
        (6, [BLUE, RED, WHITE, GREEN]),
        (8, [GREEN, WHITE, RED, BLUE]),
    ],
)
def test_exif_orientation_is_honoured(tmp_path, orientation, expected):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(tmp_path, quarters(), "turned.jpg", exif=exif, quality=95)
    assert corners(pictures.load_picture(path, COLOUR)) == expected


@pytest.mark.parametrize("height, width", [(64, 200), (200, 64)])
def test_the_middle_square_is_kept(tmp_path, height, width):
    array = np.zeros((height, width, 3), np.uint8)
    top = (height - 64) // 2
    left = (width - 64) // 2
    array[top : top + 64, left : left + 64] = quarters()
    assert corners(pictures.load_picture(save(tmp_path, array), COLOUR)) == [
        RED,
        GREEN,
        BLUE,
        WHITE,
    ]


def test_resizing_averages(tmp_path):
    """A one-pixel checkerboard becomes grey: picking pixels instead would give black or white."""
    board = np.indices((256, 256)).sum(0) % 2 * 255
    image = pictures.load_picture(save(tmp_path, board), (3, 16, 16))
    assert float((image - 0.5).abs().max()) < 0.02


@pytest.mark.parametrize("alpha, expected", [(0, 1.0), (255, 0.0), (128, 1 - 128 / 255)])
def test_transparency_is_over_white(tmp_path, alpha, expected):
    array = np.zeros((32, 32, 4), np.uint8)
    array[..., 3] = alpha
    image = pictures.load_picture(save(tmp_path, array), COLOUR)
    assert torch.allclose(image, torch.full_like(image, expected), atol=0.005)


def test_transparent_palette_and_sixteen_bits(tmp_path):
    palette = Image.new("P", (32, 32), 0)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    palette.save(tmp_path / "palette.png", transparency=0)
    assert float(pictures.load_picture(tmp_path / "palette.png", COLOUR).min()) == 1
    Image.fromarray(np.full((32, 32), 32896, np.uint16)).save(tmp_path / "deep.png")
    assert torch.allclose(
        pictures.load_picture(tmp_path / "deep.png", COLOUR), torch.tensor(128 / 255)
    )


def png(path, bits, samples, clear):
    """A PNG of 8 equal rows of 8 pixels, grey or in colours, in which one value is declared transparent (tRNS).

    Shapes      samples: 8 numbers, or 8 triples of them, each of `bits` bits; clear: a number or a triple
    """

    def chunk(kind, content):
        checksum = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)

    flat = np.ravel(samples)
    together = "".join(f"{value:0{bits}b}" for value in flat)
    row = int(together, 2).to_bytes(len(together) // 8, "big")
    colour_type = 2 if np.ndim(clear) else 0
    head = struct.pack(">IIBBBBB", 8, 8, bits, colour_type, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"tRNS", b"".join(struct.pack(">H", value) for value in np.ravel(clear)))
        + chunk(b"IDAT", zlib.compress(8 * (b"\0" + row)))
        + chunk(b"IEND", b"")
    )
    return path


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_a_transparent_value_is_over_white_whatever_the_bits(tmp_path, bits):
    """The declared value counts in the bits of the file; what it does not name stays."""
    largest = 2**bits - 1
    path = png(tmp_path / "clear.png", bits, [0] * 4 + [largest] * 4, 0)
    image = pictures.load_picture(path, (3, 8, 8))
    assert torch.equal(image, torch.ones_like(image)), "black is transparent, so all is white"
    path = png(tmp_path / "kept.png", bits, [largest] * 4 + [0] * 4, largest)
    image = pictures.load_picture(path, (3, 8, 8))
    assert torch.equal(image[..., :4], torch.ones(1, 3, 8, 4)) and float(image[..., 4:].max()) == 0


@pytest.mark.parametrize("bits", [8, 16])
def test_a_transparent_colour_is_over_white_whatever_the_bits(tmp_path, bits):
    unit = (2**bits - 1) // 255
    clear = (200 * unit, 100 * unit, 30 * unit)
    path = png(tmp_path / "colour.png", bits, [clear] * 4 + [(0, 0, 0)] * 4, clear)
    image = pictures.load_picture(path, (3, 8, 8))
    assert torch.equal(image[..., :4], torch.ones(1, 3, 8, 4)) and float(image[..., 4:].max()) == 0


def test_colour_becomes_grey(tmp_path):
    array = np.full((32, 32, 3), (255, 0, 0), np.uint8)
    image = pictures.load_picture(save(tmp_path, array), GREY, invert=False)
    assert image.shape == (1, *GREY) and torch.allclose(image, torch.tensor(0.299), atol=0.003)


# ---------------------------------------------------------------------------------------------------------------------
# Ink


def test_every_digit_is_recognised_on_paper_and_on_black(digits):
    grey = digits.train_images[:, 0].numpy()
    assert not any(map(pictures.is_dark_ink, grey))
    assert all(
        map(pictures.is_dark_ink, 0.1 + 0.35 * (1 - grey))
    )  # a dull photograph of dark ink on paper


def test_ink_polarity(tmp_path, digits):
    digit = digits.test_images[:1]
    big = np.kron((digit[0, 0] * 255).round().byte().numpy(), np.ones((20, 20), np.uint8))
    paper = save(tmp_path, 255 - big, "paper.png")
    black = save(tmp_path, big, "black.png")
    for path, invert in ((paper, "auto"), (black, "auto"), (paper, True), (black, False)):
        assert float((pictures.load_picture(path, GREY, invert) - digit).abs().max()) < 0.005
    assert float((pictures.load_picture(paper, GREY, False) - digit).abs().max()) > 0.8
    colour = pictures.load_picture(paper, COLOUR)
    assert float(colour[..., 0].mean()) > 0.9  # three channels: left as it is
    assert torch.allclose(pictures.load_picture(paper, COLOUR, True), 1 - colour)


# ---------------------------------------------------------------------------------------------------------------------
# Bad pictures


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp"])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.9])
def test_truncated_pictures_are_refused(tmp_path, name, share):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = save(tmp_path, noise, name)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=rf"expected .*picture, got {name} \(\d+ bytes\)"):
        pictures.load_picture(path, COLOUR)


def test_damaged_picture_is_refused(tmp_path):
    path = save(tmp_path, quarters())
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(ValueError, match="damaged or cut short"):
        pictures.load_picture(path, COLOUR)


@pytest.mark.parametrize("content", [b"", b"hello, this is text", b"%PDF-1.7 ...", b"GIF89a"])
def test_no_picture_is_refused(tmp_path, content):
    (tmp_path / "letter.png").write_bytes(content)
    with pytest.raises(ValueError, match="got letter.png"):
        pictures.load_picture(tmp_path / "letter.png", COLOUR)


def test_missing_picture_and_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        pictures.load_picture(tmp_path / "nothing.png", COLOUR)
    with pytest.raises(FileNotFoundError, match="a folder"):
        pictures.load_picture(tmp_path, COLOUR)


@pytest.mark.parametrize(
    "limit", [3000, 1000]
)  # of 4096 pixels: Pillow warns above the limit, raises above twice it
def test_decompression_bomb_is_refused(tmp_path, monkeypatch, limit):
    path = save(tmp_path, quarters())
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(ValueError, match=f"at most {limit} pixels"):
        pictures.load_picture(path, COLOUR)


@pytest.mark.parametrize(
    "arguments", [dict(image_shape=(2, 1, 1)), dict(image_shape=GREY, invert="yes")]
)
def test_wrong_arguments_are_refused(tmp_path, arguments):
    with pytest.raises(ValueError, match="expected"):
        pictures.load_picture(save(tmp_path, quarters()), **arguments)


# ---------------------------------------------------------------------------------------------------------------------
# Familiarity


def test_report_equals_brute_force(digits):
    train = digits.train_images[:60].double()
    picture = digits.test_images[:1].double()
    report = pictures.distance_report(picture, train)
    pairs = (train[:, None] - train[None]).flatten(2).norm(dim=2).fill_diagonal_(torch.inf).amin(1)
    nearest = float((train - picture).flatten(1).norm(dim=1).min())
    assert report.distance == pytest.approx(nearest, abs=1e-9)
    assert report.percentile == pytest.approx(100 * float((pairs < nearest).double().mean()))


def test_duplicates_are_each_others_neighbours():
    train = torch.rand(20, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    doubled = torch.cat([train, train])
    report = pictures.distance_report(train[:1], doubled)
    assert report.distance == 0 and report.percentile == 0 and not report.far


def test_test_digits_are_near_and_strange_pictures_far(digits, generator):
    reports = [
        pictures.distance_report(image[None], digits.train_images)
        for image in digits.test_images[:40]
    ]
    assert sum(report.far for report in reports) <= 3
    strange = [
        torch.rand(1, 1, 8, 8, generator=generator),
        torch.ones(1, 1, 8, 8),
        1 - digits.test_images[:1],
    ]
    for image in strange:
        report = pictures.distance_report(image, digits.train_images)
        assert (
            report.far and report.percentile > 99 and "unlike the training data" in report.sentence
        )
    assert (
        "unlike" not in reports[0].sentence and f"{reports[0].distance:.2f}" in reports[0].sentence
    )


def test_report_refuses_what_it_cannot_compare(digits):
    one = digits.test_images[:1]
    train = digits.train_images
    for picture, others in (
        (digits.test_images[:2], train),
        (one, train[:1]),
        (one.expand(1, 3, 8, 8), train),
        (2 * one, train),
    ):
        with pytest.raises(ValueError, match="expected"):
            pictures.distance_report(picture, others)
