"""The plain convolutional classifier: one deterministic function in training, prediction and attack, and its files."""

import json

import pytest
import torch
from diffclass import attacks
from diffclass.classifiers import cnn
from diffclass.classifiers.cnn import ConvClassifier
from diffclass.storage import assets


def tiny(seed: int = 0) -> ConvClassifier:
    return ConvClassifier((1, 8, 8), 10, (8, 16), seed).eval()


def some(shape=(1, 8, 8), count: int = 6, seed: int = 1):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand((count, *shape), generator=generator), torch.arange(count) % 10


# -- the classifier ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape, widths", [((1, 8, 8), (8, 16)), ((3, 32, 32), (4, 8, 12)), ((3, 16, 16), (8,))]
)
def test_pixels_become_logits_of_every_class(shape, widths):
    classifier = ConvClassifier(shape, 10, widths)
    (x, _) = some(shape)
    logits = classifier(x)
    assert (
        logits.shape == (6, 10) and classifier.num_classes == 10 and classifier.image_shape == shape
    )
    assert classifier.deterministic and torch.equal(logits, classifier(x))
    assert float(logits.detach().std(0).min()) > 0, "the picture has to matter"


def test_it_is_one_function_in_training_prediction_and_attack():
    classifier = tiny()
    (x, _) = some()
    wanted = classifier.train()(x)
    with torch.no_grad():
        assert torch.equal(classifier.eval()(x), wanted)
    assert torch.equal(classifier(x.clone().requires_grad_()), wanted)
    alone = torch.cat([classifier(one[None]) for one in x])
    assert torch.allclose(alone, wanted, atol=1e-5)  # nothing is shared by the pictures of a batch
    double = tiny().double()(x.double())
    assert double.dtype == torch.float64 and torch.allclose(double.float(), wanted, atol=1e-4)


def test_logits_stay_in_the_precision_of_the_pixels_under_autocast():
    classifier = tiny()
    (x, _) = some()
    with torch.autocast("cpu", torch.bfloat16):
        low = classifier(x)
    assert low.dtype == torch.float32 and torch.allclose(low, classifier(x), atol=0.05)
    assert not torch.equal(low, classifier(x))


def test_the_gradient_is_that_of_finite_differences(generator):
    classifier = tiny().double()
    (x, y) = some()
    x = x.double().clamp(0.1, 0.9)
    gradient, _, _ = attacks.expected_gradient(classifier, x, y, loss=attacks.cross_entropy_loss)
    for _ in range(5):
        way = torch.randn(x.shape, generator=generator, dtype=x.dtype)
        near, far = (attacks.cross_entropy_loss(classifier(x + h * way), y) for h in (-1e-5, 1e-5))
        slope = (gradient * way).sum((1, 2, 3))
        assert torch.allclose((far - near) / 2e-5, slope, rtol=1e-5, atol=1e-8)
        assert not torch.allclose((far - near) / 2e-5, -slope, rtol=1e-5, atol=1e-8)


def test_the_first_weights_come_from_the_seed_alone():
    before = torch.get_rng_state()
    one, same, other = (
        torch.cat([p.flatten() for p in tiny(seed).parameters()]) for seed in (3, 3, 4)
    )
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "spoil, sentence",
    [
        (lambda x: 2 * x - 1, r"expected images in \[0,1\].*model space"),
        (lambda x: 255 * x, r"expected images in \[0,1\].*divide by 255"),
        (lambda x: x[0], r"expected images of shape \[B,1,8,8\].*x\[None\]"),
        (lambda x: x.repeat(1, 3, 1, 1), "is this the world that the classifier was made for"),
        (lambda x: x / 0, "expected finite images"),
    ],
)
def test_what_is_no_picture_gets_a_sentence(spoil, sentence):
    with pytest.raises(ValueError, match=sentence):
        tiny()(spoil(some()[0]))


@pytest.mark.parametrize("widths", [(), (6, 12), (0, 8)])
def test_impossible_widths_get_a_sentence(widths):
    with pytest.raises(ValueError, match="expected widths as multiples of 4"):
        ConvClassifier((1, 8, 8), 10, widths)


# -- files ------------------------------------------------------------------------------------------------------------


def test_weights_travel_bit_for_bit(tmp_path):
    classifier = tiny()
    (x, _) = some()
    cnn.save(classifier, tmp_path / "c.safetensors", {"name": "c"})
    loaded, card = cnn.load(tmp_path / "c.safetensors")
    assert (
        torch.equal(loaded(x), classifier(x)) and card == {"name": "c"} and loaded.widths == (8, 16)
    )
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())


def test_a_damaged_or_foreign_file_is_told(tmp_path):
    from safetensors.torch import load_file, save_file

    path = tmp_path / "c.safetensors"
    cnn.save(tiny(), path)
    whole = path.read_bytes()
    state = load_file(path)
    path.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match="probably cut short"):
        cnn.load(path)
    save_file(
        state,
        path,
        {
            "architecture": json.dumps(
                dict(network="ConvClassifier", image_shape=[1, 8, 8], num_classes=9, widths=[8, 16])
            )
        },
    )
    with pytest.raises(
        ValueError, match=r"expected weights of ConvClassifier in c.safetensors, but 'leave.*\(9"
    ):
        cnn.load(path)
    with pytest.raises(
        ValueError,
        match=r"expected digits-idc.safetensors to hold a plain network \(ConvC.*, got the arch",
    ):
        cnn.load(assets.verified("digits-idc.safetensors"))
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors"):
        cnn.load(tmp_path / "none.safetensors")
