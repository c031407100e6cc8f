"""The contract of a classifier, promise by promise: every function holds one classifier to one of them.

`CHECKS` lists them by the promise that they are about, but for `check_accelerator`, which needs one. Each is given a classifier and some pictures [B,C,H,W] with B >= 4,
and raises AssertionError with a sentence that says what was promised and what came instead.

Two values count as equal up to rounding where no logit differs by more than `ROUNDING` of the spread (largest less
smallest logit) of its row, or of `LEAST` where all logits of a row are alike; on an accelerator, ten times that. Counts of
votes are compared by the class that they elect, in rows without a tie: rounding may turn a vote.
"""

import copy
import pickle
from collections.abc import Callable

import torch
from diffclass.classifiers.base import (
    Classifier,
    Fresh,
    Held,
    Noise,
    draw,
    each,
    joined,
    on_device_of,
    parts,
    take,
)
from torch import Tensor

# A purifier that follows Adam's direction walks as far where a gradient is nearly zero as elsewhere: of a photograph's 3072
# pixels one may go another way by rounding alone, 2e-4 of the spread in float32; networks alone differ by 1e-6.
ROUNDING = {torch.float32: 1e-3, torch.float64: 1e-10}
LEAST = 1e-3
SCALES = ("nats", "scores", "votes")


def noise_of(classifier: Classifier, images: int, *purpose) -> Noise:
    """The noise of some pictures by a key of this module."""
    return draw(classifier, images, 20, "contract", *purpose)


def seeded(seed: int = 0) -> torch.Generator:
    """A generator with a seed."""
    return torch.Generator().manual_seed(seed)


def named(classifier: Classifier) -> str:
    """What a sentence calls a classifier."""
    return type(classifier).__name__


def same_bits(one: Noise, other: Noise) -> bool:
    """Whether two noises are the same tensors, bit for bit."""
    pairs = zip(parts(one), parts(other), strict=True)
    return all(torch.equal(*pair) for pair in pairs)


def agree(
    classifier: Classifier, got: Tensor, wanted: Tensor, what: str, slack: float = 1.0
) -> None:
    """Logits that are equal up to rounding; votes that elect the same classes where no row has a tie."""
    assert got.shape == wanted.shape, (
        f"expected {what} of {named(classifier)} to have shape {list(wanted.shape)}, got {list(got.shape)}."
    )
    got = got.detach().double().cpu()
    rounding = slack * ROUNDING[wanted.dtype]
    wanted = wanted.detach().double().cpu()
    if classifier.scale == "votes":
        pairs = torch.stack([got, wanted]).topk(2, dim=2).values
        tied = (pairs[..., 0] == pairs[..., 1]).any(0)
        differ = (got.argmax(1) != wanted.argmax(1)) & ~tied
        assert not bool(differ.any()), (
            f"expected {what} of {named(classifier)} to elect the same classes, got others in {int(differ.sum())} of "
            f"{int((~tied).sum())} rows without a tie."
        )
        return
    spread = (wanted.amax(1) - wanted.amin(1)).clamp_min(LEAST)
    gap = float(((got - wanted).abs().amax(1) / spread).max())
    assert gap <= rounding, (
        f"expected {what} of {named(classifier)} to be the same up to {rounding:g} of the logits' spread, got a "
        f"difference of {gap:.1e} of it."
    )


# ---------------------------------------------------------------------------------------------------------------------
# A function of pixels and noise, and of nothing else


def same_bits_twice(classifier: Classifier, x: Tensor) -> None:
    """The same pixels and noise give the same bits, whatever was asked in between; nothing else is touched."""
    noise = noise_of(classifier, len(x))
    kept = (x.clone(), each(torch.clone, noise))
    before = torch.get_rng_state()
    first = classifier(x, noise)
    touched = not torch.equal(before, torch.get_rng_state())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        classifier(x.flip(0), noise_of(classifier, len(x), "another"))
        again = classifier(x, noise)
    assert torch.equal(first, again), (
        f"expected {named(classifier)} to give the same bits for the same pixels and noise, got others after it was "
        f"asked about other pictures: up to {float((first - again).detach().abs().max()):.1e} away."
    )
    assert not touched, (
        f"expected {named(classifier)} to leave torch's global generator alone, got another state after a call."
    )
    assert torch.equal(kept[0], x) and same_bits(kept[1], noise), (
        f"expected {named(classifier)} to leave its pictures and its noise as they were, got other values in them."
    )


def parts_equal_the_whole(classifier: Classifier, x: Tensor) -> None:
    """Prefixes, chosen pictures, pictures alone, twice as many: each picture's logits stay what they were."""
    images = len(x)
    noise = noise_of(classifier, images)
    whole = classifier(x, noise).detach()
    chosen = {
        "a prefix": slice(0, images // 2),
        "chosen pictures": torch.tensor([images - 1, 0, 2]),
        "pictures marked by booleans": torch.arange(images) % 2 == 1,
    }
    for what, kept in chosen.items():
        agree(classifier, classifier(x[kept], take(noise, kept)), whole[kept], what)
    for i in range(images):
        alone = slice(i, i + 1)
        agree(classifier, classifier(x[alone], take(noise, alone)), whole[alone], "a batch of one")
    twice = classifier(torch.cat([x, x]), joined([noise, noise]))
    agree(classifier, twice, torch.cat([whole, whole]), "twice as many pictures")
    first = take(noise, slice(0, 1))
    shared = classifier(x, first).detach()
    agree(classifier, shared[:1], whole[:1], "the first picture under its noise, shared by all,")
    for i in range(images):
        alone = slice(i, i + 1)
        agree(
            classifier, classifier(x[alone], first), shared[alone], "a batch of one, noise shared,"
        )


def same_in_every_mode(classifier: Classifier, x: Tensor) -> None:
    """Under no_grad and inference_mode the same bits; where a gradient is wanted, the same up to rounding.

    Why         torch rounds a gradient otherwise where it can itself be differentiated, and a purifier follows gradients
    """
    noise = noise_of(classifier, len(x))
    wanted = classifier(x, noise).detach()
    answers = {}
    with torch.no_grad():
        answers["torch.no_grad"] = classifier(x, noise)
    with torch.inference_mode():
        answers["torch.inference_mode"] = classifier(x, noise)
        own = noise_of(classifier, len(x))
        answers["pictures and noise made in torch.inference_mode"] = classifier(1 * x, own)
    for mode, got in answers.items():
        assert torch.equal(got, wanted), (
            f"expected {named(classifier)} to give the same bits in every mode, got others for {mode}: up to "
            f"{float((got - wanted).abs().max()):.1e} away."
        )
    leaf = x.clone().requires_grad_()
    agree(classifier, classifier(leaf, noise), wanted, "logits of pictures that want a gradient")


def pickles(classifier: Classifier, x: Tensor) -> None:
    """A copy made by pickle gives the same bits, alone and held."""
    noise = noise_of(classifier, len(x))
    held = Held(classifier, noise_of(classifier, 1))
    try:
        copies = pickle.loads(pickle.dumps((classifier, held)))
    except Exception as error:
        raise AssertionError(
            f"expected {named(classifier)} to pickle, got {type(error).__name__}: {error}"
        ) from error
    for copied, original, drawn in ((copies[0], classifier, noise), (copies[1], held, ())):
        assert torch.equal(copied(x, drawn), original(x, drawn)), (
            f"expected a pickled {named(original)} to give the same bits, got others."
        )


# ---------------------------------------------------------------------------------------------------------------------
# Noise


def draws_begin_alike(classifier: Classifier, x: Tensor) -> None:
    """`draw` gives a picture its own noise, which neither more pictures nor anything but the key changes."""
    few = noise_of(classifier, 5)
    before = torch.get_rng_state()
    many = noise_of(classifier, 70)
    assert torch.equal(before, torch.get_rng_state()), (
        f"expected {named(classifier)} to draw its noise from the generator that it is given, got another state of "
        "torch's global one."
    )
    for some, all_of_them in zip(parts(few), parts(many), strict=True):
        assert (len(some), len(all_of_them)) == (5, 70), (
            f"expected the picture axis first in the noise of {named(classifier)}, got parts of {len(some)} and "
            f"{len(all_of_them)} for 5 and 70 pictures."
        )
    assert same_bits(few, each(lambda part: part[:5], many)), (
        f"expected the noise of 5 pictures of {named(classifier)} to be the beginning of that of 70, got another."
    )
    other = noise_of(classifier, 70, "another")
    for drawn, another in zip(parts(many), parts(other), strict=True):
        if drawn.numel():
            rows = drawn.flatten(1) if drawn.ndim > 1 else drawn[:, None]
            assert len(rows.unique(dim=0)) == 70 and not torch.equal(drawn, another), (
                f"expected a noise of its own for every picture and key of {named(classifier)}, got some twice."
            )


def wrong_noise_is_refused(classifier: Classifier, x: Tensor) -> None:
    """A noise of another number of pictures, shape, kind or structure is refused with a ValueError."""
    right = noise_of(classifier, len(x))
    wrong = {
        "another structure (a tuple around it)": (right,),
        "another structure (a list)": [right],
        "no tensor at all": None,
    }
    if classifier.deterministic:
        wrong["noise where there is none"] = torch.zeros(len(x), 1)
    else:
        more = noise_of(classifier, len(x) + 1)
        wrong["one picture more"] = more
        wrong["one picture less"] = each(lambda part: part[: len(x) - 1], right)
        wrong["another shape"] = each(lambda part: part[..., None], right)
        wrong["another kind of numbers"] = each(
            lambda part: part.long() if part.is_floating_point() else part.double(), right
        )
        wrong["none"] = ()
    for what, noise in wrong.items():
        try:
            classifier(x, noise)
        except ValueError as error:
            assert "expected noise" in str(error), (
                f"expected {named(classifier)} to say what is wrong with its noise ({what}), got {error}"
            )
        except Exception as error:
            raise AssertionError(
                f"expected {named(classifier)} to refuse {what} with a ValueError, got {type(error).__name__}: {error}"
            ) from error
        else:
            raise AssertionError(
                f"expected {named(classifier)} to refuse a wrong noise ({what}), got logits."
            )


def held_and_fresh(classifier: Classifier, x: Tensor) -> None:
    """`Held` is the classifier under one noise for all pictures; `Fresh` draws a new noise at every call."""
    one = classifier.sample_noise(1, seeded(3))
    held = Held.seeded(classifier, 3)
    wanted = classifier(x, one)
    assert held.deterministic and torch.equal(held(x), wanted), (
        f"expected Held.seeded({named(classifier)}, 3) to be a function of the pixels alone, under the noise of seed 3, "
        "got another."
    )
    assert set(held.gradients()) == set(classifier.gradients()), (
        f"expected a held {named(classifier)} to have its gradients, got {sorted(held.gradients())} for "
        f"{sorted(classifier.gradients())}."
    )
    for name, other in held.gradients().items():
        assert torch.equal(other(x), wanted), (
            f"expected a held {named(classifier)} to keep its values under the gradient {name}, got others."
        )
    surrogate = classifier.surrogate()
    assert torch.equal(held.surrogate()(x), surrogate(x, one)), (
        f"expected a held {named(classifier)} to hold its noise in its surrogate too, got other values."
    )
    if not classifier.deterministic:
        try:
            Held(classifier, noise_of(classifier, 2))
        except ValueError:
            pass
        else:
            raise AssertionError(
                f"expected Held to refuse a noise of two pictures for {named(classifier)}, got a classifier."
            )
    generator = seeded(4)
    fresh = Fresh(classifier, generator)
    generators = [seeded(4), seeded(4)]
    for call in ("first", "second"):
        noises = [classifier.sample_noise(len(x), own) for own in generators]
        assert same_bits(*noises) and torch.equal(fresh(x), classifier(x, noises[0])), (
            f"expected the {call} call of a fresh {named(classifier)} to be under the next noise of its generator, got "
            "another."
        )
    unmoved = torch.equal(generator.get_state(), seeded(4).get_state())
    assert unmoved == classifier.deterministic, (
        f"expected {named(classifier)} to draw its noise from the generator that it is given, got a generator that "
        f"{'did not move' if unmoved else 'moved, though it says that it is deterministic'}."
    )


# ---------------------------------------------------------------------------------------------------------------------
# What it declares


def declares_itself(classifier: Classifier, x: Tensor) -> None:
    """Scale, shapes, cost and determinism are what they are said to be."""
    assert classifier.scale in SCALES, (
        f"expected the scale of {named(classifier)} to be one of {', '.join(SCALES)}, got {classifier.scale!r}."
    )
    for name in ("calls", "eot"):
        value = getattr(classifier, name)
        assert isinstance(value, int) and value >= 1, (
            f"expected {name} of {named(classifier)} to be a whole number >= 1, got {value!r}."
        )
    assert tuple(classifier.image_shape) == tuple(x.shape[1:]), (
        f"expected {named(classifier)} to declare the shape {list(x.shape[1:])} of its pictures, got "
        f"{classifier.image_shape}."
    )
    assert classifier.sigma_pixel is None or classifier.sigma_pixel > 0, (
        f"expected the noise that pictures of {named(classifier)} carry to be None or > 0, got {classifier.sigma_pixel}."
    )
    noise = noise_of(classifier, len(x))
    assert classifier.deterministic == (not list(parts(noise))), (
        f"expected {named(classifier)} to be deterministic where it has no noise, got {classifier.deterministic}."
    )
    try:
        logits = classifier(x, noise)
    except FloatingPointError as error:
        raise AssertionError(
            f"expected finite logits from {named(classifier)}, got infinite ones or NaN: {error}"
        ) from error
    assert tuple(logits.shape) == (len(x), classifier.num_classes) and logits.dtype == x.dtype, (
        f"expected logits [{len(x)},{classifier.num_classes}] of dtype {x.dtype} from {named(classifier)}, got "
        f"{list(logits.shape)} of {logits.dtype}."
    )


def slope(classifier: Classifier, x: Tensor, noise: Noise) -> tuple[Tensor, Tensor]:
    """Logits, and the gradient of one random combination of them. Errors: AssertionError where there is none."""
    leaf = x.clone().requires_grad_()
    logits = classifier(leaf, noise)
    assert logits.requires_grad, (
        f"expected logits of {named(classifier)} that depend differentiably on the pixels, got logits without gradient."
    )
    direction = torch.randn(logits.shape, generator=seeded(8), dtype=torch.float64).to(logits)
    return logits.detach(), torch.autograd.grad((logits * direction).sum(), leaf)[0]


def gradients_leave_the_values(classifier: Classifier, x: Tensor) -> None:
    """Every gradient that it offers has its values (bit for bit where none is asked for), and is finite and alive."""
    noise = noise_of(classifier, len(x))
    wanted = classifier(x, noise).detach()
    for name, other in classifier.gradients().items():
        logits, gradient = slope(other, x, noise)
        with torch.no_grad():
            silent = other(x, noise)
        assert torch.equal(silent, wanted), (
            f"expected {named(classifier)} to have the same values under its gradient {name}, got others: up to "
            f"{float((silent - wanted).abs().max()):.1e} away."
        )
        agree(classifier, logits, wanted, f"values under the gradient {name}")
        assert bool(torch.isfinite(gradient).all()), (
            f"expected a finite gradient {name} of {named(classifier)}, got infinity or NaN."
        )
        assert bool(gradient.flatten(1).any(1).all()), (
            f"expected a gradient {name} of {named(classifier)} that is not zero, got one that is for some picture."
        )


def votes_have_a_surrogate(classifier: Classifier, x: Tensor) -> None:
    """Without gradients there is a differentiable surrogate that takes the same noise; with them it has its values."""
    surrogate = classifier.surrogate()
    if classifier.gradients():
        noise = noise_of(classifier, len(x))
        assert torch.equal(surrogate(x, noise), classifier(x, noise)), (
            f"expected {named(classifier)}, which has gradients, to be its own surrogate, got a {named(surrogate)} of "
            "other values."
        )
        return
    assert surrogate is not classifier and surrogate.gradients(), (
        f"expected {named(classifier)}, which has no gradient, to name a surrogate that has one, got "
        f"{named(surrogate)}."
    )
    noise = classifier.sample_noise(len(x), seeded(5))
    assert same_bits(noise, surrogate.sample_noise(len(x), seeded(5))), (
        f"expected the surrogate of {named(classifier)} to draw the noise that it draws, got another."
    )
    gradients_leave_the_values(surrogate, x)


def levels_are_declared(classifier: Classifier, x: Tensor) -> None:
    """`at_levels` gives a classifier of the same kind for every number in `level_counts`, and refuses the others."""
    counts = classifier.level_counts
    for count in counts:
        try:
            other = classifier.at_levels(count)
        except ValueError as error:
            raise AssertionError(
                f"expected {named(classifier)} to give a classifier at {count} levels, as it offers {counts}, got {error}"
            ) from error
        logits = other(x, noise_of(other, len(x)))
        assert bool(torch.isfinite(logits).all()), (
            f"expected finite logits from {named(classifier)} at {count} levels, got infinite ones or NaN."
        )
        for name in ("num_classes", "image_shape", "sigma_pixel", "scale", "eot"):
            assert getattr(other, name) == getattr(classifier, name), (
                f"expected {named(classifier)} to keep its {name} at {count} levels, got {getattr(other, name)!r}."
            )
        assert set(other.gradients()) == set(classifier.gradients()), (
            f"expected {named(classifier)} to keep its gradients at {count} levels, got {sorted(other.gradients())}."
        )
        assert other.calls != classifier.calls, (
            f"expected {named(classifier)} at {count} levels to cost another number of calls, got {other.calls} too."
        )
    for count in (0, max(counts, default=0) + 1):
        try:
            classifier.at_levels(count)
        except ValueError:
            continue
        raise AssertionError(
            f"expected {named(classifier)} to refuse {count} levels, as it offers {counts}, got a classifier."
        )


def routes_take_its_noise(classifier: Classifier, x: Tensor) -> None:
    """Other ways to attack it are classifiers of the same pictures that take its noise, or have none, and can be climbed."""
    noise = noise_of(classifier, len(x))
    for name, route in classifier.routes().items():
        own = () if route.deterministic else noise
        try:
            logits = route(x, own)
        except ValueError as error:
            raise AssertionError(
                f"expected the route {name!r} of {named(classifier)} to take its noise, or to have none, got {error}"
            ) from error
        assert tuple(logits.shape) == (len(x), classifier.num_classes), (
            f"expected logits [{len(x)},{classifier.num_classes}] on the route {name!r} of {named(classifier)}, got "
            f"{list(logits.shape)}."
        )
        assert bool(torch.isfinite(slope(route.surrogate(), x, own)[1]).all()), (
            f"expected a finite gradient on the route {name!r} of {named(classifier)}, got infinity or NaN."
        )


def check_accelerator(classifier: Classifier, x: Tensor) -> None:
    """On an accelerator, which must be there, the values are the same up to rounding, ten times that of the CPU."""
    device = torch.accelerator.current_accelerator()
    noise = noise_of(classifier, len(x))
    moved = copy.deepcopy(classifier).to(device)
    there = x.to(device)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        got = moved(there, on_device_of(there, noise))
    agree(classifier, got, classifier(x, noise), f"values on {device}", slack=10)


CHECKS: dict[str, Callable[[Classifier, Tensor], None]] = {
    "same bits twice": same_bits_twice,
    "parts equal the whole": parts_equal_the_whole,
    "same in every mode": same_in_every_mode,
    "pickles": pickles,
    "draws begin alike": draws_begin_alike,
    "wrong noise is refused": wrong_noise_is_refused,
    "held and fresh": held_and_fresh,
    "declares itself": declares_itself,
    "gradients leave the values": gradients_leave_the_values,
    "votes have a surrogate": votes_have_a_surrogate,
    "levels are declared": levels_are_declared,
    "routes take its noise": routes_take_its_noise,
}


def check_promise(promise: str, classifier: Classifier, x: Tensor) -> None:
    """Hold a classifier to one of the promises of `CHECKS`. Errors: AssertionError where it is broken."""
    CHECKS[promise](classifier, x)
