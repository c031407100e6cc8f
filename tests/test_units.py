"""The two spaces and their one map, and every sentence that a wrong image, level or budget is answered with."""

import math
import re

import numpy as np
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


PIXELS = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
PIXELS[0] = 0
PIXELS[1] = 1
CIFAR = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def normalised(mean, std):
    """What a data loader makes of pixels, channel by channel."""
    return (PIXELS - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


@pytest.mark.parametrize(
    "images, sentence",
    [
        (normalised(*CIFAR), r"normalised by a mean .* undo it with x \* std \+ mean"),
        (normalised(*IMAGENET), "normalised by a mean"),
        (normalised((0.1307,) * 3, (0.3081,) * 3), "normalised by a mean"),
        (normalised((0.5,) * 3, (0.5,) * 3), r"model space \[-1,1\]"),
        (normalised(CIFAR[0], (1.0,) * 3), "pixels less their mean, .*; add the mean"),
        (255 * normalised(CIFAR[0], (1.0,) * 3), r"\[0,255\] less a mean; add that mean, then"),
        (255 * PIXELS - torch.tensor([104.0, 117, 123])[:, None, None], r"\[0,255\] less a mean"),
        (normalised(*CIFAR) / 255, "these hardly vary, by .* were they divided by 255"),
        (65535 * PIXELS, "of 16 bits; divide by 65535"),
        (255 * PIXELS, r"look like \[0,255\]; divide by 255"),
        (2 * PIXELS - 1, r"model space \[-1,1\]"),
        ((2 * PIXELS.double() - 1) * (1 + 5e-7), r"model space \[-1,1\]"),
        (1.2 * PIXELS - 0.6, r"model space \[-1,1\]"),
        (1.3 * PIXELS - 0.4, r"model space \[-1,1\]"),
        (2.2 * PIXELS - 0.7, "normalised by a mean"),
        (18.5 * PIXELS - 9.5, "normalised by a mean"),
        (PIXELS + 0.03, r"clamp the perturbed image"),
        (PIXELS - 0.05, r"clamp the perturbed image"),
        (1.4 * PIXELS - 0.2, r"clamp the perturbed image"),
    ],
)
def test_the_hint_names_the_likely_cause_by_both_ends(images, sentence):
    """The maximum alone says "divide by 255" of normalised pictures, which makes them grey, step by step."""
    with pytest.raises(ValueError, match=sentence) as caught:
        units.check_images(images, (3, 8, 8))
    others = ("normalised by", "model space [-1,1]; pass", "divide by 255", "clamp the perturbed")
    assert sum(other in str(caught.value) for other in others) <= 1, "one cause, not several"


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
        (torch.tensor([1.0, 2.0]), r"dtype float32; pass y.long\(\) if they are whole numbers"),
        (torch.tensor([True, False]), r"dtype bool; .* pass y.long\(\) if true means class 1"),
        (torch.tensor([1, 2], dtype=torch.int32), r"dtype int32; pass y.long\(\)"),
        (torch.tensor([1, 2], dtype=torch.uint8), r"dtype uint8; pass y.long\(\)"),
        (torch.eye(10, dtype=torch.long)[:2], r"one-hot or of probabilities: pass y.argmax\(1\)"),
        (torch.full((2, 10), 0.1), r"pass y.argmax\(1\)"),
        (torch.tensor([[1], [2]]), r"pass y\[:, 0\]"),
        (torch.tensor([1, 10]), r"got 1 to 10; are they counted from 1\? Then pass y - 1"),
    ],
)
def test_wrong_labels_get_a_sentence(y, sentence):
    with pytest.raises(ValueError, match=sentence):
        units.check_labels(y, 2, 10)


@pytest.mark.parametrize("y", [[1, 2], IMAGES.numpy(), 3, None])
def test_labels_that_are_no_tensor_get_a_sentence(y):
    with pytest.raises(TypeError, match="expected labels as a torch.Tensor of dtype int64, got"):
        units.check_labels(y, 2, 10)


def test_right_labels_pass_unchanged():
    y = torch.tensor([0, 9])
    assert units.check_labels(y, 2, 10) is y


@pytest.mark.parametrize(
    "sigma, sentence",
    [
        (64, "at most 1, got 64; did you mean 64/255, or 32"),
        (
            1.5,
            "in pixels .* got 1.5; did you mean 1.5/255, or 0.75, half of a noise in model units",
        ),
        (0, "expected a finite noise level sigma_pixel > 0, got 0"),
        (math.nan, "got nan"),
        (torch.tensor([0.1, 0.2]), "expected one noise level sigma_pixel, got 2"),
    ],
)
def test_noise_on_pixels_that_cannot_be_meant_gets_a_sentence(sigma, sentence):
    with pytest.raises(ValueError, match=sentence):
        units.check_sigma_pixel(sigma)


def test_noise_on_pixels_passes():
    assert units.check_sigma_pixel(0.25) == 0.25 and units.check_sigma_pixel(1) == 1.0


@pytest.mark.parametrize(
    "step, sentence",
    [
        (0.0, "expected a step size > 0, got 0; a negative step would climb down, none at all"),
        (-2 / 255, "expected a step size > 0, got -0.00784"),
        (math.nan, "got nan"),
        (math.inf, "got inf"),
        (2.0, "across the whole budget of 0.0314, got 2; did you mean 2/255"),
        (0.1, r"at most 0.0627, .* got 0.1; did you mean 0.1/255"),
        (200.0, "got 200; is it in pixels"),
    ],
)
def test_steps_that_cannot_be_meant_get_a_sentence(step, sentence):
    with pytest.raises(ValueError, match=sentence):
        units.check_step_size(step, 8 / 255, 20)


def test_possible_steps_pass():
    assert units.check_step_size(2 / 255, 8 / 255, 20) == 2 / 255
    assert units.check_step_size(16 / 255, 8 / 255, 20) == 16 / 255, "across the whole budget"
    assert units.check_step_size(20 / 255, 8 / 255, 1) == 20 / 255, "the usual one of a single step"
    assert units.check_step_size(0.0, 0.0, 20) == 0, "a step of a budget of 0"
    with pytest.raises(ValueError, match="expected at least two classes, got 1"):
        units.check_class_count(1)


@pytest.mark.parametrize("value", [3, 3.0, np.int64(3), np.float32(3), torch.tensor(3), 10**30])
def test_whole_numbers_of_any_library_are_taken(value):
    taken = units.check_whole(value, "steps", least=1, most=None)
    assert type(taken) is int and taken == int(value)


@pytest.mark.parametrize(
    "value, error, sentence",
    [
        (1.5, ValueError, "expected steps as a whole number, got 1.5"),
        (math.inf, ValueError, "expected steps as a whole number, got inf"),
        (math.nan, ValueError, "expected steps as a whole number, got nan"),
        (0, ValueError, "expected steps as a whole number of at least 1, got 0"),
        (10**30, ValueError, "expected steps as a whole number of at most 10000000, got 10000"),
        ("3", TypeError, "expected steps as a number, got '3'"),
        (None, TypeError, "expected steps as a number, got None"),
        (1j, TypeError, "expected steps as a number, got 1j"),
        (torch.ones(2), TypeError, "expected steps as a number, got min 1 max 1 of shape"),
    ],
)
def test_what_is_no_whole_number_is_named(value, error, sentence):
    with pytest.raises(error, match=re.escape(sentence)):
        units.check_whole(value, "steps", least=1)


def test_lists_keep_their_precision_and_tensors_their_own():
    assert units.check_numbers([0.1], "shares").tolist() == [0.1]
    single = torch.tensor([0.1])
    assert units.check_numbers(single, "shares") is single
    for wrong in (["a"], [None], [True], [[1], [1, 2]], [1j], "x"):
        with pytest.raises(TypeError, match="expected shares as real numbers, got"):
            units.check_numbers(wrong, "shares")
    with pytest.raises(ValueError, match="got 1 NaN or infinite ones among 2"):
        units.check_numbers([0.1, math.inf], "shares")


READ_ONLY = np.arange(3.0)
READ_ONLY.flags.writeable = False
VIEWS = {
    "backwards": np.array([2.0, 1.0, 0.0])[::-1],
    "every other one, backwards": np.array([2, 9, 1, 9, 0], dtype=np.int16)[::-2],
    "another order of bytes": np.array([0.0, 1.0, 2.0]).astype(">f8"),
    "whole numbers in another order of bytes": np.array([0, 1, 2]).astype(">i4"),
    "extended precision": np.array([0.0, 1.0, 2.0], dtype=np.longdouble),
    "unsigned": np.array([0, 1, 2], dtype=np.uint64),
    "a column of a table": np.array([[0.0, 7.0], [1.0, 7.0], [2.0, 7.0]])[:, 0],
    "read-only": READ_ONLY,
    "broadcast": np.broadcast_to(np.arange(3.0), (2, 3))[1],
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
@pytest.mark.filterwarnings("error")
def test_every_array_of_real_numbers_is_read_whatever_its_memory_looks_like(view):
    for check in (units.check_numbers, units.check_reals):
        got = check(view, "shares")
        assert got.tolist() == [0.0, 1.0, 2.0]
        got += 1  # its own numbers: the caller's array stays as it is
        assert view.tolist() == [0.0, 1.0, 2.0]
    assert units.check_wholes([int(one) for one in view], "counts") == (0, 1, 2)


def test_a_single_number_of_an_array_keeps_its_shape_and_a_small_type_its_precision():
    assert units.check_numbers(np.float32(0.5), "a share").shape == ()
    single = np.array([0.5, 1], dtype=np.float32)[::-1]
    assert units.check_numbers(single, "shares").dtype == torch.float32
    for wrong in (np.array([True]), np.array(["1"]), np.array([1j])[::-1], np.array([None])):
        with pytest.raises(TypeError, match="as real numbers"):
            units.check_numbers(wrong, "shares")
