"""JEM: its chains reach closed forms, its gradient is the likelihood's, and a run that diverges goes back and says so."""

import json
import math
import warnings
from dataclasses import replace

import pytest
import torch
from diffclass import data, intervals, units
from diffclass.classifiers import cnn, joint
from diffclass.classifiers.base import take
from diffclass.classifiers.cnn import ConvClassifier, WideClassifier
from diffclass.classifiers.joint import JointClassifier, langevin, temperature, uniform
from diffclass.evaluation import accuracies
from diffclass.storage import assets, weights
from diffclass.training import loop, losses, recipes
from diffclass.training.joint import LIMIT, Chains, joint_loss, likelihood_gap, moved_chains
from diffclass.training.loop import Training
from diffclass.training.recipes import RECIPES
from diffclass.training.train import train
from diffclass.zoo import networks
from torch import Tensor
from torch.nn.functional import cross_entropy
from twins import rejected

SHAPE = (1, 8, 8)
JEM = networks.JOINT["digits"]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tiny(seed: int = 0, chains: int = 12) -> JointClassifier:
    network = WideClassifier(SHAPE, 10, (4, 8), normed=False, seed=seed)
    return JointClassifier.begun(network, chains, seed).eval()


# -- the chains -------------------------------------------------------------------------------------------------------


def mixture(z: Tensor) -> Tensor:
    """The log-density of two Gaussians of variance 0.25 at 0 and 1, one with weight 0.7, up to a constant."""
    z = z.flatten(1)[:, 0]
    near = math.log(0.7) - z.square() / 0.5
    far = math.log(0.3) - (z - 1).square() / 0.5
    return torch.logaddexp(near, far)


def downhill(log_density, z, **options):
    """A twin that walks down the density."""
    return langevin(lambda at: -log_density(at), z, **options)


def half_a_step(log_density, z, *, step, **options):
    """A twin that takes the gradient's half without the noise's."""
    return langevin(log_density, z, step=step / 2, **options)


def repeated(log_density, z, *, steps, step, noise, generator):
    """A twin whose steps all have the same noise."""
    state = generator.get_state()
    for _ in range(steps):
        generator.set_state(state)
        (z,) = langevin(log_density, z, steps=1, step=step, noise=noise, generator=generator)
        yield z


def kept_gradient(log_density, z, *, steps, step, noise, generator):
    """A twin that looks at the gradient only where it began."""
    at = z.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(log_density(at).sum(), at)
    for _ in range(steps):
        z = z + step * gradient + noise * torch.randn(z.shape, generator=generator)
        yield z


WALKS = {
    "downhill": dict(walk=downhill),
    "half a step": dict(walk=half_a_step),
    "the same noise": dict(walk=repeated),
    "the first gradient": dict(walk=kept_gradient),
}


@rejected(WALKS)
def test_a_walk_of_short_steps_ends_in_the_density_of_a_mixture(walk=langevin):
    """Mean 0.3, variance 0.25 + 0.7 0.3, and 70 % within reach of the nearer: from a uniform start, 4000 chains."""
    step = 0.01
    start = uniform((4000, 1, 1, 1), seeded(1))
    noise = math.sqrt(2 * step)
    *_, z = walk(mixture, start, steps=600, step=step, noise=noise, generator=seeded(2))
    variance = 0.25 + 0.7 * 0.3
    assert abs(float(z.mean()) - 0.3) < 4 * math.sqrt(variance / 4000)
    assert abs(float(z.var()) / variance - 1) < 0.08
    below = 0.7 * normal(0.5 / 0.5) + 0.3 * normal(-0.5 / 0.5)
    assert abs(float((z < 0.5).float().mean()) - below) < 4 * math.sqrt(below * (1 - below) / 4000)


def normal(value: float) -> float:
    """The standard normal's distribution function."""
    return 0.5 * (1 + math.erf(value / math.sqrt(2)))


@rejected(WALKS)
def test_a_walk_has_the_variance_of_its_temperature(walk=langevin):
    """Of a Gaussian of variance v exactly noise^2 / (1 - (1 - step/v)^2), which short steps make temperature times v."""
    v = 0.5
    for step, noise in ((0.05, math.sqrt(0.1)), (0.2, 0.1), (0.02, 0.05)):
        start = torch.zeros(4000, 2, 1, 1)

        def log_density(z):
            return -z.square().flatten(1).sum(1) / (2 * v)

        *_, z = walk(log_density, start, steps=150, step=step, noise=noise, generator=seeded(3))
        exact = noise**2 / (1 - (1 - step / v) ** 2)
        assert abs(float(z.var()) / exact - 1) < 0.08
        assert exact / (temperature(step, noise) * v) == pytest.approx(1 / (1 - step / (2 * v)))
    assert temperature(1.0, 0.01) == pytest.approx(5e-5), "the paper's"


def test_a_walk_draws_from_its_generator_alone():
    before = torch.get_rng_state()
    options = dict(steps=3, step=0.1, noise=0.2)
    z = torch.zeros(5, 1, 1, 1)
    one, same, other = (
        list(langevin(mixture, z, generator=seeded(seed), **options)) for seed in (1, 1, 2)
    )
    assert torch.equal(torch.get_rng_state(), before) and len(one) == 3
    assert all(torch.equal(*pair) for pair in zip(one, same, strict=True))
    assert not torch.equal(one[0], other[0]) and torch.equal(z, torch.zeros(5, 1, 1, 1))
    with torch.no_grad():
        assert torch.equal(list(langevin(mixture, z, generator=seeded(1), **options))[-1], one[-1])


@pytest.mark.parametrize(
    "changes, sentence",
    [
        (dict(steps=0), "expected steps as a whole number of at least 1"),
        (dict(step=0.0), "expected step > 0"),
        (dict(noise=-1.0), "expected noise"),
        (dict(noise=math.nan), "expected noise"),
        (dict(z=torch.zeros(3)), r"expected images of shape \[B,C,H,W\]"),
        (dict(z=torch.full((1, 1, 2, 2), math.nan)), "expected finite images"),
    ],
)
def test_a_walk_that_cannot_be_meant_gets_a_sentence(changes, sentence):
    options = dict(z=torch.zeros(2, 1, 1, 1), steps=2, step=0.1, noise=0.1, generator=seeded())
    with pytest.raises(ValueError, match=sentence):
        langevin(mixture, **(options | changes))


# -- the density ------------------------------------------------------------------------------------------------------


def test_the_density_is_the_sum_of_those_of_the_classes():
    """log p(x, y) - log p(x) = log p(y | x), and a constant that all logits gain is one of the density alone."""
    classifier = tiny()
    x = data.digits().test_images[:6]
    z = units.to_model(x)
    with torch.no_grad():
        logits = classifier(x)
        density = classifier.log_density(z)
        assert torch.allclose(density.exp(), logits.exp().sum(1), rtol=1e-5)
        assert torch.allclose((logits - density[:, None]).exp(), classifier.posterior(x), atol=1e-6)
        classifier.network.leave.bias += 3.0
        assert torch.allclose(classifier.log_density(z), density + 3, atol=1e-4)
    assert classifier.deterministic and classifier.scale == "nats"


def mean_energy(classifier: JointClassifier, z: Tensor) -> Tensor:
    """Mean of -log sum_y exp f_y, from the logits."""
    return -classifier.network.logits(units.to_pixel(z), ()).exp().sum(1).log().mean()


@rejected(
    {
        "the wrong sign": dict(gap=lambda c, x, z: -likelihood_gap(c, x, z)),
        "data alone": dict(gap=lambda c, x, z: mean_energy(c, x)),
        "swapped": dict(gap=lambda c, x, z: likelihood_gap(c, z, x)),
        "half": dict(gap=lambda c, x, z: likelihood_gap(c, x, z) / 2),
    }
)
def test_the_gradient_is_the_difference_of_those_of_two_energies(gap=likelihood_gap):
    """By finite differences of the energies along random ways in the space of the weights."""
    classifier = tiny().double()
    x = 1.8 * uniform((5, *SHAPE), seeded(1)).double().clamp(-0.5, 0.5)
    z = 0.9 * uniform((7, *SHAPE), seeded(2)).double()
    own = [p for p in classifier.parameters()]
    slopes = torch.autograd.grad(gap(classifier, x, z), own, allow_unused=True)
    for way in range(3):
        source = seeded(10 + way)
        ways = [torch.randn(p.shape, generator=source, dtype=p.dtype) for p in own]
        heights = []
        for h in (1e-5, -1e-5):
            with torch.no_grad():
                for p, one in zip(own, ways, strict=True):
                    p += h * one
                heights.append(mean_energy(classifier, x) - mean_energy(classifier, z))
                for p, one in zip(own, ways, strict=True):
                    p -= h * one
        wanted = (heights[0] - heights[1]) / 2e-5
        got = sum((s * one).sum() for s, one in zip(slopes, ways, strict=True) if s is not None)
        assert torch.allclose(got, wanted, rtol=1e-5, atol=1e-9)


class Lattice(torch.nn.Module):
    """A density on five points whose normaliser is known: log p = w_i - log sum_j exp w_j."""

    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.tensor([0.3, -1.0, 0.7, 0.1, -0.4], dtype=torch.float64))

    def log_density(self, z: Tensor) -> Tensor:
        """The point's own weight. Shapes: indices [B] -> [B]."""
        return self.w[z]


@rejected(
    {
        "the wrong sign": dict(gap=lambda m, x, z: -likelihood_gap(m, x, z)),
        "twice": dict(gap=lambda m, x, z: 2 * likelihood_gap(m, x, z)),
    }
)
def test_with_exact_draws_the_gradient_is_that_of_the_likelihood(gap=likelihood_gap):
    """Draws that come as often as the model says, in thousandths: the gradient of -log p itself, normaliser included."""
    model = Lattice()
    points = torch.tensor([0, 0, 2, 3])
    exact = -(model.w - model.w.logsumexp(0))[points].mean()
    (wanted,) = torch.autograd.grad(exact, model.w)
    counts = (200_000 * model.w.detach().softmax(0)).round().long()
    drawn = torch.arange(5).repeat_interleave(counts)
    (got,) = torch.autograd.grad(gap(model, points, drawn), model.w)
    assert torch.allclose(got, wanted, atol=1e-4)


# -- the loss ---------------------------------------------------------------------------------------------------------


def test_chains_go_on_where_they_stood_and_a_few_begin_anew():
    classifier = tiny()
    before = classifier.replay.clone()
    still = Chains(steps=1, step=1e-9, noise=0.0, restart=0.0)
    end = moved_chains(classifier, 5, still, seeded(4))
    assert torch.allclose(classifier.replay, before, atol=1e-6), "a walk that stands still"
    chosen = torch.randperm(12, generator=seeded(4))[:5]
    assert torch.equal(end, classifier.replay[chosen]) and len(chosen.unique()) == 5
    moved_chains(classifier, 5, replace(still, noise=0.5), seeded(4))
    moved = (classifier.replay - before).abs().amax((1, 2, 3)) > 1e-3
    assert set(moved.nonzero()[:, 0].tolist()) == set(chosen.tolist())
    classifier.replay.fill_(7.0)
    moved_chains(classifier, 12, replace(still, restart=0.25), seeded(5))
    anew = classifier.replay.abs().amax((1, 2, 3)) < 2
    assert 1 <= int(anew.sum()) <= 6
    with pytest.raises(
        ValueError, match="a batch of at most 12 images, one for each chain, got 13"
    ):
        moved_chains(classifier, 13, still, seeded())
    with pytest.raises(ValueError, match=r"begin anew in \[0, 1\], got 5"):
        Chains(restart=5)


def test_the_chains_climb_the_density():
    """By the square of the slope that they start on, times the step, where nothing pushes them about."""
    classifier = tiny(chains=40).double()
    start = classifier.replay.clone().requires_grad_()
    before = classifier.log_density(start)
    (slope,) = torch.autograd.grad(before.sum(), start)
    moved_chains(classifier, 40, Chains(steps=1, noise=0.0, restart=0.0), seeded())
    gain = (classifier.log_density(classifier.replay) - before).detach()
    assert torch.allclose(gain, slope.square().sum((1, 2, 3)), rtol=0.05)
    assert float(gain.min()) > 0


def test_the_loss_is_cross_entropy_and_the_gap_on_blurred_data():
    classifier = tiny()
    x = data.digits().train_images[:6]
    y = data.digits().train_labels[:6]
    chains = Chains(steps=2, blur=0.3, weight=0.5)
    twin = tiny()
    value = joint_loss(chains)(classifier, x, y, seeded(5))
    source = seeded(5)
    drawn = moved_chains(twin, 6, chains, source)
    eps = torch.randn(x.shape, generator=source)
    blurred = x + 0.15 * eps  # half as much as in model space
    gap = mean_energy(classifier, units.to_model(x) + 0.3 * eps) - mean_energy(classifier, drawn)
    wanted = cross_entropy(classifier.network.logits(blurred, ()), y) + 0.5 * gap
    assert torch.allclose(value, wanted, atol=1e-5)
    sharp = cross_entropy(classifier(x), y) + 0.5 * gap
    assert not torch.allclose(value, sharp, atol=1e-4) and float(gap.detach().abs()) > 1e-3
    assert not torch.allclose(value, wanted - gap, atol=1e-4)
    assert torch.equal(classifier.replay, twin.replay)


def test_a_batch_is_the_mean_of_its_slices():
    """Each picture beside its own blur and its own chain; the chains have moved once, for all slices."""
    classifier = tiny()
    x = data.digits().train_images[:8]
    y = data.digits().train_labels[:8]
    loss = joint_loss(Chains(steps=2, blur=0.5))
    noise = loss.draw(classifier, x, y, seeded(3))
    whole = loss.value(classifier, x, y, noise)
    for size in (4, 3, 1):
        total = 0.0
        for start in range(0, 8, size):
            kept = slice(start, start + size)
            part = loss.value(classifier, x[kept], y[kept], take(noise, kept))
            total += float(part.detach()) * len(x[kept]) / 8
        assert total == pytest.approx(float(whole.detach()), rel=1e-5)
    drawn, eps = noise
    other = loss.value(classifier, x, y, (drawn, eps.flip(0)))
    assert not torch.allclose(other, whole, rtol=1e-5)


# -- a run, and one that diverges -------------------------------------------------------------------------------------


def joint_run(tmp_path=None, *, loss=None, steps=8, save_every=2, seed=0, **options) -> Training:
    """A short run of a small network on digits."""
    world = data.digits()
    return Training(
        tiny(seed),
        world.train_images,
        world.train_labels,
        loss=loss or joint_loss(Chains(steps=2)),
        steps=steps,
        seed=seed,
        save_every=save_every,
        checkpoint=tmp_path and tmp_path / "run",
        **{**dict(batch=8, rate=1e-3, ema=0.9), **options},
    )


def spiked(at: tuple[int, ...], height: float) -> losses.Loss:
    """A loss that passes its limit in these steps, weights spoilt by its gradient: a run that diverges when it is told."""
    whole = joint_loss(Chains(steps=2))
    taken = []

    def value(classifier, images, labels, noise):
        taken.append(1)
        right = whole.value(classifier, images, labels, noise)
        return (
            right + height * classifier.network.leave.bias.exp().sum()
            if len(taken) in at
            else right
        )

    return replace(whole, value=value)


@pytest.mark.parametrize("height", [1e3, math.nan, math.inf])
def test_a_run_that_diverges_goes_back_to_its_last_good_state_and_says_so(height):
    run = joint_run(loss=spiked((6,), height))
    states = {}
    with pytest.warns(UserWarning, match=r"beyond 100: the run has diverged and goes .* \(1 of at"):
        for progress in run:
            states[progress.step] = {n: v.clone() for n, v in run._state().items()}
    assert run.fallen == [5] and run.facts()["diverged_at_steps"] == [5]
    assert len(states) == 8, "the run goes on to its end"
    for name, wanted in states[4].items():
        assert torch.equal(states[6][name], wanted), name
    assert not torch.equal(states[5]["now.replay"], states[4]["now.replay"])
    moved = [n for n in states[8] if not torch.equal(states[8][n], states[6][n])]
    assert "now.replay" in moved and "now.network.enter.weight" in moved
    assert all(bool(torch.isfinite(v).all()) for v in states[8].values() if v.is_floating_point())


def test_a_run_that_goes_on_diverging_is_given_up(monkeypatch):
    monkeypatch.setattr(loop, "MOST_FALLS", 2)
    run = joint_run(loss=spiked(tuple(range(3, 9)), 1e3))
    with (
        warnings.catch_warnings(),
        pytest.raises(FloatingPointError, match="gone back 2 times; lower the rate"),
    ):
        warnings.simplefilter("ignore")
        list(run)
    assert run.fallen == [2, 3]


def test_a_rate_that_is_far_too_large_is_found_out():
    """No spike is planted here: the density is raised where chains cannot follow, and its steps are a thousand times JEM's."""
    run = joint_run(loss=joint_loss(Chains(steps=5, step=10.0)), steps=40, rate=1.0)
    with (
        pytest.warns(UserWarning, match="the run has diverged"),
        pytest.raises(FloatingPointError, match=r"gone back 10 times; lower the rate \(1\)"),
    ):
        list(run)
    assert len(run.fallen) == 10 and run.fallen[0] > 1


def test_a_run_without_a_limit_has_nothing_to_say_of_it():
    run = joint_run(loss=replace(joint_loss(Chains(steps=1)), limit=None), steps=1)
    list(run)
    assert "diverged_at_steps" not in run.facts() and run.good == {}
    assert joint_loss(Chains()).limit == LIMIT == 100


@pytest.mark.parametrize("cut", [1, 5, 6, 7])
def test_a_run_that_was_stopped_has_the_chains_and_the_good_state_of_an_unbroken_one(cut, tmp_path):
    """Saved every three steps; it diverges in its seventh, when a run stopped after five or six has one of three or six."""

    def loss(number):
        return spiked((number,), 1e3)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole = joint_run(tmp_path / "whole", loss=loss(7), steps=9, save_every=3)
        list(whole)
        for progress in joint_run(tmp_path / "cut", loss=loss(7), steps=9, save_every=3):
            if progress.step == cut:
                break
        again = joint_run(tmp_path / "cut", loss=loss(7 - cut), steps=9, save_every=3)
        assert again.step == cut
        list(again)
    assert again.fallen == whole.fallen == [6]
    for name, wanted in whole._state().items():
        assert torch.equal(again._state()[name], wanted), name


def test_the_average_has_the_chains_of_the_network_that_it_averages():
    run = joint_run()
    list(run)
    assert torch.equal(run.average.replay, run.denoiser.replay)
    assert not torch.equal(run.average.replay, tiny().replay)
    moved = run.average.network.enter.weight - run.denoiser.network.enter.weight
    assert float(moved.detach().abs().max()) > 0


def test_the_recipe_is_the_papers_and_its_card_says_what_became_of_it(tmp_path):
    paper = dict(steps=20, step=1.0, noise=0.01, restart=0.05, blur=0.03, weight=1.0)
    shorter = {"cifar10": dict(steps=10)}  # what one core can carry
    for world, name in networks.JOINT.items():
        recipe = RECIPES[name]
        assert recipe.says["recipe"]["chains"] == paper | shorter.get(world, {})
        assert recipe.method == "jem"
        assert recipe.command == networks.command_for(name)
    *_, last = train(JEM, tmp_path, steps=3, batch=8, widths=(4, 8), measured=10)
    classifier, card = joint.load(tmp_path / JEM)
    assert last.step == 3 and card["diverged_at_steps"] == []
    assert card["recipe"]["chains"] == paper and card["accuracy"]["n"] == 10
    inner = dict(network="WideClassifier", widths=[4, 8], blocks=1, normed=False)
    wanted = dict(network="JointClassifier", inner=inner, chains=1000)
    assert card["settings"]["config"] == wanted
    begun = recipes.RECIPES[JEM].build(recipes.Beginning(SHAPE, 10, widths=(4, 8)))
    gone = (classifier.replay - begun.replay).abs().amax((1, 2, 3)) > 1e-2
    assert 8 <= int(gone.sum()) <= 24


# -- pictures and files -----------------------------------------------------------------------------------------------


def test_samples_are_the_chains_as_pictures_each_once():
    classifier = tiny()
    classifier.replay.mul_(2)
    all_of_them = classifier.samples(12, seeded(1))
    assert all_of_them.shape == (12, 1, 8, 8) and len(all_of_them.unique(dim=0)) == 12
    assert float(all_of_them.min()) == 0 and float(all_of_them.max()) == 1
    inside = units.to_pixel(classifier.replay).clamp(0, 1)
    assert torch.equal(all_of_them.sort(0).values, inside.sort(0).values)
    assert torch.equal(classifier.samples(4, seeded(1)), all_of_them[:4])
    for count in (0, 13, "x"):
        with pytest.raises((ValueError, TypeError), match="count"):
            classifier.samples(count, seeded())


def test_weights_and_chains_travel_bit_for_bit(tmp_path):
    classifier = tiny()
    x = data.digits().test_images[:4]
    joint.save(classifier, tmp_path / "j.safetensors", {"name": "j"})
    loaded, card = joint.load(tmp_path / "j.safetensors")
    assert card == {"name": "j"} and torch.equal(loaded(x), classifier(x))
    assert torch.equal(loaded.replay, classifier.replay)
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())


def test_a_file_may_hold_fewer_chains_than_were_walked(tmp_path):
    classifier = tiny()
    joint.save(classifier, tmp_path / "few.safetensors", chains=3)
    again, _ = joint.load(tmp_path / "few.safetensors")
    assert torch.equal(again.replay, classifier.replay[:3]) and len(classifier.replay) > 3
    joint.save(classifier, tmp_path / "all.safetensors", chains=10**6)
    again, _ = joint.load(tmp_path / "all.safetensors")
    assert torch.equal(again.replay, classifier.replay)


def test_a_foreign_file_or_network_is_told(tmp_path):
    cnn.save(ConvClassifier(SHAPE, 10, (4, 4)), tmp_path / "c.safetensors")
    with pytest.raises(ValueError, match="expected c.safetensors to hold a JointClassifier, got"):
        joint.load(tmp_path / "c.safetensors")
    joint.save(tiny(), tmp_path / "j.safetensors")
    with pytest.raises(ValueError, match=r"expected j.safetensors to hold a plain network \(Conv"):
        cnn.load(tmp_path / "j.safetensors")
    state, architecture, _ = weights.load_weights(tmp_path / "j.safetensors")
    named = {"architecture": json.dumps(architecture | dict(chains=3))}
    from safetensors.torch import save_file

    save_file(state, tmp_path / "j.safetensors", named)
    with pytest.raises(
        ValueError, match="expected weights of JointClassifier in j.safetensors, but"
    ):
        joint.load(tmp_path / "j.safetensors")
    with pytest.raises(ValueError, match="expected a WideClassifier, .*, got ConvClassifier"):
        JointClassifier.begun(ConvClassifier(SHAPE, 10, (4, 4)), 3)
    with pytest.raises(ValueError, match="expected chains as a whole number of at least 1"):
        tiny(chains=0)


@pytest.fixture(scope="module")
def shipped():
    """The trained classifier of digits and its card."""
    return joint.load(assets.verified(JEM))


def test_the_shipped_network_is_as_accurate_as_its_card_says(shipped):
    classifier, card = shipped
    world = data.digits()
    stated = card["accuracy"]
    correct = accuracies.accuracy(classifier, world.test_images, world.test_labels)
    assert correct >= 0.95 * 400 and abs(correct - stated["correct"]) <= 1 and stated["n"] == 400
    assert (stated["low"], stated["high"]) == pytest.approx(
        intervals.interval(stated["correct"], 400)
    )
    assert card["name"] == JEM and card["recipe"]["chains"]["steps"] == 20
    assert all(0 <= step < card["settings"]["steps"] for step in card["diverged_at_steps"])


def likeness(pictures: Tensor, digits: Tensor) -> float:
    """The correlation of two mean pictures. Shapes: [N,...], [M,...] -> a number."""
    means = torch.stack([pictures.mean(0).flatten(), digits.mean(0).flatten()])
    return float(torch.corrcoef(means)[0, 1])


def test_its_chains_stand_among_digits_in_its_own_density_and_to_the_eye(shipped):
    """As likely as test digits, which noise is not; and their mean picture is a mean digit, which that of noise is not."""
    classifier, _ = shipped
    digits = data.digits().test_images
    drawn = classifier.samples(400, seeded())
    scattered = torch.rand(digits.shape, generator=seeded(1))
    with torch.no_grad():
        heights = [classifier.log_density(units.to_model(x)) for x in (digits, drawn, scattered)]
    real, own, noise = (float(height.mean()) for height in heights)
    assert abs(real - own) < 1 < real - noise, (real, own, noise)
    assert likeness(drawn, digits) > 0.9 > 0.5 > likeness(scattered, digits)
    for x in (digits, drawn):
        assert float((x.flatten(1).std(0)).mean()) > 0.15, "not one picture again and again"
