"""The audit: every planted fault is caught by name, an honest classifier has no red light, every check can be both."""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, replace

import pytest
import torch
from diffclass import attacks, audit, intervals
from diffclass.attacks.views import AttackView
from diffclass.audit import planted
from diffclass.audit.attack import Fitted, masked_loss, random_search
from diffclass.audit.base import CannotJudge, Case, check, outweighs, proven
from diffclass.audit.holding import Frozen
from diffclass.certify.certificates import Certificate, Votes, smoothing_radius
from diffclass.classifiers.bayes import BayesClassifier
from diffclass.classifiers.votes import MajorityVote
from diffclass.data.plane import gaussians
from diffclass.denoisers.exact import MixtureDenoiser
from diffclass.evaluation import claims, robustness
from diffclass.evaluation.protocols import Attack, Protocol
from diffclass.noise import NoiseBank, log_levels
from diffclass.storage import results

NAMES = (
    "one_function gradient_is_correct gradient_is_alive logits_are_logits randomness_declared budget_and_range "
    "unbounded_reaches_zero zero_budget_is_clean monotone_in_budget iterative_beats_single steps_converged "
    "restarts_converged white_beats_black transfer_sanity loss_agnostic weak_model_falls targeted_too "
    "fixed_noise_attack eot_converged n_evaluation majority_vote evaluate_after_attack ablate_component "
    "more_levels_not_more_robust_by_masking adaptive_statement certificate_vs_attack votes_are_fresh "
    "radius_ceiling abstain_reported same_function_certified coverage interval_everywhere settings_printed "
    "per_example_min clean_first adversarials_stored"
).split()


def lights(case: Case, only=None) -> dict[int, str]:
    return {made.number: made.light for made in audit.run(case, only)}


def reds(case: Case) -> set[int]:
    return {number for number, light in lights(case).items() if light == audit.RED}


# -- the table --------------------------------------------------------------------------------------------------------


def test_there_are_36_checks_in_the_order_of_the_table():
    assert [one.__name__ for one in audit.CHECKS] == NAMES
    assert [one.number for one in audit.CHECKS] == list(range(1, 37))
    assert all(len(one.__doc__.split()) > 8 for one in audit.CHECKS)


def test_every_row_has_a_light_evidence_and_advice():
    for made in audit.run(planted.case("honest", 16)):
        assert made.light in audit.LIGHTS and len(made.evidence) > 20 and len(made.advice) > 20
        assert made.group in audit.GROUPS and made.seconds >= 0
        assert made.passed == {"green": True, "red": False, "amber": None}[made.light]
        if made.picture:
            assert all(len(line) == len(made.picture.x) for line in made.picture.lines.values())
            assert all(
                math.isfinite(value) for line in made.picture.lines.values() for value in line
            )


def test_checks_are_told_one_by_one_and_can_be_chosen():
    run = audit.run(planted.case("honest", 16))
    assert next(run).number == 1 and next(run).number == 2
    assert [made.number for made in audit.run(planted.case("honest", 16), [25, 4])] == [4, 25]
    with pytest.raises(ValueError, match=r"expected checks from 1 to 36, got \[0, 37\]"):
        audit.run(planted.case("honest", 16), [0, 37])


# -- planted faults ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", planted.FAULTS)
def test_planted_faults_are_caught_by_name(name):
    named = set(planted.FAULTS[name][1])
    found = reds(planted.case(name))
    assert named <= found, f"{name}: {sorted(named - found)} did not fire"
    assert (not found) == (name == "honest"), found


def test_seven_faults_are_told_apart_by_the_checks_that_name_them():
    named = [
        numbers
        for name, (_, numbers) in planted.FAULTS.items()
        if name not in ("honest", "saturated")
    ]
    assert len(planted.FAULTS) == 8 and len(set(named)) == len(named) == 6
    evidence = {
        name: next(audit.run(planted.case(name), [4])).evidence
        for name in ("saturated", "negative")
    }
    assert "64 of 64 images have only negative" in evidence["negative"], (
        "these two share their numbers"
    )
    assert "median margin is 1.1" in evidence["negative"] and "e+04" in evidence["saturated"]


def test_the_honest_classifier_is_audited_in_three_seconds():
    start = time.thread_time()
    assert audit.RED not in lights(planted.case("honest")).values()
    assert time.thread_time() - start < 3


@pytest.mark.parametrize("seed", range(1, 6))
def test_honest_classifiers_stay_free_of_red_on_other_images(seed):
    assert not reds(planted.case("honest", 48, seed))


def check_survives(survives=planted.Honest.survives):
    """The closed form is what attacks reach, at budgets where pixels meet the edge of [0,1] and where none does."""
    classifier = planted.Honest()
    (x, y) = planted.images(300, seed=3)
    for epsilon in (0.1, 0.16, 0.2, 0.3):
        exact = survives(classifier, x, y, epsilon)
        for attack in (attacks.pgd, attacks.apgd):
            *_, last = attack(classifier, x, y, epsilon, steps=40)
            assert torch.equal(~last.fooled, exact), (epsilon, attack.__name__)
        assert 0 < int(exact.sum()) < 300 or epsilon in (0.1, 0.3)


def test_attacks_reach_the_closed_form_of_the_honest_classifier():
    check_survives()


def test_a_closed_form_with_another_norm_is_not_reached():
    def euclidean(self, x, y, epsilon):
        gap = self(x).gather(1, y[:, None]) - self(x)
        gain = epsilon * (self.weight - self.weight[y][:, None]).norm(dim=2)
        return (gap - gain).scatter(1, y[:, None], torch.inf).amin(1) > 0

    with pytest.raises(AssertionError):
        check_survives(euclidean)


def test_one_step_gains_epsilon_times_the_l1_norm():
    classifier = planted.Honest()
    x = 0.5 + planted.means()
    y = torch.arange(planted.CLASSES)
    target = (y + 1) % planted.CLASSES
    loss = attacks.targeted_loss(target)
    first, last = attacks.pgd(classifier, x, y, 0.16, steps=1, step_size=0.16, loss=loss)
    gain = loss(last.logits, y) - loss(first.logits, y)
    assert torch.allclose(
        gain, 0.16 * (classifier.weight[target] - classifier.weight[y]).abs().sum(1), rtol=1e-5
    )


# -- every check, green and red ---------------------------------------------------------------------------------------


class Coin(planted.Honest):
    """Right two times in five, on every image: a mean that no majority bears out."""

    deterministic = False

    def __init__(self):
        super().__init__()
        self.generator = torch.Generator().manual_seed(0)

    def forward(self, x):
        right = (torch.rand(len(x), 1, generator=self.generator) < 0.4).to(x)
        return (2 * right - 1) * super().forward(x)


class Calm(planted.Honest):
    """Random by so little that no answer changes."""

    deterministic = False

    def __init__(self):
        super().__init__()
        self.generator = torch.Generator().manual_seed(0)

    def forward(self, x):
        return super().forward(x) + 1e-3 * torch.randn(
            len(x), planted.CLASSES, generator=self.generator
        )


def lazy(when: Callable[..., bool], otherwise=attacks.apgd):
    """An attack that returns its images wherever `when` says so."""

    def attack(classifier, x, y, epsilon, **options):
        if when(epsilon, options):
            options["generator"] = None
            epsilon = 0.0
        return otherwise(classifier, x, y, epsilon, **options)

    return attack


def slow(classifier, x, y, epsilon, **options):
    """PGD whose steps are a fortieth of the budget, however many there are."""
    return attacks.pgd(classifier, x, y, epsilon, step_size=epsilon / 40, **options)


def too_far(classifier, x, y, epsilon, **options):
    """An attack with twice its budget."""
    return attacks.apgd(classifier, x, y, min(1.0, 2 * epsilon), **options)


def wandering(classifier, x, y, epsilon, **options):
    """An attack that adds noise, budget or not."""
    noise = torch.rand(x.shape, generator=torch.Generator().manual_seed(0))
    return attacks.apgd(classifier, (x + 0.1 * noise).clamp(0, 1), y, epsilon, **options)


def honest(**options) -> Case:
    return replace(planted.case("honest"), **options)


def quantised(**options) -> Case:
    return replace(planted.case("quantised"), **options)


def split_votes() -> Case:
    """An image whose votes prove nothing, and a certifier that answers all the same."""
    votes = Votes((60, 40, 0, 0), (500, 480, 10, 10), 0.12, 0)

    def bold(given: Votes) -> Certificate:
        return replace(smoothing_radius(given), prediction=given.guess)

    return honest(votes=[votes], certify=bold)


def other_votes() -> Case:
    case = planted.case("honest")
    return replace(
        case, votes=[replace(votes, estimation=votes.estimation[::-1]) for votes in case.votes]
    )


def louder(votes: Votes) -> Certificate:
    """A certificate for four times the noise that was voted under: its radius is four times too large."""
    return smoothing_radius(replace(votes, sigma_pixel=4 * votes.sigma_pixel))


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A finished run of two attacks on 500 images: the case that audits it, with its records and perturbations."""
    folder = tmp_path_factory.mktemp("run")
    classifier = planted.Honest()
    (x, y) = planted.images(500)
    runs = (Attack("margin", 10, restarts=8), Attack("CE", 1, "pgd", step=1.0))
    protocol = Protocol("paper", "honest", "linf", planted.EPSILON, runs, "this test")
    own = dict(world="toy", defence="honest", checkpoints={}, version="1")
    list(robustness.run(classifier, x, y, protocol, folder, own, batch=500))
    found = robustness.read(folder)
    return replace(
        planted.case("honest", 500),
        x=x,
        y=y,
        records=claims.records(found),
        rows=found.rows,
        deltas=found.deltas,
    )


def without_settings(case: Case) -> Case:
    return replace(case, records=[replace(one, settings={}) for one in case.records])


def pointed(case: Case) -> Case:
    """Accuracies without an interval."""
    return replace(
        case, records=[replace(one, low=one.value, high=one.value) for one in case.records]
    )


def sparing(case: Case) -> Case:
    """Rows that name the weakest attack as the strongest, and count its hits."""
    rows = [{**row, "strongest": "none", "hits": row["attacks"]["none"][0]} for row in case.rows]
    return replace(case, rows=rows)


def unclean(case: Case) -> Case:
    return replace(case, records=[one for one in case.records if "clean" not in one.what])


FROM_STORED = {
    32: pointed,
    33: without_settings,
    34: sparing,
    35: unclean,
    36: lambda case: replace(case, deltas=torch.zeros_like(case.deltas)),
}
GREEN = {
    18: lambda: honest(classifier=Calm()),
    19: lambda: honest(classifier=Calm()),
    20: lambda: honest(classifier=Calm()),
    21: lambda: honest(classifier=Calm()),
    23: lambda: honest(routes={"itself": planted.Honest()}),
    24: lambda: honest(levels={1: planted.Honest()}),
}
RED = {
    1: lambda: planted.case("two-faced"),
    2: lambda: planted.case("two-faced"),
    3: quantised,
    4: lambda: planted.case("negative"),
    5: lambda: planted.case("reseeded"),
    6: lambda: honest(attack=too_far),
    7: quantised,
    8: lambda: honest(attack=wandering),
    9: lambda: honest(epsilon=0.22, attack=lazy(lambda epsilon, _: epsilon > 0.3)),
    10: lambda: honest(attack=lazy(lambda epsilon, options: options["steps"] > 1, attacks.pgd)),
    11: lambda: honest(attack=slow),
    12: lambda: honest(attack=lazy(lambda _, options: options["generator"] is None)),
    13: quantised,
    14: lambda: quantised(sources={"the linear one": planted.Honest()}, epsilon=0.22),
    15: lambda: planted.case("saturated"),
    16: lambda: honest(attack=lazy(lambda *_: True)),
    17: lambda: honest(
        attack=lazy(lambda _, options: options["loss"] is attacks.margin_loss), batch=7
    ),
    18: lambda: planted.case("noisy"),
    19: lambda: planted.case("noisy"),
    20: lambda: planted.case("noisy"),
    21: lambda: honest(classifier=Coin(), epsilon=0.01),
    22: lambda: planted.case("two-faced"),
    23: lambda: quantised(routes={"without rounding": planted.Honest()}),
    24: lambda: quantised(levels={1: planted.Honest()}),
    25: lambda: honest(statement="It is very robust."),
    26: lambda: honest(certify=louder),
    27: lambda: planted.case("inflated"),
    28: lambda: planted.case("inflated"),
    29: split_votes,
    30: other_votes,
    31: lambda: planted.case("inflated"),
}


@pytest.mark.parametrize("number", range(1, 37))
def test_every_check_is_green_somewhere_and_red_elsewhere(number, stored):
    green = stored if number > 31 else GREEN.get(number, honest)()
    red = FROM_STORED[number](stored) if number > 31 else RED[number]()
    (good,) = audit.run(green, [number])
    (bad,) = audit.run(red, [number])
    assert (good.light, bad.light) == ("green", "red"), (good.evidence, bad.evidence)
    assert "could not be made" not in bad.evidence


@pytest.mark.parametrize("number", [18, 19, 20, 21, 23, 24, 26, 27, 28, 29, 30, 32, 33, 34, 35, 36])
def test_what_cannot_be_judged_is_amber_and_says_why(number):
    (made,) = audit.run(honest(votes=()), [number])
    assert made.light == "amber" and made.passed is None and len(made.evidence.split()) > 5


def test_a_random_classifier_without_luck_has_no_red_light():
    assert not reds(honest(classifier=Calm(), votes=()))


def test_the_stored_perturbations_are_the_attack_that_is_audited(stored):
    assert torch.equal(stored.main.x, (stored.x + stored.deltas).clamp(0, 1))
    assert torch.equal(stored.fallen, torch.tensor([row["hits"] == 0 for row in stored.rows]))
    assert not reds(stored)
    (made,) = audit.run(FROM_STORED[36](stored), [36])
    assert "100.0% survive" in made.evidence
    with pytest.raises(
        ValueError, match="expected a row and a perturbation for each of 500 images, got 500 and 3"
    ):
        replace(stored, deltas=stored.deltas[:3])


def test_few_images_are_amber_for_their_interval(stored):
    few = [
        results.accuracy_record(90, 100, one.what, intervals.interval(90, 100), source="test")
        for one in stored.records
    ]
    (made,) = audit.run(replace(stored, records=few), [32])
    assert made.light == "amber" and "fewest images are 100" in made.evidence


def test_an_exception_inside_a_check_is_a_red_light_that_says_so():
    class Broken(planted.Honest):
        def forward(self, x):
            raise RuntimeError("out of\n  order")

    found = list(audit.run(honest(classifier=Broken(), votes=()), [1, 4, 25]))
    assert [made.light for made in found] == ["red", "red", "green"]
    assert found[0].evidence == "the check could not be made: RuntimeError: out of order"


def test_a_check_says_what_it_cannot_judge():
    @check(1, "group", "advice")
    def blind(case):
        raise CannotJudge("there is no light")

    made = blind(None)
    assert (made.light, made.evidence, made.name, made.number) == (
        "amber",
        "there is no light",
        "blind",
        1,
    )


# -- statistics -------------------------------------------------------------------------------------------------------


def check_false_alarms(light=proven):
    """With the tolerated share itself, at most 1 % of red lights; three times that share is seen."""
    rng = torch.Generator().manual_seed(0)

    def alarms(n, share):
        counts = torch.binomial(
            torch.full((3000,), float(n)), torch.full((3000,), share), generator=rng
        )
        values, times = counts.int().unique(return_counts=True)
        return (
            sum(
                int(t)
                for k, t in zip(values, times, strict=True)
                if light(int(k), n, 0.05) == "red"
            )
            / 3000
        )

    for n in (16, 64, 500):
        assert alarms(n, 0.05) < 0.014, n
    assert alarms(500, 0.15) > 0.95 and alarms(64, 0.25) > 0.9


def test_red_lights_keep_their_promise():
    check_false_alarms()
    assert (
        proven(0, 16, 0.01) == "green"
        and proven(1, 16, 0.01) == "amber"
        and proven(3, 16, 0.01) == "red"
    )
    assert proven(3, 16, 0.01, part=0.2) == "amber", "a fifth of all images stands behind these"


def test_a_light_without_a_bound_alarms_falsely():
    with pytest.raises(AssertionError):
        check_false_alarms(lambda count, n, allowed: "red" if count > allowed * n else "green")


def test_the_sign_test_is_exact():
    assert outweighs(7, 0) and not outweighs(6, 0), "2^-7 < 0.01 < 2^-6"
    assert outweighs(19, 5) and not outweighs(18, 6) and not outweighs(0, 0) and not outweighs(0, 9)


# -- what checks stand on ---------------------------------------------------------------------------------------------


def test_held_noise_repeats_and_leaves_every_generator_as_it_was():
    class Global(planted.Honest):
        def forward(self, x):
            return super().forward(x) + torch.randn(len(x), planted.CLASSES)

    x = planted.images(3)[0]
    for classifier in (planted.Noisy(), Global()):
        held = Frozen(classifier, 5)
        before = (
            torch.get_rng_state(),
            getattr(classifier, "generator", torch.Generator()).get_state(),
        )
        assert torch.equal(held(x), held(x)) and not torch.equal(held(x), Frozen(classifier, 6)(x))
        after = (
            torch.get_rng_state(),
            getattr(classifier, "generator", torch.Generator()).get_state(),
        )
        assert all(map(torch.equal, before, after))
        assert held.deterministic and not torch.equal(classifier(x), classifier(x))


def test_an_audit_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    list(audit.run(planted.case("noisy", 16), range(1, 20)))
    assert torch.equal(torch.get_rng_state(), before)


def test_the_fitted_model_falls_exactly_beyond_its_radius():
    x, y = planted.images(40)
    weak = Fitted(x.double(), y, planted.CLASSES)
    x = x.double().clamp(0.3, 0.7)
    for norm, most in (("linf", 0.3), ("l2", 2.0)):
        radius = weak.radius(x, y, norm)
        for share, falls in ((0.99, False), (1.01, True)):
            inside = (radius > 0) & (share * radius < most)
            assert int(inside.sum()) > 20
            for i in inside.nonzero()[:6, 0].tolist():
                one = x[i : i + 1]
                label = y[i : i + 1]
                reach = float(share * radius[i])
                *_, last = attacks.worst_case(
                    attacks.pgd(
                        weak,
                        one,
                        label,
                        reach,
                        norm=norm,
                        loss=attacks.targeted_loss((label + k) % 4),
                    )
                    for k in (1, 2, 3)
                )
                assert bool(last.fooled) == falls, (norm, share, i)


@pytest.mark.parametrize("norm, epsilon", [("linf", 0.16), ("l2", 1.5)])
def test_random_search_stays_in_its_budget_and_finds(norm, epsilon):
    case = honest(norm=norm, epsilon=epsilon, votes=())
    places = case.everyone[case.fallen]
    x = random_search(case, places, 400, torch.Generator().manual_seed(0))
    assert float(attacks.size_of(x - case.x[places], norm).max()) <= epsilon + 1e-6
    assert 0 <= float(x.min()) and float(x.max()) <= 1
    assert int(case.falls(x, places).sum()) >= len(places) / 3 > 0


def test_the_masked_loss_is_blind_to_negative_logits_and_right_about_others():
    logits = torch.tensor([[3.0, 1.0, 2.0]])
    y = torch.tensor([0])
    assert masked_loss(logits, y).tolist() == [-1.0] and masked_loss(logits - 10, y).tolist() == [
        0.0
    ]


def test_restarts_of_the_audited_attack_are_kept_where_they_fool():
    dead = lazy(lambda _, options: options["generator"] is None)
    one, more = (honest(attack=dead, starts=starts, votes=()) for starts in (1, 3))
    assert not bool(one.fallen.any()) and int(more.fallen.sum()) >= 10
    assert torch.equal(more.main.x[~more.fallen], one.x[~more.fallen]), (
        "survivors keep what was tried first"
    )


def test_a_case_of_a_diffusion_classifier_names_its_routes_and_levels():
    law = gaussians()
    bank = NoiseBank.fixed(log_levels(0.05, 2, 8), law.image_shape, 4)
    classifier = BayesClassifier(MixtureDenoiser.of_law(law), bank)
    x, y = law.sample(12, torch.Generator().manual_seed(0))
    case = audit.case_of(classifier, x.float(), y, 0.05, closer=4)
    assert list(case.routes) == ["uniform weights", "the telescoped gradient"] and list(
        case.levels
    ) == [4, 16]
    assert isinstance(case.view, AttackView) and case.deterministic
    assert "red" not in lights(case, [3, 4, 5, 6, 8, 22]).values()
    vote = MajorityVote(classifier.with_fresh_noise(torch.Generator().manual_seed(0)), 3)
    case = audit.case_of(vote, x.float(), y, 0.05, closer=4)
    assert (
        case.view.classifier is vote.classifier
        and case.classifier is vote
        and not case.deterministic
    )
    sure = (vote(case.x) == 3).any(1)
    assert int(sure.sum()) >= 4, (
        "unanimous votes repeat; the noise behind them has to be found all the same"
    )
    assert lights(replace(case, x=x.float()[sure], y=y[sure]), [5]) == {5: "green"}


def test_a_vote_over_a_voter_that_reseeds_is_no_random_classifier():
    vote = MajorityVote(planted.Reseeded(), 3)
    assert lights(audit.case_of(vote, *planted.images(12), 0.1), [5]) == {5: "red"}


def test_a_classifier_that_seeds_the_global_generator_is_red():
    class Seeding(Calm):
        def forward(self, x):
            torch.set_rng_state(torch.Generator().manual_seed(0).get_state())
            return super().forward(x)

    (made,) = audit.run(honest(classifier=Seeding(), votes=()), [5])
    assert made.light == "red" and "reseeds torch's global generator" in made.evidence


@pytest.mark.parametrize(
    "options, sentence",
    [
        (dict(epsilon=8), "did you mean 8/255"),
        (dict(x=torch.full((64, 1, 8, 8), 200.0)), "divide by 255"),
        (dict(y=torch.zeros(3, dtype=torch.long)), "expected one label for each of 64 images"),
        (dict(steps=0), "expected at least one image, step, draw"),
        (dict(norm="l1"), "expected norm 'linf' or 'l2'"),
    ],
)
def test_a_case_that_cannot_be_meant_gets_a_sentence(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        honest(**options)


def test_a_row_can_be_written_as_json():
    import json

    assert all(
        json.loads(json.dumps(asdict(made), allow_nan=False)) for made in audit.run(honest())
    )
