"""Test pictures are found wherever a classifier keeps them, in other units too, and other pictures are not taken for them."""

import functools
from dataclasses import replace

import pytest
import torch
from diffclass import audit, data
from diffclass.audit import leakage, planted
from torch import nn

COLOUR = (3, 8, 8)


def colours(count: int, seed: int = 0) -> torch.Tensor:
    return torch.rand((count, *COLOUR), generator=torch.Generator().manual_seed(seed))


KEPT = {
    "as they are": lambda x: x,
    "in model units": lambda x: 2 * x - 1,
    "as a negative": lambda x: 1 - x,
    "in eight bits": lambda x: (255 * x).round().to(torch.uint8),
    "in half precision": lambda x: x.half(),
    "channels last": lambda x: x.permute(0, 2, 3, 1).contiguous(),
    "in one row": lambda x: x.flatten(),
    "as columns": lambda x: x.flatten(1).T.contiguous(),
}


@pytest.mark.parametrize("kept", KEPT)
def test_pictures_are_found_in_whatever_form(kept):
    x = colours(6)
    mixed = torch.cat([colours(5, seed=1), x[:4]])
    among = leakage.found(x, leakage.rows_of(KEPT[kept](mixed), COLOUR))
    assert among.tolist() == [True] * 4 + [False] * 2


def test_other_pictures_of_the_same_kind_are_not_found():
    digits = data.digits()
    assert not bool(leakage.found(digits.test_images, [digits.train_images.flatten(1)]).any())
    assert not bool(leakage.found(torch.full((2, *COLOUR), 0.5), [torch.ones(3, 192)]).any())


class Keeps(nn.Module):
    """Keeps something somewhere."""

    def __init__(self, kept):
        super().__init__()
        self.kept = kept


PLACES = {
    "a parameter": lambda x: nn.Parameter(x, requires_grad=False),
    "a list in a dictionary": lambda x: {"a": [{"b": (x,)}]},
    "an array": lambda x: x.numpy(),
    "a partial": lambda x: functools.partial(max, x),
    "a closure": lambda x: lambda: x + 1,
    "a default": lambda x: lambda y=x: y,
    "an object": Keeps,
    "a class": lambda x: type("Shelf", (), {"kept": x})(),
    "a set of arrays by key": lambda x: {0: x.numpy().copy(), 1: 3},
}


@pytest.mark.parametrize("place", PLACES)
def test_a_tensor_is_reached_wherever_it_is_kept(place):
    x = colours(2)
    inside = leakage.tensors_inside(Keeps(PLACES[place](x)))
    assert any(value.shape == x.shape and torch.equal(value, x) for value in inside)


SOMEWHERE = colours(3, seed=9)


class Refers(nn.Module):
    """Uses what its module knows."""

    def forward(self, x):
        return x + SOMEWHERE.sum()


def test_what_a_forward_refers_to_is_reached_and_what_others_know_is_not():
    assert any(value is SOMEWHERE for value in leakage.tensors_inside(Refers()))
    assert not any(value is SOMEWHERE for value in leakage.tensors_inside(Keeps(3)))


def test_an_object_that_refers_to_itself_ends_the_search():
    ring = []
    ring.append(ring)
    assert leakage.tensors_inside(Keeps(ring)) == []


def test_points_of_the_plane_are_too_small_to_be_found_again():
    class Plane(planted.Honest):
        image_shape = (2, 1, 1)

        def logits(self, x, noise):
            return 5 * torch.cat([x.flatten(1), 1 - x.flatten(1)], 1)

    x = torch.rand((12, 2, 1, 1), generator=torch.Generator().manual_seed(0))
    case = audit.Case(
        Plane().eval(), x, torch.zeros(12, dtype=torch.int64), 0.05, training=lambda: x
    )
    (result,) = audit.run(case, [40])
    assert result.light == "green" and "too small to be found again" in result.evidence


def test_a_single_duplicate_is_no_proof_of_a_leak():
    x, _ = planted.images(64)
    case = planted.case("honest")
    for count, light in ((0, "green"), (1, "amber"), (5, "red")):
        training = torch.cat([planted.images(50, seed=3)[0], x[:count]])
        (result,) = audit.run(replace(case, training=training.clone), [40])
        assert result.light == light, result.evidence
