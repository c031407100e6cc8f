"""Each formula and its mutated twins: the check that the formula passes is the check that every twin must fail.

`pytest tests/test_mutations.py -v` reads as a table: formula, then `formula-slip` for each slip that it rejects.
"""

import math
from dataclasses import replace
from functools import partial

import pytest
import test_adaptive
import test_attacks
import test_classifiers
import test_defences
import test_denoisers
import test_likelihood
import test_noise
import test_smoothing
import test_training
import test_units
import torch
from diffclass import attacks, likelihood, noise, units
from diffclass.attacks import search
from diffclass.certify import counting
from diffclass.classifiers import bayes, purified
from diffclass.denoisers import network
from diffclass.denoisers.exact import MixtureDenoiser
from diffclass.training import losses

# ---------------------------------------------------------------------------------------------------------------------
# Twins that are functions, written out next to the right formula


def scaled(function, factor):
    """A twin that returns its formula times a constant."""
    return lambda *a, **k: factor * function(*a, **k)


def tempered(square_root: bool):
    """MixtureDenoiser with sigma where sigma^2 belongs (or the reverse) in the responsibilities."""

    class Twin(MixtureDenoiser):
        def _joint_by_class(self, x, sigma, classes):
            return super()._joint_by_class(x, sigma.sqrt() if square_root else sigma**2, classes)

    return lambda denoiser, x, sigma: _recast(Twin, denoiser)(x, sigma)


def deviation_for_variance(denoiser, x, sigma):
    """MixtureDenoiser that reads the components' deviations as variances."""
    twin = _recast(MixtureDenoiser, denoiser)
    twin.variances = denoiser.variances.sqrt()
    return twin(x, sigma)


def weights_forgotten(denoiser, x, sigma):
    """MixtureDenoiser whose components all weigh the same."""
    twin = _recast(MixtureDenoiser, denoiser)
    twin.log_weights = torch.zeros_like(denoiser.log_weights)
    return twin(x, sigma)


def drawn_uniformly(low, high, temperature, denoising):
    """The contrastive loss with sigma ~ U(low, high) and the weight of log-uniform levels; its logits are flat."""

    def loss(denoiser, images, labels, generator):
        sigma = low + (high - low) * torch.rand(len(images), generator=generator)
        error = (denoiser(images, sigma, range(3)) - images[:, None]).square().flatten(2).sum(2)
        e = math.log(high / low) * error / sigma[:, None] ** 2
        return math.log(2) + denoising * (e.gather(1, labels[:, None]) + e[:, -1:]).mean() / (
            2 * images[0].numel()
        )

    return loss


def posterior_mean_of_noise(denoiser, x, sigma):
    """D with the noise added instead of taken away: 2 x_sigma - D."""
    return 2 * x[:, None] - denoiser(x, sigma)


def noise_at_temperature(temperature):
    """Theorem 3.2 with another temperature of its softmax."""
    return partial(test_denoisers.optimal_noise, temperature=temperature)


def _recast(kind, denoiser):
    twin = kind.__new__(kind)
    twin.__dict__ = {**denoiser.__dict__, "_buffers": dict(denoiser._buffers)}
    return twin


def edm_weight_inverted(levels):
    """lambda = c_out^2 instead of 1 / c_out^2."""
    return noise.edm_weight(levels) / network.edm_scalings(levels.sigma)[1] ** -4


def noised_baseline_kept(denoiser, z_tau, sigma_tau, bank, chunk):
    """EPNDC that starts from z_tau itself instead of the clean point on the line: no shift."""
    spread = (bank.sigma**2 - sigma_tau**2).sqrt()
    errors = likelihood._errors(
        denoiser, z_tau, bank, spread, torch.zeros_like(spread), None, chunk
    )
    return -(errors.mean(-1) * noise.elbo_weight(bank.levels)).sum(-1)


def noised_full_spread(denoiser, z_tau, sigma_tau, bank, chunk):
    """EPNDC that adds sigma where only r = sqrt(sigma^2 - sigma_tau^2) is missing."""
    shift = sigma_tau**2 / (bank.sigma**2 - sigma_tau**2).sqrt()
    errors = likelihood._errors(denoiser, z_tau, bank, bank.sigma, shift, None, chunk)
    return -(errors.mean(-1) * noise.elbo_weight(bank.levels)).sum(-1)


def end_term_with_trace(z, means, traces, sigma):
    """-(||z - m||^2 + tr) / (2 sigma^2): the trace, which cancels, is kept."""
    return -(((z[:, None] - means) ** 2).flatten(2).sum(-1) + traces) / (2 * sigma**2)


def last_step_of_vp_left_out(denoiser, z, betas, bank):
    """The sum over t = 2..T-1."""
    shorter = noise.NoiseBank(
        noise.Levels(bank.sigma[:-1], bank.lower[:-1], bank.upper[:-1]), bank.noise[:-1]
    )
    return likelihood.vp_elbo(denoiser, z, betas[:-1], shorter)


def vp_with_plain_variance(denoiser, z, betas, bank):
    """beta_t in place of beta~_t in the weight: the other choice of the model's variance."""
    abar = noise.alpha_bar(betas)
    ratio = (1 - abar[:-1]) / (1 - abar[1:])  # beta~ / beta
    return likelihood.elbo(
        denoiser, z, bank, lambda levels: noise.discrete_elbo_weight(levels) * ratio
    )


def mean_over_pixels(**options):
    """A classifier whose evidence is the mean over pixels instead of the sum."""
    model = test_classifiers.classifier(**options)
    model.weighting = scaled(noise.elbo_weight, 1 / 2)
    return model


class _Slipped(bayes.BayesClassifier):
    sign = 1.0
    tempered_prior = False
    squared = False

    def logits_of(self, losses):
        evidence = super().logits_of(losses) - self.log_prior
        prior = self.sign * self.log_prior / (self.temperature if self.tempered_prior else 1)
        return (evidence / self.temperature if self.squared else evidence) + prior


def slipped(**slips):
    """A classifier with one slip in the line that makes logits from losses."""

    def make(**options):
        model = test_classifiers.classifier(**options)
        model.__class__ = type("Twin", (_Slipped,), slips)
        return model

    return make


def pgd_twin(ascent=None, project=None):
    """PGD with another ascent direction or another projection, through the library's own loop."""

    def twin(*a, **k):
        with pytest.MonkeyPatch.context() as patch:
            if ascent:
                patch.setattr(attacks, "_ascent", ascent)
            if project:
                patch.setattr(attacks, "project", project)
            return list(attacks.pgd(*a, **k))

    return twin


def apgd_twin(**changes):
    """APGD with a part of the library replaced, through the library's own loop."""

    def twin(*a, **k):
        with pytest.MonkeyPatch.context() as patch:
            for name, change in changes.items():
                patch.setattr(attacks, name, change)
            return list(attacks.apgd(*a, **k))

    return twin


def apgd_without_memory(*a, **k):
    """APGD that returns where it is instead of the best it has seen."""
    for frame in attacks.apgd(*a, **k):
        yield replace(
            frame, x=frame.at, logits=torch.stack([torch.zeros_like(frame.value), -frame.value], 1)
        )


class NeverHalved(search._Halving):
    """Steps of a fixed size."""

    def after(self, value, best):
        return torch.zeros_like(self.halved)


def summed_gradient(*a, draws=1, **k):
    """Averaged gradients that are not divided by the draws."""
    gradient, logits, value = attacks.expected_gradient(*a, draws=draws, **k)
    return draws * gradient, logits, value


def last_run_wins(runs):
    """Restarts that forget what fell before."""
    return [list(run)[-1] for run in runs]


def purify_twin(**changes):
    """Likelihood maximisation with a method replaced."""

    def twin(model, *a):
        with pytest.MonkeyPatch.context() as patch:
            for name, change in changes.items():
                patch.setattr(purified.LikelihoodMaximisation, name, change)
            return model.purify(*a)

    return twin


def slope_through(input_too, target_too):
    """The gradient of likelihood maximisation with one occurrence of u held fixed."""

    def slope(self, u, sigma, eps):
        u = u.detach().requires_grad_()
        inside = u if input_too else u.detach()
        outside = u if target_too else u.detach()
        sigma = sigma.expand(len(u))
        denoised = self.denoiser.unconditional(inside + sigma[:, None, None, None] * eps, sigma)
        return torch.autograd.grad(((denoised - outside) ** 2).flatten(1).mean(1).sum(), u)[0]

    return slope


def straight_through(model, leaf, out):
    """The gradient of the identity in place of the purifier's."""
    return test_defences.plain_gradient(model.with_gradient(False), leaf, out)


def steps_detached(model, leaf, out):
    """A gradient through u alone: the steps themselves are not differentiated."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            purified, "_recomputed", lambda function, *arguments: function(*arguments).detach()
        )
        return test_defences.plain_gradient(model, leaf, out)


def adam_uncorrected(gradients):
    """Adam without the correction of its first steps."""
    count = len(gradients)
    return purified.adam_direction(gradients) * (1 - 0.9**count) / (1 - 0.999**count) ** 0.5


def telescoped_without_end(denoiser, z, low, high, eps):
    """The score at the lower end alone."""
    return likelihood._mean_score(denoiser, z, low, eps)


def telescoped_as_noise(denoiser, z, low, high, eps):
    """The score divided by sigma instead of sigma^2."""
    return low * likelihood._mean_score(denoiser, z, low, eps) - high * likelihood._mean_score(
        denoiser, z, high, eps
    )


def jacobian_held_fixed(denoiser, z, bank, weights):
    """2 (z - D) alone: the gradient as if D did not move."""
    calm = noise.NoiseBank(bank.levels, bank.noise)
    calm.sigma = bank.sigma * 1e9  # turns eps / sigma, and with it the first term, to nothing

    class Still(torch.nn.Module):
        def forward(self, x_sigma, sigma):
            return denoiser(
                z.repeat(len(x_sigma) // len(z), 1, 1, 1)
                + (x_sigma - z.repeat(len(x_sigma) // len(z), 1, 1, 1)) / 1e9,
                sigma / 1e9,
            )

    return likelihood.jacobian_free_gradient(Still(), z, calm, weights)


def negative_penalty(denoiser, bank, strength):
    """A penalty that rewards what it should punish."""
    return lambda x: -attacks.unlikeliness(denoiser, bank, strength)(x)


def margin_of_all(logits, y):
    """max over all classes, the right one included: never negative, flat where nothing is fooled."""
    return logits.amax(1) - logits.gather(1, y[:, None])[:, 0]


def detached(model, x):
    """A gradient through the target x0 alone, the denoiser's input cut off: what a forward without gradients gives."""
    denoiser = model.denoiser

    class Cut(type(denoiser)):
        def estimate(self, x_sigma, sigma, classes):
            return super().estimate(x_sigma.detach(), sigma, classes)

    model.denoiser = _recast(Cut, denoiser)
    gradient = torch.autograd.grad(model(x)[:, 0].sum(), x)[0]
    model.denoiser = denoiser
    return gradient


def check_bayes_gradient(gradient_of=None):
    """The gradient of a Bayes classifier against central differences."""
    extra = () if gradient_of is None else (gradient_of,)
    model = test_classifiers.classifier("mixtures")
    x = test_classifiers.pixels("mixtures")
    test_classifiers.check_gradient(model, x, *extra)


def votes_twin(noise_factor=1.0, clipped=False):
    """Vote counting whose noise is of another size, or clipped back into the pixel range."""

    class Changed(torch.nn.Module):
        num_classes = 2
        image_shape = test_smoothing.SHAPE

        def __init__(self, classifier, x):
            super().__init__()
            self.classifier = classifier
            self.x = x

        def forward(self, noisy):
            noisy = self.x + noise_factor * (noisy - self.x)
            return self.classifier(noisy.clamp(0.45, 0.55) if clipped else noisy)

    return lambda model, x, *rest: counting.count_votes(Changed(model, x), x, *rest)


def unweighted_loss(denoiser, images, labels, generator):
    """The denoising loss without EDM's weight."""
    x_sigma, sigma, _ = losses._noised(denoiser, images, generator)
    return ((denoiser.paired(x_sigma, sigma, labels) - images) ** 2).mean()


def noise_predicted(denoiser, images, labels, generator):
    """The weight of the noise error on the x-error."""
    x_sigma, sigma, _ = losses._noised(denoiser, images, generator)
    return (
        ((denoiser.paired(x_sigma, sigma, labels) - images) ** 2) / sigma[:, None, None, None] ** 2
    ).mean()


def swapped_scalings(sigma):
    """c_in and c_out exchanged."""
    c_skip, c_out, c_in = network.edm_scalings(sigma)
    return c_skip, c_in, c_out


def kl_as_log_likelihood(*a, **k):
    """The log-likelihood with the constant of one dimension instead of D."""
    return likelihood.log_likelihood(*a, **k) + math.log(2 * math.pi * math.e) / 2


ELBO = likelihood.elbo
TINY = dict(rtol=1e-12)

# formula: (check, {slip: the twin that makes it}); the check without a twin runs on the library's own function
TABLE = {
    "unit conversion": (
        test_units.check_lengths_double,
        {
            "sigma not doubled": dict(sigma_to_model=lambda s: s),
            "sigma halved": dict(sigma_to_model=units.sigma_to_pixel),
            "images not shifted": dict(to_model=lambda x: 2 * x),
        },
    ),
    "sigma of abar": (
        test_noise.check_sigma_of_alpha_bar,
        {
            "no root": dict(sigma_of=lambda abar: (1 - abar) / abar),
            "not divided by the signal": dict(sigma_of=lambda abar: (1 - abar).sqrt()),
        },
    ),
    "scaled-linear betas": (
        test_noise.check_scaled_linear,
        {
            "linear in beta": dict(betas=partial(noise.linear_betas, 1000, 0.00085, 0.012)),
        },
    ),
    "discrete weight": (
        test_noise.check_discrete_weight,
        {
            "without the half": dict(weight=scaled(noise.discrete_elbo_weight, 2)),
            "right end": dict(weight=noise.right_end_weight),
            "first powers": dict(weight=lambda v: (1 / v.lower - 1 / v.upper) / 2),
        },
    ),
    "ELBO weight": (
        test_noise.check_elbo_weight,
        {
            "sigma^-2": dict(weight=lambda v: v.sigma**-2 * v.step),
            "d sigma for d ln sigma": dict(weight=lambda v: v.sigma**-2 * (v.upper - v.lower)),
            "with a half": dict(weight=scaled(noise.elbo_weight, 0.5)),
        },
    ),
    "EDM weight": (
        test_noise.check_edm_weight,
        {
            "released precedence": dict(weight=noise.rdc_released_weight),
            "lambda inverted": dict(weight=edm_weight_inverted),
            "normal, not log-normal": dict(weight=lambda v: noise.edm_weight(v) * v.sigma),
        },
    ),
    "DDPM simple weight": (
        test_noise.check_simple_weight,
        {
            "uniform in sigma": dict(weight=noise.unit_weight),
            "uniform in ln sigma": dict(weight=noise.elbo_weight),
        },
    ),
    "EDM scalings": (
        test_denoisers.check_scalings,
        {
            "another sigma_data": dict(scalings=partial(network.edm_scalings, sigma_data=1.0)),
            "c_in and c_out swapped": dict(scalings=swapped_scalings),
            "c_skip of sigma, not sigma^2": dict(
                scalings=lambda s: (0.5 / (s + 0.5), *network.edm_scalings(s)[1:])
            ),
        },
    ),
    "mixture denoiser": (
        test_denoisers.check_denoiser_is_the_posterior_mean,
        {
            "deviation for variance": dict(denoise=deviation_for_variance),
            "sigma for sigma^2": dict(denoise=tempered(square_root=True)),
            "weights forgotten": dict(denoise=weights_forgotten),
        },
    ),
    "Tweedie": (
        test_denoisers.check_tweedie,
        {
            "sign": dict(sign=-1.0),
            "noise added": dict(denoise=posterior_mean_of_noise),
            "half the variance": dict(sign=0.5),
        },
    ),
    "Theorem 3.2": (
        test_denoisers.check_theorem_3_2,
        {
            "released temperature 2 sigma": dict(noise_of=noise_at_temperature(lambda s: 2 * s)),
            "without the two": dict(noise_of=noise_at_temperature(lambda s: s**2)),
        },
    ),
    "Corollary 3.3": (
        test_denoisers.check_corollary_3_3,
        {
            "released sum of squares": dict(residual_of=test_denoisers.sum_of_squares),
        },
    ),
    "ELBO": (
        test_likelihood.check_elbo,
        {
            "EDM weighting": dict(estimate=partial(ELBO, weighting=noise.edm_weight)),
            "simple weighting": dict(estimate=partial(ELBO, weighting=noise.simple_weight)),
            "sign": dict(estimate=scaled(ELBO, -1)),
            "mean over pixels": dict(estimate=scaled(ELBO, 0.5)),
        },
    ),
    "log-likelihood": (
        test_likelihood.check_log_likelihood,
        {
            "constant of one dimension": dict(estimate=kl_as_log_likelihood),
            "no constant": dict(estimate=ELBO),
        },
    ),
    "pointwise identity": (
        test_likelihood.check_identity,
        {
            "half the weight": dict(weighting=scaled(noise.elbo_weight, 0.5)),
            "sigma^-2": dict(weighting=lambda v: v.sigma**-2 * v.step),
            "right end": dict(weighting=noise.right_end_weight),
        },
    ),
    "bound of the chain": (
        test_likelihood.check_chain_bound,
        {
            "right end": dict(weighting=noise.right_end_weight),
            "midpoint": dict(weighting=lambda v: noise.discrete_elbo_weight(v) * 0.9),
        },
    ),
    "end term": (
        test_likelihood.check_end_term,
        {
            "without the half": dict(end_term=scaled(likelihood.end_term, 2)),
            "trace kept": dict(end_term=end_term_with_trace),
            "sign": dict(end_term=scaled(likelihood.end_term, -1)),
        },
    ),
    "VP chain": (
        test_likelihood.check_vp_is_ve,
        {
            "beta for beta~": dict(vp=vp_with_plain_variance),
            "last step left out": dict(vp=last_step_of_vp_left_out),
        },
    ),
    "noised ELBO": (
        test_likelihood.check_noised_elbo,
        {
            "noised point as the target": dict(estimate=noised_baseline_kept),
            "sigma for r": dict(estimate=noised_full_spread),
        },
    ),
    "noised weight": (
        test_likelihood.check_noised_weight,
        {
            "tau forgotten": dict(weight=lambda tau: noise.discrete_elbo_weight),
            "without the half": dict(weight=lambda tau: scaled(likelihood.noised_weight(tau), 2)),
        },
    ),
    "posterior": (
        test_classifiers.check_posterior,
        {
            "not normalised": dict(posterior_of=lambda model, x: model(x).exp()),
            "likelihood without prior": dict(
                posterior_of=lambda model, x: torch.softmax(model(x) - model.log_prior, 1)
            ),
            "pixels not converted": dict(
                posterior_of=lambda model, x: model.posterior((x + 1) / 2)
            ),
        },
    ),
    "temperature": (
        test_classifiers.check_temperature,
        {
            "mean over pixels": dict(model_of=mean_over_pixels),
            "applied twice": dict(model_of=slipped(squared=True)),
        },
    ),
    "log prior": (
        test_classifiers.check_prior_shift,
        {
            "sign": dict(model_of=slipped(sign=-1.0)),
            "divided by the temperature": dict(model_of=slipped(tempered_prior=True)),
        },
    ),
    "gradient": (
        check_bayes_gradient,
        {
            "input detached": dict(gradient_of=detached),
            "pixels for model units": dict(
                gradient_of=lambda m, x: torch.autograd.grad(m(x)[:, 0].sum(), x)[0] / 2
            ),
        },
    ),
    "denoising loss": (
        test_training.check_denoising_loss,
        {
            "no weight": dict(loss=unweighted_loss),
            "weight of the noise error": dict(loss=noise_predicted),
        },
    ),
    "contrastive evidence": (
        test_training.check_contrastive_evidence,
        {
            "levels drawn uniformly": dict(loss=drawn_uniformly),
            "upper end forgotten": dict(
                loss=lambda low, high, **k: losses.contrastive_loss(low, 2 * high, **k)
            ),
            "per pixel": dict(
                loss=lambda low, high, temperature, denoising: losses.contrastive_loss(
                    low, high, temperature, denoising / 64
                )
            ),
        },
    ),
    "PGD": (
        test_attacks.check_pgd,
        {
            "descent": dict(
                pgd=pgd_twin(ascent=lambda g, norm: -g.sign() if norm == "linf" else -g / g.norm())
            ),
            "no projection": dict(pgd=pgd_twin(project=lambda x, x0, epsilon, norm: x)),
            "raw gradient": dict(pgd=pgd_twin(ascent=lambda g, norm: g)),
            "one L2 norm for the batch": dict(
                pgd=pgd_twin(ascent=lambda g, norm: g.sign() if norm == "linf" else g / g.norm())
            ),
            "sign for L2": dict(
                pgd=pgd_twin(ascent=lambda g, norm: g.sign() / g[0].numel() ** 0.5)
            ),
        },
    ),
    "projection": (
        test_attacks.check_projection,
        {
            "L2 ball scaled even inside": dict(
                project=lambda x, x0, e, norm: attacks.project(x0 + 1e6 * (x - x0), x0, e, norm)
            ),
            "not clipped to pixels": dict(
                project=lambda x, x0, e, norm: x0 + (x - x0).clamp(-e / 4, e / 4)
            ),
            "L-inf box for L2": dict(
                project=lambda x, x0, e, norm: attacks.project(x, x0, e, "linf")
            ),
        },
    ),
    "margin loss": (
        test_attacks.check_margin_loss,
        {
            "right class included": dict(loss=margin_of_all),
            "sign": dict(loss=scaled(attacks.margin_loss, -1)),
        },
    ),
    "DLR loss": (
        test_attacks.check_dlr,
        {
            "over the first gap": dict(
                loss=lambda f, y: attacks.margin_loss(f, y) / -f.topk(2).values.diff(dim=1)[:, 0]
            ),
            "not divided": dict(loss=attacks.margin_loss),
            "sign": dict(loss=scaled(attacks.dlr_loss, -1)),
        },
    ),
    "APGD": (
        test_attacks.check_apgd,
        {
            "descent": dict(apgd=apgd_twin(_ascent=lambda g, norm: -g.sign())),
            "no projection": dict(apgd=apgd_twin(project=lambda x, x0, epsilon, norm: x)),
            "one L2 norm for the batch": dict(
                apgd=apgd_twin(
                    _ascent=lambda g, norm: g.sign() if norm == "linf" else 1e-2 * g / g.norm()
                )
            ),
        },
    ),
    "APGD's steps": (
        test_attacks.check_halving,
        {
            "never halved": dict(apgd=apgd_twin(_Halving=NeverHalved)),
            "the best forgotten": dict(apgd=apgd_without_memory),
        },
    ),
    "averaged gradient": (
        test_attacks.check_averaging,
        {
            "a sum": dict(gradient_of=summed_gradient),
            "one draw for all": dict(
                gradient_of=lambda *a, draws=1, **k: attacks.expected_gradient(*a, **k)
            ),
        },
    ),
    "worst case": (
        test_attacks.check_worst_case,
        {
            "the last run wins": dict(worst_case=last_run_wins),
        },
    ),
    "likelihood maximisation": (
        test_defences.check_contraction,
        {
            "target held fixed": dict(purify=purify_twin(slope=slope_through(True, False))),
            "input held fixed": dict(purify=purify_twin(slope=slope_through(False, True))),
            "sum over pixels": dict(
                purify=purify_twin(slope=scaled(purified.LikelihoodMaximisation.slope, 4))
            ),
            "sign": dict(
                purify=purify_twin(slope=scaled(purified.LikelihoodMaximisation.slope, -1))
            ),
        },
    ),
    "Adam": (
        test_defences.check_adam,
        {
            "not corrected": dict(direction=adam_uncorrected),
            "sign of the gradient": dict(direction=lambda gradients: gradients[-1].sign()),
            "another beta": dict(direction=partial(purified.adam_direction, beta2=0.99)),
        },
    ),
    "gradient through the purifier": (
        test_defences.check_exact_gradient,
        {
            "identity": dict(gradient_of=straight_through),
            "steps detached": dict(gradient_of=steps_detached),
        },
    ),
    "walk back": (
        test_defences.check_walk,
        {
            "no noise on the way": dict(
                purify=lambda model, z, eps: model.purify(
                    z, torch.cat([eps[:1], torch.zeros_like(eps[1:])])
                )
            ),
            "twice the noise": dict(
                purify=lambda model, z, eps: model.purify(z, torch.cat([eps[:1], 2 * eps[1:]]))
            ),
            "not noised at first": dict(
                purify=lambda model, z, eps: model.purify(
                    z, torch.cat([torch.zeros_like(eps[:1]), eps[1:]])
                )
            ),
        },
    ),
    "majority vote": (
        test_defences.check_votes,
        {
            "one vote": dict(vote=lambda classifier, votes: votes.MajorityVote(classifier, 1)),
            "half the votes": dict(
                vote=lambda classifier, votes: votes.MajorityVote(classifier, votes // 2)
            ),
        },
    ),
    "telescoped gradient": (
        test_adaptive.check_telescoped,
        {
            "lower end alone": dict(gradient_of=telescoped_without_end),
            "sigma for sigma^2": dict(gradient_of=telescoped_as_noise),
            "sign": dict(gradient_of=scaled(likelihood.telescoped_gradient, -1)),
            "per pixel": dict(gradient_of=scaled(likelihood.telescoped_gradient, 2)),
        },
    ),
    "Jacobian-free gradient": (
        test_adaptive.check_jacobian_free,
        {
            "denoiser held fixed": dict(gradient_of=jacobian_held_fixed),
            "half": dict(gradient_of=scaled(likelihood.jacobian_free_gradient, 0.5)),
        },
    ),
    "warp": (
        test_adaptive.check_warp,
        {
            "the other way": dict(warp=lambda x, flow: attacks.warp(x, -flow)),
            "rows for columns": dict(warp=lambda x, flow: attacks.warp(x, flow.flip(1))),
            "three times as far": dict(warp=lambda x, flow: attacks.warp(x, flow * 3)),
        },
    ),
    "Lagrange penalty": (
        test_adaptive.check_unlikeliness,
        {
            "sum over pixels": dict(
                penalty_of=lambda d, bank, c: attacks.unlikeliness(d, bank, 2 * c)
            ),
            "sign": dict(penalty_of=negative_penalty),
        },
    ),
    "votes": (
        test_smoothing.check_votes,
        {
            "sigma in model units": dict(count_votes=votes_twin(noise_factor=2.0)),
            "sigma squared": dict(count_votes=votes_twin(noise_factor=0.25)),
        },
    ),
}
PAIRS = [
    pytest.param(check, change, id=f"{formula}-{slip}")
    for formula, (check, slips) in TABLE.items()
    for slip, change in slips.items()
]


@pytest.mark.parametrize(
    "check", [pytest.param(check, id=formula) for formula, (check, _) in TABLE.items()]
)
def test_the_formula_passes(check):
    check()


@pytest.mark.parametrize("check, change", PAIRS)
def test_its_twin_fails(check, change):
    with pytest.raises(AssertionError):
        check(**change)


def test_every_formula_has_a_twin():
    """A check without a twin has not shown that it can fail."""
    assert TABLE and all(slips for _, slips in TABLE.values())
