"""The two spaces and their one map, and every sentence that a wrong image, level or budget is answered with."""

import math

import pytest
import torch
import twins
from diffclass import units

IMAGES = torch.rand(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))


@twins.rejected(
    {
        "sigma not doubled": dict(sigma_to_model=lambda sigma: sigma),
        "sigma halved": dict(sigma_to_model=units.sigma_to_pixel),
        "images not shifted": dict(to_model=lambda x: 2 * x),
    }
)
def test_lengths_double(to_model=units.to_model, sigma_to_model=units.sigma_to_model):
    """A perturbation of length s in pixels has length `sigma_to_model(s)` in model space; 0 and 1 become -1 and 1."""
    step = torch.full_like(IMAGES, 0.25 / math.sqrt(IMAGES[0].numel()))  # length 0.25
    moved = (to_model(IMAGES + step) - to_model(IMAGES)).flatten(1).norm(dim=1)
    assert torch.allclose(moved, torch.full((2,), float(sigma_to_model(0.25))), rtol=1e-5)
    assert to_model(torch.tensor([0.0, 0.5, 1.0])).tolist() == [-1.0, 0.0, 1.0]


def test_the_map_inverts():
    assert torch.allclose(units.to_pixel(units.to_model(IMAGES)), IMAGES, atol=1e-7)
    assert units.sigma_to_pixel(units.sigma_to_model(0.37)) == 0.37


def test_squared_errors_quadruple():
    other = IMAGES.flip(0)
    ratio = ((units.to_model(IMAGES) - units.to_model(other)) ** 2).sum() / (
        (IMAGES - other) ** 2
    ).sum()
    assert abs(float(ratio) - 4) < 1e-5


def test_norms_convert_as_on_cifar():
    """8/255 in L-inf is 1.739 in L2 on 3072 numbers; an L2 radius of 0.5 guarantees 2.3/255 in L-inf."""
    assert abs(units.l2_of_linf(8 / 255, 3072) - 1.739) < 5e-4
    assert abs(units.linf_of_l2(0.5, 3072) * 255 - 2.3) < 5e-3
    assert abs(units.linf_of_l2(units.l2_of_linf(0.03, 192), 192) - 0.03) < 1e-15


@pytest.mark.parametrize(
    "bad, error, sentence",
    [
        pytest.param(
            IMAGES.numpy(), TypeError, "expected images as a torch.Tensor, got ndarray", id="array"
        ),
        pytest.param(
            (IMAGES * 255).to(torch.uint8),
            TypeError,
            "got min .* dtype uint8; divide by 255",
            id="uint8",
        ),
        pytest.param(IMAGES.long(), TypeError, r"dtype int64; convert with \.float", id="int64"),
        pytest.param(IMAGES > 0.5, TypeError, "dtype bool; convert", id="bool"),
        pytest.param(
            IMAGES[0],
            ValueError,
            r"expected images of shape \[B,1,4,4\].*x\[None\]",
            id="no batch axis",
        ),
        pytest.param(
            IMAGES.repeat(1, 3, 1, 1),
            ValueError,
            r"\[B,1,4,4\], got .*\[2, 3, 4, 4\]",
            id="channels",
        ),
        pytest.param(
            IMAGES[:, :, :3],
            ValueError,
            "is this the world that the classifier was made for",
            id="size",
        ),
        pytest.param(
            IMAGES * math.nan, ValueError, "got 32 NaN or infinite values among 32", id="nan"
        ),
        pytest.param(IMAGES / 0, ValueError, "expected finite images", id="infinite"),
        pytest.param(IMAGES * 255, ValueError, r"look like \[0,255\]; divide by 255", id="0..255"),
        pytest.param(
            IMAGES * 2 - 1, ValueError, r"look like model space \[-1,1\]", id="model space"
        ),
        pytest.param(
            IMAGES + 0.5, ValueError, r"clamp the perturbed image to \[0,1\]", id="perturbed"
        ),
    ],
)
def test_wrong_images_get_a_sentence(bad, error, sentence):
    with pytest.raises(error, match=sentence):
        units.check_images(bad, (1, 4, 4))


def test_right_images_pass_unchanged():
    assert units.check_images(IMAGES, (1, 4, 4)) is IMAGES
    assert len(units.check_images(IMAGES[:0], (1, 4, 4))) == 0
    noisy = IMAGES * 9 - 4
    assert units.check_images(noisy, pixel_range=False) is noisy


@pytest.mark.parametrize(
    "bad, got",
    [
        (0, "got 0"),
        (-0.5, "got -0.5"),
        (math.nan, "got nan"),
        ([1.0, math.inf], "got inf"),
        ([0.1, math.nan], "got nan"),
        ([0.3, 0.0], "got 0"),
        ([], "got nothing"),
    ],
)
def test_noise_levels_must_be_positive_and_finite(bad, got):
    with pytest.raises(ValueError, match=f"expected a finite noise level sigma > 0, {got};"):
        units.check_sigma(bad)


@pytest.mark.parametrize(
    "epsilon, norm, sentence",
    [
        (8, "linf", "larger than the pixel range allows .*did you mean 8/255"),
        (60, "l2", "larger than the pixel range allows"),
        (-0.1, "linf", "expected an attack budget >= 0, got -0.1"),
        (math.nan, "l2", "expected an attack budget >= 0, got nan"),
        (0.1, "l1", "expected norm 'linf' or 'l2', got 'l1'"),
    ],
)
def test_impossible_budgets_get_a_sentence(epsilon, norm, sentence):
    with pytest.raises(ValueError, match=sentence):
        units.check_budget(epsilon, norm, 3072)


def test_possible_budgets_pass():
    assert units.check_budget(8 / 255, "linf", 3072) == 8 / 255
    assert units.check_budget(8, "l2", 3072) == 8.0


@pytest.mark.parametrize(
    "y, sentence",
    [
        (torch.tensor([0, 10]), "expected labels between 0 and 9, got 0 to 10; is this the world"),
        (torch.tensor([-1, 3]), "got -1 to 3"),
        (
            torch.tensor([1, 2, 3]),
            r"expected one label for each of 2 images as integers, got shape \[3\]",
        ),
        (torch.tensor([[1, 2]]), r"got shape \[1, 2\]"),
        (torch.tensor([1.0, 2.0]), "dtype float32"),
    ],
)
def test_wrong_labels_get_a_sentence(y, sentence):
    with pytest.raises(ValueError, match=sentence):
        units.check_labels(y, 2, 10)
