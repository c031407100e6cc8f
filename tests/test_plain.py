"""The wide residual network and the vision transformer: their formulas written out, one function everywhere, their files."""

import json
import math

import pytest
import torch
from diffclass import attacks, units
from diffclass.classifiers import cnn
from diffclass.classifiers.attention import HEADS, AttentionClassifier
from diffclass.classifiers.cnn import WideClassifier
from test_cnn import some
from torch import Tensor
from torch.nn.functional import conv2d, gelu, group_norm, layer_norm, linear, silu
from twins import rejected

SHAPE = (1, 8, 8)


def wide(seed: int = 0, normed: bool = True) -> WideClassifier:
    return WideClassifier(SHAPE, 10, (8, 8, 16), 2, normed, seed).eval()


def unnormed(seed: int = 0) -> WideClassifier:
    return wide(seed, normed=False)


def attending(seed: int = 0) -> AttentionClassifier:
    return AttentionClassifier(SHAPE, 10, 12, 2, 2, seed).eval()


KINDS = {"wide": wide, "without norms": unnormed, "attention": attending}
each_kind = pytest.mark.parametrize("tiny", KINDS.values(), ids=KINDS)


# -- what they compute ------------------------------------------------------------------------------------------------


def active(h: Tensor, weights: dict, name: str, normed: bool) -> Tensor:
    """SiLU of the norm, whose scale and shift are the weights of a name."""
    if normed:
        groups = math.gcd(8, h.shape[1])
        h = group_norm(h, groups, weights[f"{name}.0.weight"], weights[f"{name}.0.bias"])
    return silu(h)


def convolved(h: Tensor, weights: dict, name: str, stride: int = 1) -> Tensor:
    """A convolution with the weights of a name, its picture framed so that a stride of 1 keeps the side."""
    kernel = weights[f"{name}.weight"]
    return conv2d(h, kernel, weights[f"{name}.bias"], stride, padding=kernel.shape[-1] // 2)


def wide_logits(
    classifier: WideClassifier,
    x: Tensor,
    *,
    strides=(1, 1, 2, 1),
    passed=lambda h, a: a,
    pooled=lambda h: h.mean((2, 3)),
    last=True,
) -> Tensor:
    """The formula of `WideClassifier` in functions of torch: two groups of two blocks; the options are what twins change."""
    weights = classifier.state_dict()
    normed = classifier.normed
    h = convolved(2 * x - 1, weights, "enter")
    for block, stride in enumerate(strides):
        name = f"groups.{block}"
        a = active(h, weights, f"{name}.first", normed)
        inner = convolved(a, weights, f"{name}.inner.0", stride)
        inner = active(inner, weights, f"{name}.inner.1", normed)
        inner = convolved(inner, weights, f"{name}.inner.2")
        if f"{name}.shortcut.weight" in weights:
            h = convolved(passed(h, a), weights, f"{name}.shortcut", stride)
        h = h + inner
    if last:
        h = active(h, weights, "last", normed)
    return linear(pooled(h), weights["leave.weight"], weights["leave.bias"])


@rejected(
    {
        "a shortcut past the norm": dict(options=dict(passed=lambda h, a: h)),
        "the largest value": dict(options=dict(pooled=lambda h: h.amax((2, 3)))),
        "no last norm": dict(options=dict(last=False)),
        "no stride": dict(options=dict(strides=(1, 1, 1, 1))),
    }
)
def test_the_wide_network_is_its_formula(options=None):
    (x, _) = some()
    for classifier in (wide(), unnormed()):
        with torch.no_grad():
            got = classifier(x)
            wanted = wide_logits(classifier, x, **(options or {}))
        assert torch.allclose(got, wanted, atol=1e-5)


def attended(h: Tensor, weights: dict, name: str, heads: int, scale: float) -> Tensor:
    """softmax(Q K' scale) V of every head, with the weights of a layer. Shapes: [B,n,width] -> the same."""
    mixed = linear(h, weights[f"{name}.in_proj_weight"], weights[f"{name}.in_proj_bias"])
    query, key, value = (
        part.unflatten(2, (heads, -1)).transpose(1, 2) for part in mixed.chunk(3, 2)
    )
    shares = (scale * query @ key.transpose(2, 3)).softmax(3)
    joined = (shares @ value).transpose(1, 2).flatten(2)
    return linear(joined, weights[f"{name}.out_proj.weight"], weights[f"{name}.out_proj.bias"])


def attention_logits(
    classifier: AttentionClassifier,
    x: Tensor,
    *,
    scale=(12 / HEADS) ** -0.5,
    placed=1.0,
    before=True,
    read=lambda tokens: tokens[:, 0],
) -> Tensor:
    """The formula of `AttentionClassifier`, patch by patch; the options are what twins change."""
    weights = classifier.state_dict()
    width = classifier.width

    def norm(h: Tensor, name: str) -> Tensor:
        return layer_norm(h, (width,), weights[f"{name}.weight"], weights[f"{name}.bias"])

    kernel = weights["enter.weight"].flatten(1)
    z = 2 * x - 1
    tokens = [weights["first"][0].expand(len(x), -1)]
    for row in range(0, 8, 2):
        for column in range(0, 8, 2):
            patch = z[:, :, row : row + 2, column : column + 2].flatten(1)
            tokens.append(linear(patch, kernel, weights["enter.bias"]))
    t = torch.stack(tokens, 1) + placed * weights["place"]
    for layer in range(classifier.layers):
        name = f"encoder.layers.{layer}"
        seen = norm(t, f"{name}.norm1") if before else t
        t = t + attended(seen, weights, f"{name}.self_attn", HEADS, scale)
        seen = norm(t, f"{name}.norm2") if before else t
        wider = gelu(
            linear(seen, weights[f"{name}.linear1.weight"], weights[f"{name}.linear1.bias"])
        )
        t = t + linear(wider, weights[f"{name}.linear2.weight"], weights[f"{name}.linear2.bias"])
    end = read(norm(t, "encoder.norm"))
    return linear(end, weights["leave.weight"], weights["leave.bias"])


@rejected(
    {
        "no scale": dict(options=dict(scale=1.0)),
        "no places": dict(options=dict(placed=0.0)),
        "no norms": dict(options=dict(before=False)),
        "the mean token": dict(options=dict(read=lambda tokens: tokens.mean(1))),
    }
)
def test_the_transformer_is_its_formula(options=None):
    (x, _) = some()
    classifier = attending()
    with torch.no_grad():
        got = classifier(x)
        wanted = attention_logits(classifier, x, **(options or {}))
    assert torch.allclose(got, wanted, atol=1e-5)


def test_where_a_patch_is_matters_to_the_transformer_only_by_its_place():
    """Without places its answer is that of the set of patches; with them another."""
    (x, _) = some()
    swapped = x.flip(2).flip(3)  # other patches, and
    patches = x.unflatten(2, (4, 2)).unflatten(4, (4, 2))
    moved = patches.roll((1, 2), (2, 4)).flatten(4, 5).flatten(2, 3)
    classifier = attending()
    assert not torch.allclose(classifier(moved), classifier(x), atol=1e-4)
    with torch.no_grad():
        classifier.place.zero_()
    assert torch.allclose(classifier(moved), classifier(x), atol=1e-5)
    assert not torch.allclose(classifier(swapped), classifier(x), atol=1e-4)


# -- a classifier -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda shape: WideClassifier(shape, 10, (4, 8, 12)),
        lambda shape: WideClassifier(shape, 10, (4, 8), blocks=2, normed=False),
        lambda shape: AttentionClassifier(shape, 10, 6, 1, 4),
    ],
    ids=["wide", "deep", "attention"],
)
@pytest.mark.parametrize("shape", [SHAPE, (3, 32, 32), (3, 16, 8)])
def test_pixels_become_logits_of_every_class(make, shape):
    classifier = make(shape)
    (x, _) = some(shape)
    logits = classifier(x)
    assert logits.shape == (6, 10) and classifier.num_classes == 10
    assert classifier.image_shape == shape and classifier.calls == 1
    assert classifier.deterministic and torch.equal(logits, classifier(x))
    assert float(logits.detach().std(0).min()) > 0, "the picture has to matter"


@each_kind
def test_it_is_one_function_in_training_prediction_and_attack(tiny):
    """Bit for bit, where torch has a faster kernel for prediction alone as well."""
    classifier = tiny()
    (x, _) = some()
    wanted = classifier.train()(x)
    with torch.no_grad():
        assert torch.equal(classifier.eval()(x), wanted)
    with torch.inference_mode():
        assert torch.equal(classifier(x), wanted)
    assert torch.equal(classifier(x.clone().requires_grad_()), wanted)
    assert torch.equal(classifier.requires_grad_(False)(x), wanted)
    alone = torch.cat([classifier(one[None]) for one in x])
    assert torch.allclose(alone, wanted, atol=1e-5)  # nothing is shared by the pictures of a batch
    double = tiny().double()(x.double())
    assert double.dtype == torch.float64 and torch.allclose(double.float(), wanted, atol=1e-4)


@each_kind
def test_logits_stay_in_the_precision_of_the_pixels_under_autocast(tiny):
    classifier = tiny()
    (x, _) = some()
    with torch.autocast("cpu", torch.bfloat16):
        low = classifier(x)
    assert low.dtype == torch.float32 and torch.allclose(low, classifier(x), atol=0.05)
    assert not torch.equal(low, classifier(x))


@each_kind
def test_the_gradient_is_that_of_finite_differences(tiny, generator):
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


@each_kind
def test_the_first_weights_come_from_the_seed_alone(tiny):
    before = torch.get_rng_state()
    one, same, other = (dict(tiny(seed).named_parameters()) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    for name, weight in one.items():
        assert torch.equal(weight, same[name]), name
        drawn = weight.detach().unique().numel() > 1
        assert torch.equal(weight, other[name]) != drawn, name


@each_kind
def test_what_is_no_picture_gets_a_sentence(tiny):
    (x, _) = some()
    for wrong, sentence in (
        (units.to_model(x), r"expected images in \[0,1\].*model space"),
        (x[0], r"expected images of shape \[B,1,8,8\].*x\[None\]"),
        (x.repeat(1, 3, 1, 1), "is this the world that the classifier was made for"),
        (x / 0, "expected finite images"),
    ):
        with pytest.raises(ValueError, match=sentence):
            tiny()(wrong)


@pytest.mark.parametrize(
    "make, sentence",
    [
        (lambda: WideClassifier(SHAPE, 10, (8,)), "multiples of 4, the first layer's and one for"),
        (lambda: WideClassifier(SHAPE, 10, (8, 6)), r"multiples of 4, .*, got \(8, 6\)"),
        (lambda: WideClassifier(SHAPE, 10, blocks=0), "expected blocks as a whole number of at"),
        (lambda: AttentionClassifier(SHAPE, 10, 32), "a multiple of 3, got 32"),
        (lambda: AttentionClassifier(SHAPE, 10, 12, 0), "expected layers as a whole number"),
        (
            lambda: AttentionClassifier(SHAPE, 10, 12, 1, 3),
            "divides a picture of 8x8 pixels, got 3",
        ),
        (lambda: AttentionClassifier(SHAPE, 1, 12), "expected at least two classes, got 1"),
    ],
)
def test_impossible_networks_get_a_sentence(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()


# -- files ------------------------------------------------------------------------------------------------------------


@each_kind
def test_weights_travel_bit_for_bit_or_rounded_to_half_their_size(tiny, tmp_path):
    classifier = tiny()
    (x, _) = some()
    cnn.save(classifier, tmp_path / "c.safetensors", {"name": "c"})
    loaded, card = cnn.load(tmp_path / "c.safetensors")
    assert type(loaded) is type(classifier) and card == {"name": "c"}
    assert torch.equal(loaded(x), classifier(x))
    assert cnn.described(loaded) == cnn.described(classifier)
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    cnn.save(classifier, tmp_path / "half.safetensors", dtype=torch.float16)
    half = cnn.load(tmp_path / "half.safetensors")[0]
    assert half(x).dtype == torch.float32 and torch.allclose(half(x), classifier(x), atol=1e-2)
    sizes = [(tmp_path / f"{name}.safetensors").stat().st_size for name in ("half", "c")]
    assert sizes[0] < 0.75 * sizes[1]


def test_a_file_of_another_kind_is_told(tmp_path):
    from safetensors.torch import load_file, save_file

    path = tmp_path / "c.safetensors"
    cnn.save(wide(), path)
    state = load_file(path)
    known = cnn.described(wide()) | dict(image_shape=[1, 8, 8], num_classes=10)
    for changes in (dict(network="nn.Module"), dict(layers=3), dict(network="AttentionClassifier")):
        save_file(state, path, {"architecture": json.dumps(known | changes)})
        with pytest.raises(ValueError, match=r"expected c.safetensors to hold a plain network \("):
            cnn.load(path)
    save_file(state, path, {"architecture": json.dumps(known | dict(normed=False))})
    with pytest.raises(
        ValueError, match="expected weights of WideClassifier in c.safetensors, but"
    ):
        cnn.load(path)
