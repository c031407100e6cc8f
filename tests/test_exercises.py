"""Exercises accept their reference and recognise each classic mistake by its own hint; the references are right."""

import contextlib
import inspect
import io
import itertools
import re

import pytest
import torch
from diffclass import intervals, noise, units
from diffclass.audit import planted
from diffclass.certify import anytime, certificates, lipschitz
from diffclass.classifiers import racing
from diffclass.course import exercises, grade
from diffclass.course.exercises import EXERCISES, Exercise, Mistake, NotYet, auditing
from diffclass.course.scenes.audit import MYSTERIES
from diffclass.data import grainy

MISTAKES = [
    pytest.param(e, m, id=f"{e.key}-{i}")
    for e in EXERCISES.values()
    for i, m in enumerate(e.mistakes)
]
each_exercise = pytest.mark.parametrize("exercise", EXERCISES.values(), ids=EXERCISES)


def mark(exercise, answer) -> str:
    """The sign that grading prints: ✓ or ○."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        grade(exercise, answer)
    return printed.getvalue()[0]


@each_exercise
def test_reference_passes(exercise, capsys):
    grade(exercise, exercise.reference)
    assert capsys.readouterr().out == f"✓ {exercise.key}   {exercise.meaning}\n"


@pytest.mark.parametrize(("exercise", "mistake"), MISTAKES)
def test_mistake_gets_its_own_hint(exercise, mistake):
    with pytest.raises(NotYet) as caught:
        grade(exercise, mistake.function)
    assert mistake.hint in str(caught.value)
    assert not [
        m.hint for m in exercise.mistakes if m is not mistake and m.hint in str(caught.value)
    ]


@each_exercise
def test_at_least_three_mistakes_and_prompts(exercise):
    assert len(exercise.mistakes) >= 3 and len(exercise.prompt) > 20 and len(exercise.meaning) > 20
    assert exercise.verify is not None or exercise.cases()


@each_exercise
@pytest.mark.parametrize(
    "unfilled",
    [None, ..., lambda *args: None, lambda *args: ...],
    ids=["None", "Ellipsis", "returns-None", "returns-Ellipsis"],
)
def test_unfilled_is_not_an_error(exercise, unfilled, capsys):
    grade(exercise, unfilled)
    assert capsys.readouterr().out.startswith(f"○ {exercise.key}   not attempted yet")


def test_not_implemented_counts_as_unfilled():
    def answer(*args):
        raise NotImplementedError

    assert mark(exercises.TWEEDIE, answer) == "○"
    assert mark(exercises.SNR_SCHEDULE, answer) == "○"


@each_exercise
def test_crash_becomes_a_sentence(exercise):
    def answer(*args):
        raise RuntimeError("boom")

    with pytest.raises(NotYet, match=f"{exercise.key}.*raised RuntimeError: boom"):
        grade(exercise, answer)


def test_wrong_shape_is_told():
    with pytest.raises(NotYet, match=r"case 1 .*has shape \[4, 3\], wanted \[4\]"):
        grade(exercises.KL_GAUSSIANS, lambda p, q, v: (p - q) ** 2 / (2 * v))


def test_wrong_type_is_told():
    with pytest.raises(NotYet, match="expected a function, got float"):
        grade(exercises.TWEEDIE, 1.0)
    with pytest.raises(
        NotYet, match="raised TypeError: expected numbers as the answer, got 'later'"
    ):
        grade(exercises.TWEEDIE, lambda *args: "later")


def test_unknown_mistake_shows_the_first_wrong_entry():
    with pytest.raises(
        NotYet,
        match=r"case 1 .*the entry \[\d, \d\] is .*, wanted .*; all values are off by the same",
    ):
        grade(exercises.TWEEDIE, lambda x, sigma, score: x + sigma**2 * score + 0.3)


def test_own_noise_is_told():
    generator = torch.Generator().manual_seed(0)
    with pytest.raises(NotYet, match="noise must come in as an argument"):
        grade(
            exercises.FORWARD_NOISE,
            lambda x, s, eps: x + s * torch.randn(x.shape, generator=generator).to(x),
        )


def test_numpy_and_list_answers_are_welcome():
    assert (
        mark(exercises.TWEEDIE, lambda x, sigma, score: x.numpy() + sigma**2 * score.numpy()) == "✓"
    )
    assert mark(exercises.UNITS, lambda s, r, d: [torch.tensor(2 * s), r / d**0.5]) == "✓"


def test_an_answer_that_changes_its_arguments_is_judged_on_fresh_ones():
    assert mark(exercises.TWEEDIE, lambda x, sigma, score: x.add_(sigma**2 * score)) == "✓"


def test_keys_name_their_notebook_and_argument_names_agree():
    for exercise in EXERCISES.values():
        assert re.match(r"\d\d[a-z]?-[a-z]", exercise.key), exercise.key
        if exercise.reference.__name__ == "<lambda>":
            names = list(inspect.signature(exercise.reference).parameters)
            assert all(
                list(inspect.signature(m.function).parameters) == names for m in exercise.mistakes
            )


def test_too_few_or_equal_hints_are_refused():
    with pytest.raises(ValueError, match="three classic mistakes"):
        Exercise("99-x", "p", abs, list, (Mistake(abs, "a"),), "m")
    with pytest.raises(ValueError, match="different hint"):
        Exercise("99-x", "p", abs, list, (Mistake(abs, "a"),) * 3, "m")


# The references themselves, against the library or by brute force


def test_forward_references_agree_with_the_library():
    lower, upper = exercises.VE_WEIGHT.cases()[0]
    levels = noise.Levels(upper, lower, upper)
    torch.testing.assert_close(
        exercises.VE_WEIGHT.reference(lower, upper), noise.discrete_elbo_weight(levels)
    )
    (abar,) = exercises.SIGMA_OF_ABAR.cases()[0]
    torch.testing.assert_close(
        exercises.SIGMA_OF_ABAR.reference(abar), noise.sigma_of_alpha_bar(abar)
    )
    for sigma, radius, d in exercises.UNITS.cases():
        wanted = (units.sigma_to_model(sigma), units.linf_of_l2(radius, d))
        assert exercises.UNITS.reference(sigma, radius, d) == pytest.approx(wanted)
    for x0, abar, eps in exercises.Q_SAMPLE.cases():
        scaled = exercises.Q_SAMPLE.reference(x0, abar, eps) / abar.sqrt().reshape(-1, 1, 1, 1)
        wanted = x0 + noise.sigma_of_alpha_bar(abar).reshape(-1, 1, 1, 1) * eps
        torch.testing.assert_close(scaled, wanted)


def test_kl_reference_is_torch_kl():
    for p, q, variance in exercises.KL_GAUSSIANS.cases():
        law = [
            torch.distributions.Independent(torch.distributions.Normal(m, variance**0.5), 1)
            for m in (p, q)
        ]
        wanted = torch.distributions.kl_divergence(*law)
        torch.testing.assert_close(exercises.KL_GAUSSIANS.reference(p, q, variance), wanted)


def test_posterior_mean_reference_is_conditioning_of_the_joint_gaussian():
    for x0, x_next, s, s_next in exercises.POSTERIOR_MEAN.cases():
        wanted = x0 + s**2 / s_next**2 * (
            x_next - x0
        )  # mean + Cov(x_t, x_next) / Var(x_next) * (x_next - mean)
        torch.testing.assert_close(
            exercises.POSTERIOR_MEAN.reference(x0, x_next, s, s_next), wanted
        )


def test_mixture_reference_is_tweedie_of_the_mixture_density():
    for x, sigma, means, scale, weights in exercises.MIXTURE_DENOISER.cases():
        x = x.clone().requires_grad_()
        parts = (
            torch.distributions.Normal(means, (scale**2 + sigma**2) ** 0.5).log_prob(x[:, None])
            + weights.log()
        )
        (score,) = torch.autograd.grad(parts.logsumexp(-1).sum(), x)
        wanted = exercises.TWEEDIE.reference(x, sigma, score)
        torch.testing.assert_close(
            exercises.MIXTURE_DENOISER.reference(x, sigma, means, scale, weights), wanted
        )


def test_empirical_reference_is_tweedie_of_the_smoothed_data():
    for x, sigma, data in exercises.EMPIRICAL_DENOISER.cases():
        x = x.clone().requires_grad_()
        parts = torch.distributions.Normal(data, sigma).log_prob(x[:, None]).sum(-1)
        (score,) = torch.autograd.grad(parts.logsumexp(-1).sum(), x)
        wanted = exercises.TWEEDIE.reference(x, sigma, score)
        torch.testing.assert_close(exercises.EMPIRICAL_DENOISER.reference(x, sigma, data), wanted)


def test_bayes_references_are_bayes():
    log_likelihood, log_prior = exercises.BAYES_POSTERIOR.cases()[0]
    posterior = exercises.BAYES_POSTERIOR.reference(log_likelihood, log_prior)
    joint = log_likelihood.exp() * log_prior.exp()
    torch.testing.assert_close(posterior, joint / joint.sum(1, keepdim=True))
    new = torch.tensor([0.6, 0.1, 0.3], dtype=torch.float64)
    shifted = exercises.PRIOR_SHIFT.reference(posterior, log_prior.exp(), new)
    torch.testing.assert_close(
        shifted, exercises.BAYES_POSTERIOR.reference(log_likelihood, new.log())
    )


def test_evaluation_references_agree_with_the_library_and_with_counting():
    for correct, n in exercises.HONEST_INTERVAL.cases():
        low, high, warned = exercises.HONEST_INTERVAL.reference(correct, n)
        assert (low, high) == pytest.approx(intervals.interval(correct, n)) and warned == (n < 500)
    for survived, clean in exercises.PER_IMAGE_MINIMUM.cases():
        never_wrong = [bool(clean[i]) and all(map(bool, survived[:, i])) for i in range(len(clean))]
        assert exercises.PER_IMAGE_MINIMUM.reference(survived, clean) == pytest.approx(
            sum(never_wrong) / len(clean)
        )
    generator = torch.Generator().manual_seed(0)
    for p, N in exercises.WORST_OF_DRAWS.cases():
        right = (torch.rand(20_000, N, len(p), generator=generator) < p).all(1).double().mean(1)
        assert exercises.WORST_OF_DRAWS.reference(p, N) == pytest.approx(
            float(right.mean()), abs=5e-3
        )


def test_the_diagnoses_are_those_of_the_lamp_panel():
    assert {f"mystery {number}": fault for number, fault in auditing.MYSTERIES.items()} == MYSTERIES
    assert set(auditing.FAULTS) == set(planted.FAULTS)
    with pytest.raises(
        NotYet, match="expected one of honest, two-faced.*for mystery 1, got 'masked'"
    ):
        grade(exercises.DIAGNOSIS, lambda mystery: "masked")


def test_the_bridge_reference_is_conditioning_of_the_joint_gaussian():
    for tau, low, high, x_tau, x_high in exercises.BRIDGE_POSTERIOR.cases():
        added = low**2 - tau**2  # Var x_t = Cov(x_t, x_high), given x_tau
        whole = high**2 - tau**2  # Var x_high
        mean = x_tau + added / whole * (x_high - x_tau)
        answer = exercises.BRIDGE_POSTERIOR.reference(tau, low, high, x_tau, x_high)
        torch.testing.assert_close(answer[:-1], mean)
        assert float(answer[-1]) == pytest.approx(added - added**2 / whole)


def test_the_lipschitz_reference_is_the_librarys_constant():
    for sigma, weights, dimensions in exercises.LIPSCHITZ_PIXELS.cases():
        levels = noise.Levels(sigma, 0.9 * sigma, 1.1 * sigma)
        wanted = lipschitz.margin_constant(levels, dimensions, lambda _, w=weights: w, "mean")
        assert exercises.LIPSCHITZ_PIXELS.reference(sigma, weights, dimensions) == pytest.approx(
            wanted
        )


def test_the_references_of_votes_are_the_librarys():
    for radius, n, sigma, alpha in exercises.VOTES_NEEDED.cases():
        wanted = certificates.votes_needed(radius, n, sigma, alpha) or n + 1
        assert exercises.VOTES_NEEDED.reference(radius, n, sigma, alpha) == wanted
    assert any(
        exercises.VOTES_NEEDED.reference(*case) > case[1] for case in exercises.VOTES_NEEDED.cases()
    )
    for won, n, sigma, alpha in exercises.CERTIFIED_RADIUS.cases():
        votes = certificates.Votes((1, 0), (int(won), int(n - won)), sigma)
        wanted = certificates.smoothing_radius(votes, alpha).radius
        assert exercises.CERTIFIED_RADIUS.reference(won, n, sigma, alpha) == pytest.approx(wanted)


def test_the_zero_shot_references_are_the_librarys():
    levels = noise.log_levels(0.05, 20, 4000)
    t = noise.flow_time(levels.sigma)
    wanted = noise.on_velocity(levels, exercises.VELOCITY_WEIGHT.reference(t))
    torch.testing.assert_close(wanted, noise.elbo_weight(levels))
    asked_of = {
        (10, 1): ((50, 500), (5, 1)),
        (10, 3): ((50, 500), (5, 1)),
        (102, 1): ((20, 50, 100, 500), (20, 10, 5, 1)),
        (1000, 2): ((50, 100, 500, 1000), (500, 50, 10, 1)),
    }
    for classes, counts, keep, templates in exercises.STAGED_BILL.cases():
        grids, kept = asked_of[classes, templates]
        new = [len(index) for index in racing.stage_levels(grids[-1], grids)]
        assert list(itertools.accumulate(new)) == list(counts) and kept == keep
        asked = []

        def losses(index, alive, asked=asked):
            asked.append(len(index) * int(alive.sum()))
            return torch.rand(*alive.shape, len(index), dtype=torch.float64)

        everyone = torch.ones(1, classes, dtype=torch.bool)
        list(racing.stages(losses, lambda sums: sums, everyone, grids[-1], grids, keep))
        bill = exercises.STAGED_BILL.reference(classes, counts, keep, templates)
        assert bill == templates * sum(asked)


def test_the_evidence_of_prompts_is_that_of_the_class_they_divide():
    """Bold and thin digits are the halves of their class."""
    x, _ = grainy.grainy().sample(20, torch.Generator().manual_seed(0), torch.float64)
    halves = grainy.model((grainy.BOLD, grainy.THIN))
    z = halves.autoencoder.encode(x)
    losses = -halves.denoiser.log_density(z, 0.0).unflatten(1, (10, 2))
    whole = grainy.model().denoiser.log_density(z, 0.0)
    # a class of an odd number of digits has halves of different size
    off = (exercises.TEMPLATE_EVIDENCE.reference(losses) - whole).abs().max()
    assert float(off) < 0.1 < float((-losses.mean(2) - whole).abs().max())


def test_the_stop_reference_is_the_first_look_that_the_librarys_bound_passes():
    seen = set()
    for hits, p, alpha in exercises.ANYTIME_STOP.cases():
        won = hits.cumsum(0).long()
        n = torch.arange(1, len(hits) + 1)
        proven = anytime.anytime_bound(won, n, alpha) > p
        wanted = int(proven.argmax()) + 1 if proven.any() else 0
        assert exercises.ANYTIME_STOP.reference(hits, p, alpha) == wanted
        seen.add(wanted > 0)
    assert seen == {True, False}
