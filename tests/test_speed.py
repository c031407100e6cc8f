"""How fast a network is trained: FLOP counted by torch, and the share of a measured peak."""

import pytest
import torch
from diffclass.denoisers import network
from diffclass.training import speed
from diffclass.training.recipes import RECIPES, Beginning
from diffclass.zoo import networks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

CIFAR = (3, 32, 32)
TEACHER = networks.MODELS["cifar10"]["teacher"]
STUDENT = networks.MODELS["cifar10"]["student"]
CONTRASTIVE = networks.CONTRASTIVE["cifar10"]


def untrained(name, given=None):
    return RECIPES[name].build(Beginning(CIFAR, 10, given=given)).eval()


def counted(call) -> int:
    """FLOP of a call by torch's own counter, attention written out as matrix products."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        call()
    return counter.get_total_flops()


def forward_flops(denoiser, classes=None) -> int:
    """FLOP of denoising one picture."""
    with torch.no_grad():
        return counted(lambda: denoiser(torch.zeros(1, *CIFAR), 1.0, classes))


def gradient_flops(denoiser) -> int:
    """FLOP of denoising one picture under all classes and none, and of the gradient of the weights."""
    return counted(lambda: denoiser(torch.zeros(1, *CIFAR), 1.0, range(11)).sum().backward())


def test_the_student_is_small_and_the_count_of_flops_is_torch_s():
    teacher = untrained(TEACHER)
    student = untrained(STUDENT, teacher)
    assert forward_flops(student) <= 1e9
    own = gradient_flops(student)
    assert speed.step_flops(STUDENT) == own + forward_flops(teacher, range(11))


@pytest.mark.parametrize("name", [TEACHER, CONTRASTIVE])
def test_a_step_costs_three_forwards_but_for_the_gradient_of_the_picture(name):
    denoiser = untrained(name)
    forward = forward_flops(denoiser, None if denoiser.one_call else [0])
    assert 2.9 * forward < speed.step_flops(name) < 3 * forward


def test_an_attack_inside_is_counted_along():
    """Two steps of the attack and the images before and after, at two levels each."""
    levels = 2
    forward = forward_flops(untrained(CONTRASTIVE))
    step = speed.step_flops(networks.HARDENED["cifar10"])
    assert 4 * levels * 2 * forward < step < 4 * levels * 4 * forward


def test_other_widths_are_counted():
    assert speed.step_flops(TEACHER, (16, 32)) < 0.1 * speed.step_flops(TEACHER)


@pytest.mark.parametrize("name", [n for n in RECIPES if n.startswith("digits")])
def test_every_step_can_be_counted(name):
    assert speed.step_flops(name) > 1e6


def test_the_networks_that_are_counted_are_those_that_are_trained():
    built = network.build(
        "MultiHeadDenoiser", "UNet", 10, CIFAR, widths=(32, 64, 96), layers=2, attention=False
    )
    assert network.describe(untrained(STUDENT, untrained(TEACHER))) == network.describe(built)


def test_speed_is_a_share_of_a_measured_peak():
    speed_of = speed.Speed(images=1000, flops=2e9, peak=8e12)
    assert str(speed_of) == "1,000 images/s, 2 TFLOP/s, 25% of the matrix peak"
    assert 1e8 < speed.matrix_peak("fp32", size=1024, seconds=0.05) < 1e16
