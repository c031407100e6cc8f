"""Low-rank adapters: nothing at first, saved alone, merged exactly, beside their own base only."""

import copy
import json

import pytest
import torch
import twins
from diffclass.denoisers import lora, network, pipelines, tiny
from diffclass.denoisers.lora import Adapter
from safetensors.torch import load_file, save_file

DIGIT_LAYERS = ("conv1", "modulate")


def digits(kind="ConditionalDenoiser"):
    """A small denoiser of digits with random weights, its last layer too."""
    made = network.build(kind, "DigitNet", 3, (1, 8, 8), width=8, blocks=1)
    return woken(made)


def woken(denoiser):
    """The denoiser with weights where it starts at zero, so that what lies before them matters."""
    generator = torch.Generator().manual_seed(7)
    for value in denoiser.parameters():
        if not value.any():
            value.data = 0.3 * torch.randn(value.shape, generator=generator)
    return denoiser.eval().requires_grad_(False)


def unet():
    """A small U-Net of photographs with attention."""
    made = network.build(
        "ConditionalDenoiser", "UNet", 2, (3, 8, 8), widths=(8, 16), layers=1, attention=True
    )
    return woken(made)


def song():
    """A small DDPM++ network, whose attention is of convolutions."""
    made = network.build(
        "ConditionalDenoiser", "SongUNet", 2, (1, 8, 8), width=8, multiples=(1,), depth=1, labels=3
    )
    return woken(made)


@pytest.fixture(scope="module")
def prompted(tmp_path_factory):
    """The denoiser of a tiny text-to-image pipeline."""
    folder, _ = tiny.stable_diffusion(tmp_path_factory.mktemp("sd"))
    return pipelines.from_pipeline(folder, tiny.NAMES).denoiser


def question(denoiser, images=2):
    """Noised pictures of a denoiser's shape, and a level."""
    generator = torch.Generator().manual_seed(3)
    return torch.randn(images, *denoiser.image_shape, generator=generator), 0.7


def trained(adapter, size=0.3):
    """The adapter with numbers in B, as after training."""
    generator = torch.Generator().manual_seed(5)
    for name, value in adapter.weights.items():
        if "lora_B" in name:
            value.data = size * torch.randn(value.shape, generator=generator)
    return adapter


BASES = {
    "digits": (digits, DIGIT_LAYERS, 2),
    "heads": (lambda: digits("MultiHeadDenoiser"), DIGIT_LAYERS, 3),
    "unet": (unet, (*lora.ATTENTION, "conv2"), 4),
    "song": (song, ("qkv", "proj", "affine"), 2),
}


@pytest.fixture(params=[*BASES, "prompts"])
def base(request):
    """A denoiser, the layers to adapt, a rank."""
    if request.param == "prompts":
        return request.getfixturevalue("prompted"), lora.ATTENTION, 2
    build, targets, rank = BASES[request.param]
    return build(), targets, rank


def test_a_fresh_adapter_changes_no_bit_and_not_its_base(base):
    denoiser, targets, rank = base
    before = copy.deepcopy(denoiser.state_dict())
    state = torch.get_rng_state()
    adapter = Adapter.beside(denoiser, targets, rank)
    assert torch.equal(torch.get_rng_state(), state)
    x, sigma = question(denoiser)
    assert torch.equal(adapter.denoiser(x, sigma), denoiser(x, sigma))
    trained(adapter)
    assert (adapter.denoiser(x, sigma) - denoiser(x, sigma)).abs().max() > 1e-3
    assert denoiser.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in denoiser.state_dict().items())
    assert not any(value.requires_grad for value in denoiser.parameters())


def test_only_the_adapter_is_trained_and_it_has_r_times_m_plus_n_numbers(base):
    denoiser, targets, rank = base
    adapter = Adapter.beside(denoiser, targets, rank)
    layers = [
        layer
        for name, layer in denoiser.named_modules()
        if any(name == target or name.endswith(f".{target}") for target in targets)
    ]
    sizes = [sum(layer.weight.flatten(1).shape) for layer in layers]
    assert adapter.count == rank * sum(sizes) and len(layers) >= 2
    learning = [value for value in adapter.denoiser.parameters() if value.requires_grad]
    assert sum(value.numel() for value in learning) == adapter.count
    x, sigma = question(denoiser)
    trained(adapter).denoiser(x, sigma).square().sum().backward()
    assert all(value.grad is not None and bool(value.grad.any()) for value in learning)


def test_merged_answers_as_unmerged(base):
    denoiser, targets, rank = base
    adapter = trained(Adapter.beside(denoiser, targets, rank, alpha=3.0))
    merged = adapter.merged()
    x, sigma = question(denoiser)
    wanted = adapter.denoiser(x, sigma)
    torch.testing.assert_close(
        merged(x, sigma), wanted, rtol=1e-5, atol=1e-6 * float(wanted.abs().max())
    )
    assert merged.state_dict().keys() == denoiser.state_dict().keys()
    assert type(merged) is type(denoiser)
    again = adapter.denoiser(x, sigma)
    assert torch.equal(again, wanted)  # merging a copy left it alone


def test_an_adapter_is_saved_alone_and_loaded_beside_its_base(base, tmp_path):
    denoiser, targets, rank = base
    adapter = trained(Adapter.beside(denoiser, targets, rank, alpha=3.0, seed=4))
    path = tmp_path / "adapter.safetensors"
    adapter.save(path, dict(steps=100))
    assert path.stat().st_size < 4 * adapter.count + 20_000
    loaded = Adapter.load(denoiser, path)
    x, sigma = question(denoiser)
    assert torch.equal(loaded.denoiser(x, sigma), adapter.denoiser(x, sigma))
    assert (loaded.rank, loaded.alpha, loaded.targets) == (rank, 3.0, tuple(targets))
    state = load_file(path)
    assert state.keys() == adapter.weights.keys() and all("lora_" in name for name in state)


def by_hand(layer, a, b, scale):
    """The matrix of a layer after merging."""
    return layer.weight + scale * (b.flatten(1) @ a.flatten(1)).reshape(layer.weight.shape)


@twins.rejected(
    {
        "alpha": dict(scale=lambda alpha, rank: alpha),
        "1 / r": dict(scale=lambda alpha, rank: 1 / rank),
        "the other way round": dict(scale=lambda alpha, rank: rank / alpha),
    }
)
def test_what_is_added_is_alpha_over_r_times_b_a(scale=lambda alpha, rank: alpha / rank):
    denoiser = digits()
    adapter = trained(Adapter.beside(denoiser, DIGIT_LAYERS, 2, alpha=6.0))
    merged = adapter.merged()
    for ending in ("network.blocks.0.conv1", "network.blocks.0.modulate"):
        a, b = (adapter.weights[f"{ending}.lora_{side}.weight"] for side in "AB")
        wanted = by_hand(denoiser.get_submodule(ending), a, b, scale(6.0, 2))
        torch.testing.assert_close(merged.get_submodule(ending).weight, wanted)


def products(adapter):
    """B A of every layer, by its name."""
    return {
        name.replace(".lora_A.weight", ""): adapter.weights[name.replace("_A", "_B")].flatten(1)
        @ value.flatten(1)
        for name, value in adapter.weights.items()
        if ".lora_A." in name
    }


@twins.rejected(
    {
        "the first rows of A": dict(
            truncated=lambda adapter, rank: first_rows(copy.deepcopy(adapter), rank)
        ),
        "the smallest singular values": dict(
            truncated=twins.patched(
                Adapter.truncated,
                torch.linalg,
                svd=lambda *given, svd=torch.linalg.svd, **told: smallest_first(
                    *svd(*given, **told)
                ),
            )
        ),
    }
)
def test_a_truncated_adapter_is_the_nearest_of_its_rank(truncated=Adapter.truncated):
    adapter = trained(Adapter.beside(digits(), DIGIT_LAYERS, 4))
    before = products(adapter)
    for rank in (1, 3, 4):
        lower = truncated(adapter, rank)
        for name, after in products(lower).items():
            values = torch.linalg.svdvals(before[name])
            assert int((torch.linalg.svdvals(after) > 1e-5 * values[0]).sum()) == rank
            lost = float((after - before[name]).norm())
            assert lost == pytest.approx(float(values[rank:4].norm()), abs=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in products(adapter).items())


def first_rows(adapter, rank):
    """Only the first rows of every A."""
    for name, value in adapter.weights.items():
        if ".lora_A." in name:
            value.data[rank:] = 0
    return adapter


def smallest_first(u, s, vh):
    """The part of a decomposition that is not zero, with its smallest singular values first."""
    order = torch.arange(4).flip(0)
    return u[:, order], s[order], vh[order]


def test_a_truncated_adapter_answers_and_is_merged_as_any_other():
    adapter = trained(Adapter.beside(digits(), DIGIT_LAYERS, 4))
    x, sigma = question(adapter.denoiser)
    whole = adapter.denoiser(x, sigma)
    torch.testing.assert_close(adapter.truncated(4).denoiser(x, sigma), whole, rtol=1e-3, atol=1e-4)
    lower = adapter.truncated(1)
    assert (lower.denoiser(x, sigma) - whole).abs().max() > 1e-3
    merged = lower.merged()(x, sigma)
    torch.testing.assert_close(merged, lower.denoiser(x, sigma), rtol=1e-4, atol=1e-4)
    for rank in (0, 5):
        with pytest.raises(ValueError, match="a lower rank"):
            adapter.truncated(rank)


def test_a_is_drawn_from_its_seed_with_the_spread_of_one_over_r():
    drawn = [
        torch.cat(
            [
                value.flatten()
                for name, value in Adapter.beside(
                    digits(), DIGIT_LAYERS, 4, seed=seed
                ).weights.items()
                if "lora_A" in name
            ]
        )
        for seed in (0, 0, 1)
    ]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert float(drawn[0].std()) == pytest.approx(1 / 4, rel=0.15)


# ---------------------------------------------------------------------------------------------------------------------
# What cannot be meant


@pytest.mark.parametrize(
    "targets, rank, alpha, said",
    [
        (("conv1",), 9, None, "a rank of at most 8, the smaller side of the layer .*conv1, got 9"),
        (("2",), 2, None, "a rank of at most 1, the smaller side of the layer network.leave.2"),
        (("to_q",), 2, None, "got 'to_q'; its linear layers and convolutions are named .*conv1"),
        (("norm1",), 2, None, "plain convolutions to adapt, got .*norm1, a GroupNorm"),
        (("classes",), 2, None, "got network.classes, a Embedding"),
        ((), 2, None, "expected the endings of some layers' names"),
        (("conv1",), 0, None, "the rank of an adapter"),
        (("conv1",), 2, 0.0, "alpha > 0"),
        ((3,), 2, None, "got 3"),
    ],
)
def test_adapters_that_cannot_be_meant_are_refused(targets, rank, alpha, said):
    with pytest.raises(ValueError, match=said):
        Adapter.beside(digits(), targets, rank, alpha)


def test_one_name_in_place_of_several_is_refused():
    with pytest.raises(
        TypeError, match="targets as a list of endings of layers' names, got 'conv1'"
    ):
        Adapter.beside(digits(), "conv1")


def test_an_adapted_base_is_refused():
    adapter = Adapter.beside(digits(), DIGIT_LAYERS, 2)
    with pytest.raises(ValueError, match="a base without an adapter.*merge it first"):
        Adapter.beside(adapter.denoiser, DIGIT_LAYERS, 2)
    assert Adapter.beside(adapter.merged(), DIGIT_LAYERS, 2).count == adapter.count


def test_the_adapter_of_another_base_is_refused(tmp_path):
    path = tmp_path / "adapter.safetensors"
    Adapter.beside(digits(), DIGIT_LAYERS, 2).save(path)
    other = digits()
    next(other.parameters()).data += 1e-6
    with pytest.raises(
        ValueError, match="an adapter of this base.*load the base that it was trained"
    ):
        Adapter.load(other, path)


def test_files_that_hold_no_adapter_are_refused(tmp_path):
    denoiser = digits()
    path = tmp_path / "adapter.safetensors"
    with pytest.raises(FileNotFoundError, match="an adapter at adapter.safetensors"):
        Adapter.load(denoiser, path)
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="to be a safetensors file"):
        Adapter.load(denoiser, path)
    network.save_denoiser(denoiser, path)
    with pytest.raises(ValueError, match="to hold an adapter, got a file whose header names none"):
        Adapter.load(denoiser, path)
    adapter = Adapter.beside(denoiser, DIGIT_LAYERS, 2)
    adapter.save(path)
    state = load_file(path)
    save_file({"a": torch.zeros(1)}, path, {"adapter": "{}"})
    with pytest.raises(ValueError, match="the settings of an adapter in the header"):
        Adapter.load(denoiser, path)
    told = dict(rank=2, alpha=2.0, targets=list(DIGIT_LAYERS), base=lora.checksum(denoiser))
    lost = next(iter(state))
    header = {"adapter": json.dumps(told)}
    save_file({name: v for name, v in state.items() if name != lost}, path, header)
    with pytest.raises(ValueError, match="tensors of an adapter of rank 2"):
        Adapter.load(denoiser, path)
    save_file({**state, lost: state[lost] * float("nan")}, path, header)
    with pytest.raises(ValueError, match="expected finite weights"):
        Adapter.load(denoiser, path)
    next(iter(adapter.weights.values())).data.fill_(float("nan"))
    with pytest.raises(ValueError, match="expected finite weights"):
        adapter.save(path)
