"""Text-to-image models as classifiers: from a saved folder to a posterior, offline, at a cost that is said before."""

import json
import math
from types import SimpleNamespace

import contract
import huggingface_hub
import pytest
import torch
import twins
from diffclass import likelihood, noise, units
from diffclass.classifiers import racing, zero_shot
from diffclass.classifiers.base import flop
from diffclass.classifiers.zero_shot import ZeroShotClassifier
from diffclass.denoisers import latent, pipelines, tiny
from diffclass.denoisers.flow import FlowDenoiser
from diffclass.denoisers.latent import Autoencoder, LatentModel
from diffclass.denoisers.pretrained import ScheduledDenoiser

PROMPTS = [f"a photo of a {name}." for name in tiny.NAMES]


@pytest.fixture(scope="module")
def sd(tmp_path_factory):
    """A tiny Stable Diffusion pipeline: its folder, and itself."""
    return tiny.stable_diffusion(tmp_path_factory.mktemp("sd"))


@pytest.fixture(scope="module")
def sd3(tmp_path_factory):
    """A tiny Stable Diffusion 3 pipeline: its folder, and itself."""
    return tiny.stable_diffusion_3(tmp_path_factory.mktemp("sd3"))


@pytest.fixture(scope="module")
def dit(tmp_path_factory):
    """A tiny DiT pipeline: its folder, and itself."""
    return tiny.dit(tmp_path_factory.mktemp("dit"))


@pytest.fixture(scope="module")
def model(sd):
    """The tiny Stable Diffusion pipeline as a model of three classes."""
    return pipelines.from_pipeline(sd[0], tiny.NAMES)


def pictures(count=2, side=8):
    """Pictures in [0,1]."""
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(0))


def latents(count=2):
    """Latents of the tiny pipelines."""
    return torch.randn(count, 4, 4, 4, generator=torch.Generator().manual_seed(1))


def drawn(classifier, images, seed=0):
    """The noise of pictures."""
    return classifier.sample_noise(images, torch.Generator().manual_seed(seed))


def as_built(build, seed=0):
    """A twin of `tiny.seeded` that keeps what the network's own class has drawn."""
    return build().eval()


def of_one_size(build, seed=0):
    """A twin that draws every weight from the same normal."""
    network = tiny.seeded(build, seed)
    for weight in network.parameters():
        if weight.ndim > 1:
            weight.data.mul_(math.sqrt(weight[0].numel()))
    return network


@twins.rejected({"as built": dict(seeded=as_built), "of one size": dict(seeded=of_one_size)})
def test_a_tiny_network_is_the_same_every_time_and_leaves_no_trace(seeded=tiny.seeded):
    before = torch.get_rng_state()
    first, second, other = (seeded(tiny.unet, seed).state_dict() for seed in (0, 0, 1))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(first[name], second[name]) for name in first)
    name = "conv_in.weight"
    assert not torch.equal(first[name], other[name])
    assert float(first[name].std()) == pytest.approx(36**-0.5, rel=0.15)
    assert torch.equal(first["conv_in.bias"], torch.zeros(8))


# ---------------------------------------------------------------------------------------------------------------------
# Denoisers: what the pipeline's own network says at its own timestep


@torch.no_grad()
def test_stable_diffusion_is_a_denoiser_of_its_prompts(sd, model):
    _, pipeline = sd
    x = latents()
    t = 300
    abar = pipeline.scheduler.alphas_cumprod[t]
    sigma = noise.sigma_of_alpha_bar(abar)
    texts = pipeline.encode_prompt([*PROMPTS, ""], torch.device("cpu"), 1, False)[0]
    got = model.denoiser(x, float(sigma), range(4))
    for k in range(4):
        text = texts[k].expand(2, -1, -1)
        eps = pipeline.unet(x * abar.sqrt(), t, encoder_hidden_states=text).sample
        torch.testing.assert_close(got[:, k], x - sigma * eps, rtol=1e-3, atol=1e-4)
    assert (got[:, 0] - got[:, 1]).abs().max() > 1e-3
    torch.testing.assert_close(model.denoiser.unconditional(x, float(sigma)), got[:, 3])


@torch.no_grad()
def test_stable_diffusion_3_is_a_denoiser_of_its_prompts(sd3):
    folder, pipeline = sd3
    model = pipelines.from_pipeline(folder, tiny.NAMES)
    told = [*PROMPTS, ""]
    place = torch.device("cpu")
    texts, _, pooled, _ = pipeline.encode_prompt(told, told, told, place, 1, False)
    x = latents()
    t = 0.3
    got = model.denoiser(x / (1 - t), t / (1 - t), range(4))
    for k in range(4):
        velocity = pipeline.transformer(
            hidden_states=x,
            timestep=torch.full((2,), 1000 * t),
            encoder_hidden_states=texts[k].expand(2, -1, -1),
            pooled_projections=pooled[k].expand(2, -1),
        ).sample
        torch.testing.assert_close(got[:, k], x - t * velocity, rtol=1e-3, atol=1e-4)
    assert (got[:, 0] - got[:, 1]).abs().max() > 1e-4


@torch.no_grad()
def test_flux_is_a_denoiser_of_its_prompts(tmp_path):
    folder, pipeline = tiny.flux(tmp_path)
    model = pipelines.from_pipeline(folder, tiny.NAMES, size=8)
    texts, pooled, places = pipeline.encode_prompt([*PROMPTS, ""], None, torch.device("cpu"))
    x = latents()
    t = 0.3
    packed = pipeline._pack_latents(x, 2, 4, 4, 4)
    ids = pipeline._prepare_latent_image_ids(2, 2, 2, "cpu", torch.float32)
    got = model.denoiser(x / (1 - t), t / (1 - t), range(4))
    for k in range(4):
        velocity = pipeline.transformer(
            hidden_states=packed,
            timestep=torch.full((2,), t),
            encoder_hidden_states=texts[k].expand(2, -1, -1),
            pooled_projections=pooled[k].expand(2, -1),
            img_ids=ids,
            txt_ids=places,
        ).sample
        velocity = pipeline._unpack_latents(velocity, 8, 8, 2)
        torch.testing.assert_close(got[:, k], x - t * velocity, rtol=1e-3, atol=1e-4)
    assert model.denoiser.shift == 1 and "mu" in " ".join(model.denoiser.notes)
    with pytest.raises(ValueError, match="the size of the pictures, which Flux's config does not"):
        pipelines.from_pipeline(folder, tiny.NAMES)
    with pytest.raises(ValueError, match="a size that 4 divides"):
        pipelines.from_pipeline(folder, tiny.NAMES, size=10)


@torch.no_grad()
def test_dit_is_a_denoiser_of_its_labels(dit):
    folder, pipeline = dit
    model = pipelines.from_pipeline(folder, ["ship", "tench"])
    x = latents()
    abar = pipeline.scheduler.alphas_cumprod[300]
    sigma = noise.sigma_of_alpha_bar(abar)
    got = model.denoiser(x, float(sigma), range(3))
    for k, label in enumerate((2, 0, 3)):
        answer = pipeline.transformer(
            x * abar.sqrt(), timestep=torch.full((2,), 300), class_labels=torch.full((2,), label)
        ).sample
        torch.testing.assert_close(got[:, k], x - sigma * answer[:, :4], rtol=1e-3, atol=1e-4)
    everyone = pipelines.from_pipeline(folder)
    assert everyone.names == ("tench, Tinca tinca", "goldfish", "ship")
    with pytest.raises(ValueError, match="names among the 4 labels of pipeline, got 'dog'"):
        pipelines.from_pipeline(folder, ["ship", "dog"])
    with pytest.raises(ValueError, match="of which two are one class"):
        pipelines.from_pipeline(folder, ["tench", "Tinca tinca"])


def test_what_the_network_predicts_is_read_from_its_scheduler(tmp_path, sd):
    from diffusers import DDIMScheduler

    told = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    other = DDIMScheduler(**told, prediction_type="v_prediction", clip_sample=False)
    folder, _ = tiny.stable_diffusion(tmp_path, other)
    one = pipelines.from_pipeline(folder, tiny.NAMES).denoiser
    assert one.predicts == "v_prediction"
    assert (
        one(latents(), 1.0) - pipelines.from_pipeline(sd[0], tiny.NAMES).denoiser(latents(), 1.0)
    ).abs().max() > 1e-3
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(path.read_text().replace("v_prediction", "flow_prediction"))
    with pytest.raises(
        ValueError, match="predicts one of epsilon, v_prediction, sample, got 'flow"
    ):
        pipelines.from_pipeline(folder, tiny.NAMES)


# ---------------------------------------------------------------------------------------------------------------------
# Levels of a folder


def as_set_by_a_pipeline(path):
    """Levels read from a scheduler after `set_timesteps`, whose ends are shifted twice."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler.from_config(json.loads(path.read_text()))
    scheduler.set_timesteps(1000)
    sigmas = scheduler.sigmas.double()
    low, high = sigmas[-2], sigmas[1]
    return (float(low / (1 - low)), float(high / (1 - high))), 3.0, ()


def unshifted(path):
    """Levels that leave the shift out."""
    return (1 / 999, 999.0), 3.0, ()


@pytest.fixture(scope="module")
def schedules(tmp_path_factory):
    """Settings of flow schedulers by shift, written by diffusers."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    folder = tmp_path_factory.mktemp("schedules")
    for shift in (1.0, 3.0):
        FlowMatchEulerDiscreteScheduler(shift=shift).save_pretrained(folder / str(shift))
    return folder


@pytest.mark.parametrize(
    "read, right",
    [(pipelines.read_flow_schedule, True), (as_set_by_a_pipeline, False), (unshifted, False)],
)
def test_the_levels_of_a_flow_are_shifted_once(schedules, read, right):
    from diffusers import FlowMatchEulerDiscreteScheduler

    (low, high), shift, notes = read(schedules / "3.0" / "scheduler_config.json")
    t = FlowMatchEulerDiscreteScheduler(shift=3.0).sigmas.double()  # 1 first, as it is made
    wanted = (t[-1] / (1 - t[-1]), t[1] / (1 - t[1]))
    agrees = math.isclose(low, wanted[0], rel_tol=1e-4) and math.isclose(
        high, wanted[1], rel_tol=1e-3
    )
    assert agrees is right and shift == 3 and notes == ()
    assert pipelines.read_flow_schedule(schedules / "1.0" / "scheduler_config.json")[1] == 1


def test_a_pipeline_that_has_made_pictures_gives_the_same_posterior(tmp_path, sd3):
    folder, pipeline = sd3
    posteriors = []
    for steps in (None, 1000, 28):
        if steps is not None:
            pipeline.scheduler.set_timesteps(steps)
            pipeline.save_pretrained(tmp_path / str(steps))
        model = pipelines.from_pipeline(
            folder if steps is None else tmp_path / str(steps), tiny.NAMES
        )
        classifier = ZeroShotClassifier(model, model.denoiser.grid(6), chunk=8)
        posteriors.append(classifier.posterior(pictures(1), drawn(classifier, 1)))
    assert torch.equal(posteriors[0], posteriors[1]) and torch.equal(posteriors[0], posteriors[2])


@pytest.mark.parametrize("predicts", ["epsilon", "v_prediction", "sample"])
def test_a_step_of_ddim_is_the_one_that_our_denoiser_gives(predicts):
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear", prediction_type=predicts, clip_sample=False
    )
    scheduler.set_timesteps(5)
    network = Counting()
    denoiser = ScheduledDenoiser(network, scheduler.betas, predicts, 3, (4, 4, 4), has_null=True)
    z = latents()
    label = torch.ones(2, dtype=torch.long)
    for t in scheduler.timesteps[:-1]:
        said = network(z, t.expand(2).float(), label).sample
        abar, after = (scheduler.alphas_cumprod[step] for step in (t, t - 200))
        sigma = noise.sigma_of_alpha_bar(abar)
        x0 = denoiser(z / abar.sqrt(), float(sigma), [1])[:, 0]
        eps = (z - abar.sqrt() * x0) / (1 - abar).sqrt()
        z = scheduler.step(said, t, z).prev_sample
        torch.testing.assert_close(
            after.sqrt() * x0 + (1 - after).sqrt() * eps, z, rtol=1e-3, atol=1e-3
        )


def test_a_step_of_a_flow_is_the_one_that_our_denoiser_gives():
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(6)
    network = Counting()

    def velocity(x_t, t, classes):
        return network(x_t, 1000 * t, classes).sample

    denoiser = FlowDenoiser(velocity, 3, (4, 4, 4), (1e-3, 1e3))
    x = latents()
    scheduler.set_begin_index(1)  # at t = 1 there is nothing but noise
    for t, after in zip(scheduler.sigmas[1:-1], scheduler.sigmas[2:], strict=True):
        x0 = denoiser(x / (1 - t), float(t / (1 - t)), [1])[:, 0]
        said = network(x, torch.full((2,), 1000 * float(t)), torch.ones(2, dtype=torch.long)).sample
        ours = x + (after - t) * (x - x0) / t
        x = scheduler.step(said, 1000 * t, x).prev_sample
        torch.testing.assert_close(ours, x, rtol=1e-4, atol=1e-4)


def strided(chain, count):
    """A twin of `timestep_levels` that takes every floor(T / count)-th timestep, and may not reach the last."""
    stride = len(chain) // count
    steps = torch.arange(count) * stride + stride // 2
    return noise.Levels(chain[steps], chain[steps] * 0.999, chain[steps] * 1.001)


def from_the_first(chain, count):
    """A twin that begins with the first timestep of every stretch."""
    steps = torch.arange(count) * len(chain) // count
    return noise.Levels(chain[steps], chain[steps] * 0.999, chain[steps] * 1.001)


@twins.rejected({"strides": dict(grid=strided), "first of each": dict(grid=from_the_first)})
def test_timesteps_are_those_of_the_released_code_and_cover_the_chain(grid=noise.timestep_levels):
    sigma = noise.sigma_of_alpha_bar(noise.alpha_bar(noise.scaled_linear_betas()))
    levels = grid(sigma, 500)
    assert torch.equal(levels.sigma, sigma[1::2])
    torch.testing.assert_close(levels.lower[1:], sigma[2::2])
    assert torch.equal(levels.upper[:-1], levels.lower[1:])
    assert float(levels.lower[0]) == float(sigma[0]) and float(levels.upper[-1]) == float(sigma[-1])
    # a chain whose last step is pure noise has 999
    assert torch.equal(grid(sigma[:999], 500).sigma[[0, -1]], sigma[[0, 998]])
    assert torch.equal(grid(sigma, 200).sigma, sigma[2::5])
    assert torch.equal(grid(sigma, 1000).sigma, sigma)
    torch.testing.assert_close(grid(sigma, 1000).lower[1:], (sigma[1:] * sigma[:-1]).sqrt())


def test_a_pipelines_grid_is_that_of_its_own_chain(model, sd):
    sigma = noise.sigma_of_alpha_bar(sd[1].scheduler.alphas_cumprod.double())
    levels = model.denoiser.grid(500)
    torch.testing.assert_close(levels.sigma, sigma[1::2], rtol=1e-5, atol=0)
    with pytest.raises(ValueError, match="as many levels as the ascending chain has timesteps"):
        model.denoiser.grid(1001)


# ---------------------------------------------------------------------------------------------------------------------
# The autoencoder


class WithoutShift(Autoencoder):
    """An autoencoder that forgets the shift."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.shift = 0.0


class OfPixels(Autoencoder):
    """An autoencoder that is shown [0,1]."""

    def encode(self, x):
        return (self.vae.encode(x).latent_dist.mode() - self.shift) * self.scale


class WithTheConstant(Autoencoder):
    """An autoencoder with Stable Diffusion 1's constant."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.scale = 0.18215


@twins.rejected(
    {
        "no shift": dict(kind=WithoutShift),
        "pixels": dict(kind=OfPixels),
        "another's constant": dict(kind=WithTheConstant),
    }
)
@torch.no_grad()
def test_latents_are_scaled_and_shifted(kind=Autoencoder):
    vae = tiny.seeded(lambda: tiny.autoencoder(scaling_factor=1.5305, shift_factor=0.0609)).eval()
    ours = kind(vae, (4, 4, 4))
    x = pictures()
    mode = vae.encode(2 * x - 1).latent_dist.mode()
    torch.testing.assert_close(ours.encode(x), (mode - 0.0609) * 1.5305, rtol=0, atol=1e-6)
    back = vae.decode(mode).sample / 2 + 0.5
    torch.testing.assert_close(ours.decode(ours.encode(x)), back, rtol=0, atol=1e-5)


@torch.no_grad()
def test_an_old_autoencoder_has_no_shift_and_the_scale_of_its_class(tmp_path):
    folder, pipeline = tiny.stable_diffusion(tmp_path)
    path = folder / "vae" / "config.json"
    settings = json.loads(path.read_text())
    del settings["scaling_factor"], settings["shift_factor"]
    path.write_text(json.dumps(settings))
    ours = pipelines.from_pipeline(folder, tiny.NAMES).autoencoder
    mode = pipeline.vae.encode(2 * pictures() - 1).latent_dist.mode()
    torch.testing.assert_close(ours.encode(pictures()), mode * 0.18215, rtol=0, atol=1e-6)
    path.write_text(json.dumps({**settings, "latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}))
    with pytest.raises(ValueError, match="an autoencoder with latents_mean and latents_std"):
        pipelines.from_pipeline(folder, tiny.NAMES)


def test_pictures_are_checked_and_latents_are_not_mistaken_for_them(model):
    with pytest.raises(ValueError, match=r"expected images in \[0,1\]"):
        model.autoencoder.encode(2 * pictures() - 1)
    with pytest.raises(ValueError, match="of shape"):
        model.autoencoder.encode(latents())
    with pytest.raises(ValueError, match="expected a denoiser of the autoencoder's latents"):
        LatentModel(counting(3, (4, 2, 2)), model.autoencoder, tiny.NAMES)


# ---------------------------------------------------------------------------------------------------------------------
# The classifier


class Counting(torch.nn.Module):
    """A network that answers at once, differently for every class, and counts what it is asked."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()), requires_grad=False)
        self.sizes = []

    def forward(self, z, t, class_labels):
        self.sizes.append(len(z))
        near = torch.sin(3.0 * class_labels)[:, None, None, None]
        return SimpleNamespace(
            sample=self.weight * torch.tanh(z + near * (1 + 0.001 * t[:, None, None, None]))
        )


def counting(classes, shape=(4, 4, 4)):
    """A denoiser around `Counting`."""
    return ScheduledDenoiser(
        Counting(), noise.scaled_linear_betas(), "epsilon", classes, shape, has_null=True
    )


def counted(model, classes=10, templates=1):
    """A model of so many classes that counts its calls."""
    names = [f"class {k}" for k in range(classes)]
    return LatentModel(counting(classes * templates), model.autoencoder, names, templates).eval()


def test_the_released_schedule_spends_2750_evaluations(model):
    ten = counted(model)
    classifier = ZeroShotClassifier.released(ten)
    noises = drawn(classifier, 1)
    logits = classifier(pictures(1), noises)
    sizes = ten.denoiser.network.sizes
    assert sum(sizes) == 2750 == classifier.calls == classifier.cost().evaluations
    assert max(sizes) <= zero_shot.CHUNK
    answer = classifier.answer(pictures(1), noises)
    assert answer.evaluations.tolist() == [2750]
    assert [int(step.alive.sum()) for step in answer.history] == [5, 1]
    assert [int(step.evaluations[0]) for step in answer.history] == [500, 2750]
    assert int(answer.prediction) == int(logits.argmax())


@pytest.mark.parametrize(
    "counts, keep",
    [((50, 500), (5, 1)), ((20, 50, 100, 500), (8, 5, 3, 1)), ((3, 7, 500), (4, 2, 1))],
)
def test_a_bill_counts_levels_that_no_earlier_stage_has_measured(model, counts, keep):
    """Sub-grids need not hold the ones before: of the levels of 50 in 500 none is among those of 20."""
    ten = counted(model)
    classifier = ZeroShotClassifier(ten, ten.denoiser.grid(500), counts, keep, distance="l1")
    answer = classifier.answer(pictures(1), drawn(classifier, 1))
    spent = sum(ten.denoiser.network.sizes)
    assert spent == classifier.calls == int(answer.evaluations) == classifier.cost().evaluations
    left = (10, *keep[:-1])
    nested = sum(
        k * n for k, n in zip(left, (counts[0], *map(int.__sub__, counts[1:], counts)), strict=True)
    )
    assert (spent == nested) is (counts == (50, 500))


def by_hand(classifier, x, seeds, shared=True, power=1, offset=True):
    """Li's algorithm in loops, of one picture: who is left, and every class's mean error of the noise while it was in."""
    model = classifier.model
    z = model.autoencoder.encode(x)
    sigmas = classifier.levels.sigma.tolist()
    left = list(range(classifier.num_classes))
    errors = {k: {} for k in left}
    for count, keep in zip(classifier.counts, classifier.keep, strict=True):
        stride = len(sigmas) // count
        start = stride // 2 if offset else 0
        for k in left:
            for g in range(start, len(sigmas), stride):
                seed = int(seeds[0]) if shared else int(seeds[0]) + k
                eps = torch.randn(z.shape[1:], generator=noise.generator_of(seed, g))
                noisy = z + sigmas[g] * eps
                prompts = range(k * model.templates, (k + 1) * model.templates)
                guesses = (noisy[:, None] - model.denoiser(noisy, sigmas[g], prompts)) / sigmas[g]
                each = (eps - guesses).abs().pow(power).flatten(2).sum(-1)
                errors[k].setdefault(g, float(each.mean()))
        means = {k: sum(own.values()) / len(own) for k, own in errors.items()}
        left = sorted(left, key=means.get)[:keep]
    return left[0], means


SLIPS = {
    "the algorithm": ({}, True),
    "noise of its own for every class": (dict(shared=False), False),
    "l2": (dict(power=2), False),
    "another sub-grid": (dict(offset=False), False),
}


@torch.no_grad()
@pytest.mark.parametrize("slip", SLIPS)
def test_staged_elimination_is_that_of_the_released_code(model, slip):
    changed, right = SLIPS[slip]
    four = counted(model, 4, templates=2)
    levels = four.denoiser.grid(24)
    classifier = ZeroShotClassifier(four, levels, (6, 24), (2, 1), distance="l1", chunk=5)
    seeds = drawn(classifier, 1)
    best, means = by_hand(classifier, pictures(1), seeds, **changed)
    answer = classifier.answer(pictures(1), seeds)
    wanted = torch.tensor([[means[k] for k in range(4)]]).double() + math.log(4)
    close = bool(torch.allclose(answer.estimates, wanted, rtol=1e-3))
    assert close is right
    if right:
        assert int(answer.prediction) == best == int(classifier(pictures(1), seeds).argmax())
        assert max(four.denoiser.network.sizes) <= 5


@torch.no_grad()
def test_plain_levels_with_the_elbo_weight_are_bayes_on_latents(model):
    levels = noise.log_levels(0.05, 10, 7)
    classifier = ZeroShotClassifier(
        model, levels, weighting=noise.elbo_weight, prior=[0.2, 0.3, 0.5]
    )
    x = pictures()
    seeds = drawn(classifier, 2)
    z = classifier.encode(x)
    bank = noise.NoiseBank(levels, classifier.drawn(z, seeds, torch.arange(7)))
    wanted = likelihood.elbo(model.denoiser, z, bank) + torch.tensor([0.2, 0.3, 0.5]).log()
    torch.testing.assert_close(classifier(x, seeds), wanted, rtol=1e-4, atol=1e-3)
    assert classifier.scale == "nats" and classifier.calls == 21
    assert classifier.changed(distance="l1").scale == "scores"
    assert classifier.changed(weighting=noise.even_noise_weight).scale == "scores"


@torch.no_grad()
def test_templates_are_averaged_by_their_losses(sd):
    both = ("a photo of a {}.", "a blurry photo of a {}.")
    together = pipelines.from_pipeline(sd[0], tiny.NAMES, both)
    assert together.denoiser.num_classes == 6 and together.templates == 2
    levels = together.denoiser.grid(5)
    alone = [
        ZeroShotClassifier(pipelines.from_pipeline(sd[0], tiny.NAMES, [one]), levels)
        for one in both
    ]
    classifier = ZeroShotClassifier(together, levels)
    seeds = drawn(classifier, 2)
    wanted = sum(one(pictures(), seeds) for one in alone) / 2
    torch.testing.assert_close(classifier(pictures(), seeds), wanted, rtol=1e-4, atol=1e-4)
    assert (alone[0](pictures(), seeds) - alone[1](pictures(), seeds)).abs().max() > 1e-3
    assert classifier.calls == 30


def infinite(history, dtype):
    """A twin of `settled` that silences who is out."""
    return torch.where(history[-2][1], -history[-1][0], -math.inf).to(dtype)


def as_estimated(history, dtype):
    """A twin of `settled` that compares estimates of different stages."""
    return -history[-1][0].to(dtype)


def equal_to_the_worst(history, dtype):
    """A twin of `settled` that lets who is out tie with the worst survivor."""
    logits = -history[-1][0].to(dtype)
    left = history[0][1]
    return torch.where(left, logits, logits.masked_fill(~left, math.inf).amin(1, keepdim=True))


@twins.rejected(
    {
        "-inf": dict(settled=infinite),
        "estimates": dict(settled=as_estimated),
        "ties": dict(settled=equal_to_the_worst),
    }
)
def test_who_was_left_out_stays_below_who_outlived_him(settled=zero_shot.settled):
    # at the first stage the third class lies behind, by 1 and 5; at the second everything is worse
    first = torch.tensor([[1.0, 2.0, 3.0, 7.0]], dtype=torch.float64)
    second = torch.tensor([[10.0, 9.0, 3.0, 7.0]], dtype=torch.float64)
    history = [
        (first, torch.tensor([[True, True, False, False]])),
        (second, torch.tensor([[False, True, False, False]])),
    ]
    logits = settled(history, torch.float32)
    assert torch.isfinite(logits).all()
    torch.testing.assert_close(logits, torch.tensor([[-10.0, -9.0, -11.0, -15.0]]))
    tied = [(torch.ones(1, 2), torch.tensor([[False, True]]))] * 2
    assert int(settled([*tied], torch.float32).argmax()) == 1


def test_its_gradient_is_that_of_finite_differences(sd):
    model = pipelines.from_pipeline(sd[0], tiny.NAMES).double()
    classifier = ZeroShotClassifier(model, model.denoiser.grid(6), (2, 6), (2, 1), chunk=4)
    seeds = drawn(classifier, 1)
    x = (0.2 + 0.6 * pictures(1)).double().requires_grad_()
    logits = classifier(x, seeds)
    weights = torch.tensor([[1.0, -2.0, 0.5]], dtype=torch.float64)
    (slope,) = torch.autograd.grad((logits * weights).sum(), x)
    away = torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    with torch.no_grad():
        ends = [(classifier(x + step * away, seeds) * weights).sum() for step in (1e-5, -1e-5)]
    assert float((ends[0] - ends[1]) / 2e-5) == pytest.approx(float((slope * away).sum()), rel=1e-3)
    assert float(slope.abs().max()) > 0


def test_the_encoder_alone_can_be_attacked(model):
    classifier = ZeroShotClassifier(model, model.denoiser.grid(2))
    x, goal = pictures(2).split(1)
    epsilon = 8 / 255
    target = classifier.encode(goal).detach()
    delta = torch.zeros_like(x)
    for _ in range(20):
        delta.requires_grad_()
        distance = (classifier.encode((x + delta).clamp(0, 1)) - target).square().sum()
        (slope,) = torch.autograd.grad(distance, delta)
        delta = (delta - epsilon / 8 * slope.sign()).clamp(-epsilon, epsilon).detach()

    def away(by):
        return float((classifier.encode((x + by).clamp(0, 1)) - target).square().sum())

    chance = epsilon * torch.randn(x.shape, generator=torch.Generator().manual_seed(3)).sign()
    assert away(delta) < away(torch.zeros_like(x)) - 2 * abs(away(chance) - away(0 * x))


@torch.no_grad()
def test_pictures_of_another_size_are_resized(model):
    classifier = ZeroShotClassifier(model, model.denoiser.grid(2), image_shape=(3, 4, 4))
    x = pictures(2, 4)
    wide = torch.nn.functional.interpolate(x, (8, 8), mode="bicubic", antialias=True)
    own = model.autoencoder.encode(wide.clamp(0, 1))
    torch.testing.assert_close(classifier.encode(x), own)
    assert classifier(x, drawn(classifier, 2)).shape == (2, 3)
    with pytest.raises(ValueError, match="pictures of 3 channels"):
        ZeroShotClassifier(model, model.denoiser.grid(2), image_shape=(1, 8, 8))


def test_the_cost_is_said_before_and_is_what_is_counted(model):
    classifier = ZeroShotClassifier(model, model.denoiser.grid(5))
    cost = classifier.cost()
    assert cost.evaluations == 15
    assert cost.flop == pytest.approx(flop(classifier), rel=1e-6)
    assert cost.hours(100, cost.flop) == pytest.approx(100 / 3600)
    assert "15 network evaluations a picture" in str(cost)
    fewer = classifier.at_levels(2)
    assert fewer.cost().evaluations == 6 and len(fewer.levels) == 2
    staged = ZeroShotClassifier(model, model.denoiser.grid(20), (4, 20), (2, 1))
    assert staged.level_counts == (10, 40) and staged.at_levels(10).counts == (2, 10)


@pytest.mark.parametrize("chunk", [1, 4])
def test_no_call_sees_more_than_the_chunk(model, chunk):
    many = counted(model, 6, templates=3)
    classifier = ZeroShotClassifier(many, many.denoiser.grid(4), chunk=chunk)
    x = pictures(2).requires_grad_()
    seeds = drawn(classifier, 2)
    logits = classifier(x, seeds)
    logits.sum().backward()
    assert max(many.denoiser.network.sizes) <= chunk
    whole = classifier.changed(chunk=10_000)
    torch.testing.assert_close(whole(x, seeds), logits)
    assert max(many.denoiser.network.sizes) > chunk


def test_losses_split_their_classes_too():
    """`likelihood` alone: many prompts in one question are bounded by the chunk, with a gradient and without."""
    denoiser = counting(40, (4, 2, 2))
    z = torch.randn(2, 4, 2, 2, generator=torch.Generator().manual_seed(0)).requires_grad_()
    bank = noise.NoiseBank.fixed(noise.log_levels(0.1, 5, 3), (4, 2, 2))
    slopes = []
    for chunk in (7, 1000):
        denoiser.network.sizes.clear()
        errors = likelihood.diffusion_errors(denoiser, z, bank, chunk=chunk)
        slopes.append(torch.autograd.grad((errors * torch.arange(40.0)[:, None, None]).sum(), z)[0])
        assert max(denoiser.network.sizes) <= chunk
    torch.testing.assert_close(*slopes, rtol=1e-5, atol=1e-4)


@twins.rejected(
    {"the square": dict(distance=torch.square), "half": dict(distance=lambda e: e.abs() / 2)}
)
def test_the_distance_of_losses_is_the_one_given(distance=torch.abs):
    denoiser = counting(2, (4, 2, 2))
    z = torch.randn(1, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    bank = noise.NoiseBank.fixed(noise.log_levels(0.1, 5, 3), (4, 2, 2))
    got = likelihood.diffusion_errors(denoiser, z, bank, distance=distance)
    for t, sigma in enumerate(bank.sigma.tolist()):
        wanted = (
            (denoiser(z + sigma * bank.noise[t, 0], sigma) - z[:, None]).abs().flatten(2).sum(-1)
        )
        torch.testing.assert_close(got[..., t, 0], wanted)


@pytest.mark.parametrize("promise", contract.CHECKS)
def test_it_keeps_the_contract(sd, promise):
    # random prompts differ little, by less than single precision rounds the losses of a batch
    model = pipelines.from_pipeline(sd[0], tiny.NAMES).double()
    classifier = ZeroShotClassifier(model, model.denoiser.grid(4), (2, 4), (2, 1), chunk=6)
    contract.check_promise(promise, classifier, pictures(3).double())


def test_racing_answers_the_same_question():
    """`stages` is the elimination of `racing.staged`, of whatever losses it is given."""
    table = torch.tensor([[[3.0, 1.0], [1.0, 5.0], [2.0, 2.0]]]).double()

    def losses(index, asked):
        return table[..., index].masked_fill(~asked[..., None], math.nan)

    everyone = torch.ones(1, 3, dtype=torch.bool)
    first, second = racing.stages(losses, lambda sums: sums, everyone, 2, (1, 2), (2, 1))
    assert first[0].tolist() == [[2.0, 10.0, 4.0]] and first[1].tolist() == [[True, False, True]]
    assert second[0].tolist() == [[4.0, 10.0, 4.0]] and int(second[1].sum()) == 1


# ---------------------------------------------------------------------------------------------------------------------
# What cannot be meant


@pytest.fixture
def broken(tmp_path, sd):
    """A copy of the tiny pipeline's folder, to be broken."""
    import shutil

    return shutil.copytree(sd[0], tmp_path / "pipeline")


def rewritten(path, **changes):
    """Change settings in a file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_pipeline_without_a_text_encoder_is_refused(broken):
    rewritten(broken / "model_index.json", text_encoder=[None, None])
    with pytest.raises(
        ValueError, match="with a text_encoder, got none.*save the pipeline with its"
    ):
        pipelines.from_pipeline(broken, tiny.NAMES)


def test_another_text_encoder_or_pipeline_is_refused(broken):
    rewritten(broken / "model_index.json", text_encoder=["transformers", "T5EncoderModel"])
    with pytest.raises(
        ValueError, match="a CLIPTextModel as the text_encoder .* got T5EncoderModel"
    ):
        pipelines.from_pipeline(broken, tiny.NAMES)
    rewritten(broken / "model_index.json", _class_name="StableCascadeDecoderPipeline")
    with pytest.raises(ValueError, match="got StableCascadeDecoderPipeline.*not known here"):
        pipelines.from_pipeline(broken, tiny.NAMES)


@pytest.mark.parametrize("part", ["vae", "unet", "text_encoder", "tokenizer", "scheduler"])
def test_a_part_that_is_missing_is_named(broken, part):
    import shutil

    shutil.rmtree(broken / part)
    with pytest.raises(FileNotFoundError, match=part):
        pipelines.from_pipeline(broken, tiny.NAMES)


def test_weights_that_are_lost_or_cut_short_are_refused(broken):
    from safetensors.torch import load_file, save_file

    path = broken / "unet" / "diffusion_pytorch_model.safetensors"
    state = load_file(path)
    lost = next(iter(state))
    save_file({name: value for name, value in state.items() if name != lost}, path)
    with pytest.raises(ValueError, match=f"none that fits for '{lost}'.*left at random"):
        pipelines.from_pipeline(broken, tiny.NAMES)
    save_file({**state, lost: state[lost] * math.nan}, path)
    with pytest.raises(ValueError, match="expected finite weights"):
        pipelines.from_pipeline(broken, tiny.NAMES)
    path.write_bytes(b"not a network")
    with pytest.raises((ValueError, FileNotFoundError), match="UNet2DConditionModel in unet"):
        pipelines.from_pipeline(broken, tiny.NAMES)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="UNet2DConditionModel in unet"):
        pipelines.from_pipeline(broken, tiny.NAMES)


@pytest.mark.parametrize(
    "changes, said",
    [
        (dict(invented=1), "settings that UNet2DConditionModel knows, got invented"),
        (dict(addition_embed_type="text_time"), "got addition_embed_type = 'text_time'"),
        (dict(sample_size=None), "got no sample_size"),
        (dict(time_cond_proj_dim=8), "got time_cond_proj_dim = 8"),
    ],
)
def test_a_network_that_is_asked_otherwise_is_refused(broken, changes, said):
    rewritten(broken / "unet" / "config.json", **changes)
    with pytest.raises(ValueError, match=said):
        pipelines.from_pipeline(broken, tiny.NAMES)


def test_a_network_for_more_than_a_picture_is_refused(tmp_path):
    inpainting = tiny.seeded(lambda: tiny.unet(in_channels=9))
    folder, _ = tiny.stable_diffusion(tmp_path, network=inpainting)
    with pytest.raises(ValueError, match="returns its 9 input channels, got 4; inpainting"):
        pipelines.from_pipeline(folder, tiny.NAMES)


def test_schedulers_of_another_kind_are_refused(broken, schedules, tmp_path):
    path = broken / "scheduler" / "scheduler_config.json"
    path.write_text((schedules / "3.0" / "scheduler_config.json").read_text())
    with pytest.raises(ValueError, match="a variance-preserving chain.*FlowMatchEulerDiscrete"):
        pipelines.from_pipeline(broken, tiny.NAMES)
    other = tmp_path / "scheduler_config.json"
    other.write_text(json.dumps(dict(_class_name="DDIMScheduler")))
    with pytest.raises(ValueError, match="a scheduler of a flow.*got DDIMScheduler"):
        pipelines.read_flow_schedule(other)
    flow = json.loads((schedules / "3.0" / "scheduler_config.json").read_text())
    for changes, said in (
        (dict(invert_sigmas=True), "got invert_sigmas"),
        (dict(invented=1), "got invented"),
        (dict(shift=0), "the shift of a flow > 0"),
        (dict(num_train_timesteps=1), "num_train_timesteps"),
    ):
        other.write_text(json.dumps({**flow, **changes}))
        with pytest.raises(ValueError, match=said):
            pipelines.read_flow_schedule(other)
    other.write_text(json.dumps({**flow, "use_dynamic_shifting": True, "use_karras_sigmas": True}))
    _, shift, notes = pipelines.read_flow_schedule(other)
    assert shift == 1 and len(notes) == 2 and "none is used here" in notes[1]


@pytest.mark.parametrize(
    "names, templates, error, said",
    [
        (None, ["{}"], TypeError, "names of classes as a list of texts, got None"),
        ("cat", ["{}"], TypeError, "as a list of texts, got 'cat'"),
        (["cat", 3], ["{}"], TypeError, "as texts, got 3"),
        (["cat"], ["{}"], ValueError, "at least two classes"),
        (["cat", "cat"], ["{}"], ValueError, "'cat' twice or empty"),
        (["cat", " "], ["{}"], ValueError, "' ' twice or empty"),
        (["cat", "dog"], "a photo of a {}", TypeError, "templates as a list of texts"),
        (["cat", "dog"], [], TypeError, "templates as a list of texts"),
        (["cat", "dog"], ["a photo"], ValueError, "one {} for the name of the class"),
        (["cat", "dog"], ["a photo of a dog " * 9 + "{}"], ValueError, "at most 12 tokens"),
    ],
)
def test_prompts_that_cannot_be_meant_are_refused(sd, names, templates, error, said):
    with pytest.raises(error, match=said):
        pipelines.from_pipeline(sd[0], names, templates)


def test_prompts_that_do_not_match_the_classes_are_refused(model):
    for names, templates in ((("cat", "dog"), 1), (tiny.NAMES, 2)):
        with pytest.raises(ValueError, match="prompts for each of .* got a denoiser of 3"):
            LatentModel(model.denoiser, model.autoencoder, names, templates)


def test_half_precision_on_a_cpu_is_refused(sd):
    with pytest.raises(ValueError, match="fp16 .half precision.; pass precision='fp32' or 'bf16'"):
        pipelines.from_pipeline(sd[0], tiny.NAMES, precision="fp16")
    with pytest.raises(ValueError, match="the precision"):
        pipelines.from_pipeline(sd[0], tiny.NAMES, precision="int8")
    halved = pipelines.from_pipeline(sd[0], tiny.NAMES).half()
    with pytest.raises(ValueError, match="got half precision .fp16."):
        halved.autoencoder.encode(pictures())
    with pytest.raises(ValueError, match="got half precision .fp16."):
        halved.denoiser(latents(), 1.0)


@torch.no_grad()
def test_bf16_answers_about_as_fp32_does(sd, model):
    coarse = pipelines.from_pipeline(sd[0], tiny.NAMES, precision="bf16")
    assert {p.dtype for p in coarse.parameters()} == {torch.bfloat16}
    got = coarse.denoiser(latents(), 1.0)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, model.denoiser(latents(), 1.0), rtol=0.1, atol=0.1)


def test_no_folder_and_no_network_say_what_to_do(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="a folder that diffusers saved.*hf download"):
        pipelines.from_pipeline(tmp_path / "nothing", tiny.NAMES)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match="the hub did not give it.*hf download"):
        pipelines.from_pipeline("nobody/has-this-one", tiny.NAMES)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="with model_index.json, found none in empty"):
        pipelines.from_pipeline(tmp_path / "empty", tiny.NAMES)


def test_stages_that_do_not_fit_are_refused(model):
    levels = model.denoiser.grid(6)
    with pytest.raises(ValueError, match="a last stage of all 6 levels, got 4"):
        ZeroShotClassifier(model, levels, (2, 4), (2, 1))
    with pytest.raises(ValueError, match="keep that fall from at most 3 classes to 1"):
        ZeroShotClassifier.released(model)
    with pytest.raises(ValueError, match="the distance"):
        ZeroShotClassifier(model, levels, distance="l3")
    with pytest.raises(ValueError, match="noise levels between"):
        ZeroShotClassifier(model, noise.log_levels(1e-4, 1e4, 3))
    assert units.to_pixel(torch.zeros(1)).item() == 0.5 and latent.prompts_of(
        ["a b", "c"], ["{}!", "x {}"]
    ) == ("a b!", "x a b", "c!", "x c")
