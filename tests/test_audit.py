"""The audit: every planted fault is caught by name, an honest classifier has no red light, every check can be both."""

import functools
import math
import re
import time
from collections.abc import Callable
from dataclasses import asdict, replace

import foreign_modules
import pytest
import torch
from diffclass import attacks, audit
from diffclass.attacks.views import AttackView
from diffclass.audit import planted
from diffclass.audit.attack import Fitted, masked_loss, random_search
from diffclass.audit.base import CannotJudge, Case, check, outweighs, proven
from diffclass.certify.certificates import Certificate, Votes, smoothing_radius
from diffclass.certify.counting import draw_soft_votes
from diffclass.certify.soft import SoftCertificate, SoftTally, soft_radius
from diffclass.classifiers.base import Held, decided
from diffclass.classifiers.bayes import BayesClassifier
from diffclass.classifiers.foreign import Foreign
from diffclass.classifiers.purified import Purification, PurifiedClassifier
from diffclass.classifiers.smoothed import Smoothed
from diffclass.classifiers.votes import MajorityVote
from diffclass.data.plane import gaussians
from diffclass.denoisers.exact import MixtureDenoiser
from diffclass.evaluation import claims, runs
from diffclass.evaluation.protocols import Attack, Protocol
from diffclass.noise import log_levels
from diffclass.storage import results
from torch import nn

NAMES = (
    "one_function gradient_is_correct gradient_is_alive logits_are_logits randomness_declared budget_and_range "
    "unbounded_reaches_zero zero_budget_is_clean monotone_in_budget iterative_beats_single steps_converged "
    "restarts_converged white_beats_black transfer_sanity loss_agnostic weak_model_falls targeted_too "
    "fixed_noise_attack eot_converged n_evaluation majority_vote evaluate_after_attack ablate_component "
    "more_levels_not_more_robust_by_masking adaptive_statement certificate_vs_attack votes_are_fresh "
    "radius_ceiling abstain_reported same_function_certified coverage interval_everywhere settings_printed "
    "per_example_min clean_first adversarials_stored same_in_both_modes same_for_every_caller "
    "same_at_every_time nothing_leaked"
).split()


def lights(case: Case, only=None) -> dict[int, str]:
    return {result.number: result.light for result in audit.run(case, only)}


def reds(case: Case) -> set[int]:
    return {number for number, light in lights(case).items() if light == audit.RED}


# -- the table --------------------------------------------------------------------------------------------------------


def test_there_are_40_checks_in_the_order_of_the_table():
    assert [one.__name__ for one in audit.CHECKS] == NAMES
    assert [one.number for one in audit.CHECKS] == list(range(1, 41))
    assert all(len(one.__doc__.split()) > 8 for one in audit.CHECKS)


def test_every_row_has_a_light_evidence_and_advice():
    for result in audit.run(planted.case("honest", 16)):
        assert result.light in audit.LIGHTS
        assert len(result.evidence) > 20 and len(result.advice) > 20
        assert result.group in audit.GROUPS and result.seconds >= 0
        assert result.passed == {"green": True, "red": False, "amber": None}[result.light]
        if result.picture:
            lines = result.picture.lines.values()
            assert all(len(line) == len(result.picture.x) for line in lines)
            assert all(math.isfinite(value) for line in lines for value in line)


def test_checks_come_one_by_one_and_can_be_chosen():
    run = audit.run(planted.case("honest", 16))
    assert next(run).number == 1 and next(run).number == 2
    assert list(lights(planted.case("honest", 16), [25, 4])) == [4, 25]
    with pytest.raises(ValueError, match=r"expected checks from 1 to 40, got \[0, 41\]"):
        audit.run(planted.case("honest", 16), [0, 41])


def test_what_a_check_has_to_see_first_is_seen_before_any_other():
    case = honest(votes=(), attack=lazy(lambda *_: True))
    run = audit.run(case, [4, 39])
    next(run)
    assert "opening" in vars(case), "answers at the end are compared with those at the beginning"
    case.classifier.weight.mul_(0.5)
    assert next(run).light == "red"


def test_a_weight_that_changes_by_little_is_seen():
    case = honest(votes=())
    run = audit.run(case, [4, 39])
    next(run)
    case.classifier.bias[0] += 1e-6
    (result,) = run
    assert result.light == "red" and "1 of 2 weights and buffers have changed" in result.evidence
    assert "(bias)" in result.evidence


def test_a_mode_is_put_back_with_its_statistics():
    module = foreign_modules.built(foreign_modules.normalised)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    case = foreign(module, epsilon=0.04)
    (result,) = audit.run(case, [37])
    assert result.light != "red" and "an attack through training mode fells" in result.evidence
    assert not any(part.training for part in module.modules())
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


class DropsByHand(foreign_modules.Linear):
    """Leaves most pixels out while it is trained, in code of its own."""

    def forward(self, x):
        kept = (torch.rand(x.shape) < 0.1).to(x) if self.training else 1.0
        return super().forward(x * kept)


def test_noise_of_training_mode_alone_is_no_fault():
    (result,) = audit.run(foreign(DropsByHand()), [37])
    assert result.light == "amber" and "its own code draws noise" in result.evidence


# -- planted faults ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", planted.FAULTS)
def test_planted_faults_are_caught_by_name(name):
    named = set(planted.FAULTS[name][1])
    red = reds(planted.case(name))
    assert named <= red, f"{name}: {sorted(named - red)} did not fire"
    assert (not red) == (name == "honest"), red


def test_eight_faults_are_told_apart_by_the_checks_that_name_them():
    named = [
        numbers
        for name, (_, numbers) in planted.FAULTS.items()
        if name not in ("honest", "saturated")
    ]
    assert len(planted.FAULTS) == 9 and len(set(named)) == len(named) == 7
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
    x, y = planted.images(300, seed=3)
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

    def sample_noise(self, images, generator):
        return torch.rand((images, 1), generator=generator)

    def logits(self, x, noise):
        right = (noise < 0.4).to(x)
        return (2 * right - 1) * self.linear(x)


class Calm(planted.Honest):
    """Random by so little that no answer changes."""

    def sample_noise(self, images, generator):
        return torch.randn((images, planted.CLASSES), generator=generator)

    def logits(self, x, noise):
        return self.linear(x) + 1e-3 * noise


def coin() -> Case:
    return honest(classifier=Coin().eval(), held=False, epsilon=0.01)


def calm(**options) -> Case:
    return honest(**{**dict(classifier=Calm().eval(), held=False), **options})


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
    classifier = planted.Honest().eval()
    x, y = planted.images(500)
    listed = (Attack("margin", 10, restarts=8), Attack("CE", 1, "pgd", step=1.0))
    protocol = Protocol("honest", "linf", planted.EPSILON, listed)
    own = dict(world="toy", classifier="honest", checkpoints={}, version="1")
    list(runs.run(classifier, x, y, protocol, folder, own))
    run = runs.read(folder)
    return replace(
        planted.case("honest", 500),
        x=x,
        y=y,
        records=claims.records_of(run),
        rows=run.rows,
        deltas=run.deltas,
    )


def without_settings(case: Case) -> Case:
    return replace(case, records=[replace(one, settings={}) for one in case.records])


def pointed(case: Case) -> Case:
    """Accuracies without an interval."""
    return replace(
        case, records=[replace(one, low=one.value, high=one.value) for one in case.records]
    )


def sparing(case: Case) -> Case:
    """Rows that name the clean image as the strongest attack, and count its hits."""
    rows = [{**row, "strongest": 0, "hits": row["attacks"][0][0]} for row in case.rows]
    return replace(case, rows=rows)


def unclean(case: Case) -> Case:
    return replace(case, records=[one for one in case.records if one.attack is not None])


FROM_STORED = {
    32: pointed,
    33: without_settings,
    34: sparing,
    35: unclean,
    36: lambda case: replace(case, deltas=torch.zeros_like(case.deltas)),
}
GREEN = {
    18: calm,
    19: calm,
    20: calm,
    21: calm,
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
    21: coin,
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
    37: lambda: foreign(foreign_modules.TwoModes()),
    38: lambda: foreign(foreign_modules.GradientOnTheStack()),
    39: lambda: foreign(foreign_modules.Expires()),
    40: lambda: honest(training=lambda: planted.images(64)[0]),
}


@pytest.mark.parametrize("number", range(1, 41))
def test_every_check_is_green_somewhere_and_red_elsewhere(number, stored):
    from_stored = number in FROM_STORED
    green = stored if from_stored else GREEN.get(number, honest)()
    red = FROM_STORED[number](stored) if from_stored else RED[number]()
    (good,) = audit.run(green, [number])
    (bad,) = audit.run(red, [number])
    assert (good.light, bad.light) == ("green", "red"), (good.evidence, bad.evidence)
    assert "could not be made" not in bad.evidence


@pytest.mark.parametrize("number", [18, 19, 20, 21, 23, 24, 26, 27, 28, 29, 30, 32, 33, 34, 35, 36])
def test_what_cannot_be_judged_is_amber_and_says_why(number):
    (result,) = audit.run(honest(votes=()), [number])
    assert result.light == "amber" and result.passed is None
    assert len(result.evidence.split()) > 5


def stopping(**options) -> Case:
    """The honest classifier, whose votes were counted until they sufficed."""
    return replace(planted.case("peeked"), **options)


def test_votes_that_stop_are_honest_by_the_bound_that_holds_at_every_look():
    anytime = functools.partial(smoothing_radius, bound="anytime")
    numbers = list(range(26, 32))
    case = stopping(certify=anytime)
    assert min(votes.n for votes in case.votes) < 1000
    assert lights(case, numbers) == dict.fromkeys(numbers, "green")
    (result,) = audit.run(case, [31])
    assert "at any of 25 looks" in result.evidence


def test_a_fixed_bound_that_is_read_at_every_look_is_named():
    by_number = {result.number: result for result in audit.run(stopping(), [27, 28, 29, 31])}
    assert by_number[27].light == by_number[31].light == "red"
    assert "as if n had been fixed before" in by_number[27].evidence
    few = re.findall(r"(\d+) at p = ", by_number[31].evidence)
    assert max(map(int, few)) > 2000 * 0.002


def test_ceiling_and_abstention_are_those_of_the_bound_that_is_due():
    """Ten agreeing votes prove a majority if their number was fixed, none where they stopped themselves."""
    votes = Votes((10, 0), (10, 0), 0.12, 0, stopped=True)
    case = stopping(votes=[votes])
    assert smoothing_radius(replace(votes, stopped=False)).radius > 0
    assert smoothing_radius(votes, bound="anytime").radius == 0
    assert lights(case, [28, 29]) == {28: "red", 29: "red"}
    fixed = replace(case, votes=[replace(votes, stopped=False)])
    assert lights(fixed, [28, 29]) == {28: "green", 29: "green"}


class Spoken(planted.Honest):
    """The honest classifier, whose logits are log-probabilities."""

    scale = "nats"

    def logits(self, x, noise):
        """Surer than the honest one, and not so sure that all soft votes are alike."""
        return (8 * super().logits(x, noise)).log_softmax(1)


def soft_case(certify=soft_radius, **options) -> Case:
    """A claim by soft votes of eight images."""
    case = honest(classifier=Spoken().eval(), certify=certify)
    votes = []
    for picture, one in enumerate(case.x[:8].split(1)):
        *_, (_, tally) = draw_soft_votes(
            Smoothed(case.classifier, 0.12), one, estimation=300, picture=picture
        )
        votes.append(tally)
    return replace(case, **{"votes": votes, **options})


def tenfold(votes: SoftTally) -> SoftCertificate:
    """A certificate of ten times the soft votes that were cast."""
    pairs = tuple((share, 10 * count) for share, count in votes.estimation)
    return soft_radius(replace(votes, estimation=pairs))


def test_soft_votes_are_audited_as_hard_ones_are():
    numbers = list(range(26, 32))
    case = soft_case()
    assert any(case.certify(votes).radius > 0.02 for votes in case.votes)
    assert lights(case, numbers) == dict.fromkeys(numbers, "green")
    (result,) = audit.run(case, [31])
    assert "at any of 10 looks" in result.evidence
    (result,) = audit.run(soft_case(functools.partial(soft_radius, bound="hoeffding")), [31])
    assert result.light == "green" and "looks" not in result.evidence


def test_a_false_claim_by_soft_votes_is_named():
    numbers = [27, 28, 31]
    assert lights(soft_case(tenfold), numbers) == {27: "red", 28: "red", 31: "red"}

    def louder(votes):  # a certificate for eight times the noise that was voted under
        return soft_radius(replace(votes, sigma_pixel=8 * votes.sigma_pixel))

    assert lights(soft_case(louder), [26]) == {26: "red"}

    def bold(votes):  # answers where nothing is proven
        return replace(soft_radius(votes), prediction=votes.guess)

    split = SoftTally((50_000, 49_000), ((500, 100), (510, 100)), 0.12, 0)
    assert lights(soft_case(bold, votes=[split]), [29]) == {29: "red"}
    assert lights(soft_case(votes=[split]), [29]) == {29: "green"}
    case = soft_case()
    others = [replace(votes, seed=1) for votes in case.votes]
    assert lights(replace(case, votes=others), [30]) == {30: "red"}
    again = SoftTally((80_000, 20_000), ((700, 50), (900, 50)), 0.12, 0)  # 80 000 in all
    assert lights(soft_case(votes=[again]), [27]) == {27: "red"}
    seedless = [replace(votes, seed=None) for votes in case.votes]
    assert lights(replace(case, votes=seedless), [27, 30]) == {27: "red", 30: "amber"}


def test_a_random_classifier_without_luck_has_no_red_light():
    assert not reds(calm(votes=()))


def test_certificates_of_a_random_classifier_are_about_the_function_that_is_claimed():
    """Votes are drawn with new base noise: they recur for a claim about new noise, and not for one about held noise."""
    fresh = planted.case("noisy")
    base = fresh.classifier
    votes = []
    for place in range(4):
        *_, (_, counted) = planted.draw_votes(
            Smoothed(base, 0.12), fresh.x[place : place + 1], estimation=300, picture=place
        )
        votes.append(counted)
    assert lights(replace(fresh, votes=votes), [30]) == {30: "green"}
    assert lights(replace(fresh, votes=votes, held=True), [30]) == {30: "red"}
    other_seed = [replace(votes[0], seed=1), *votes[1:]]
    assert lights(replace(fresh, votes=other_seed), [30]) == {30: "red"}


def test_the_stored_perturbations_are_the_attack_that_is_audited(stored):
    assert torch.equal(stored.main.x, (stored.x + stored.deltas).clamp(0, 1))
    assert torch.equal(stored.fallen, torch.tensor([row["hits"] == 0 for row in stored.rows]))
    assert not reds(stored)
    (result,) = audit.run(FROM_STORED[36](stored), [36])
    assert "100.0% survive" in result.evidence
    with pytest.raises(
        ValueError, match="expected a row and a perturbation for each of 500 images, got 500 and 3"
    ):
        replace(stored, deltas=stored.deltas[:3])


def test_few_images_are_amber_for_their_interval(stored):
    few = [
        results.accuracy_record(
            90, 100, world=one.world, classifier=one.classifier, attack=one.attack, source="test"
        )
        for one in stored.records
    ]
    (result,) = audit.run(replace(stored, records=few), [32])
    assert result.light == "amber" and "fewest images are 100" in result.evidence


def test_the_worst_of_draws_and_single_attacks_are_not_the_claim(stored):
    claim = next(one for one in stored.records if one.attack and one.part is None)
    assert lights(replace(stored, records=[claim]), [34]) == {34: "green"}
    for other in (replace(claim, statistic="worst"), replace(claim, part="one attack")):
        (result,) = audit.run(replace(stored, records=[other]), [34])
        assert result.light == "red" and "reported nothing" in result.evidence


def test_records_of_a_random_classifier_bear_out_their_rows(tmp_path):
    """Of a stored run the claim is about new noise: means of ten draws, and no red light under reporting."""
    classifier = Calm().eval()
    x, y = planted.images(70)
    protocol = Protocol("honest", "linf", planted.EPSILON, (Attack("margin", 10, restarts=2),))
    own = dict(world="toy", classifier="calm", checkpoints={}, version="1")
    list(runs.run(classifier, x, y, protocol, tmp_path, own))
    run = runs.read(tmp_path)
    records = claims.records_of(run)
    case = calm(x=x, y=y, votes=(), records=records, rows=run.rows, deltas=run.deltas)
    assert {one.statistic for one in records} == {"mean", "worst"}
    assert lights(case, range(32, 37)) == {
        32: "amber",
        33: "green",
        34: "green",
        35: "green",
        36: "green",
    }


def test_an_exception_inside_a_check_is_a_red_light_that_says_so():
    class Broken(planted.Honest):
        def logits(self, x, noise):
            raise RuntimeError("out of\n  order")

    results = list(audit.run(honest(classifier=Broken().eval(), votes=()), [1, 4, 25]))
    assert [result.light for result in results] == ["red", "red", "green"]
    assert results[0].evidence == "the check could not be made: RuntimeError: out of order"


def test_a_check_says_what_it_cannot_judge():
    @check(1, "group", "advice")
    def blind(case):
        raise CannotJudge("there is no light")

    result = blind(None)
    assert (result.light, result.evidence, result.name, result.number) == (
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


def test_a_held_claim_is_asked_with_one_noise_and_a_fresh_one_with_new_noise():
    fresh = calm(votes=())
    held = replace(fresh, held=True, seed=3)
    x = fresh.x
    ask = fresh.asked(fresh.classifier)
    assert not torch.equal(ask(x), ask(x)) and not fresh.deterministic and fresh.repeats > 1
    ask = held.asked(held.classifier)
    assert torch.equal(ask(x), ask(x)) and held.deterministic and held.repeats == 1
    assert torch.equal(ask(x), Held.seeded(fresh.classifier, 3)(x))
    assert torch.equal(held.claimed(x), ask(x)) and fresh.claimed is fresh.classifier


def test_attacks_are_given_the_noise_that_is_held_or_new_noise_for_every_step_and_draw():
    def recording(classifier, x, y, epsilon, *, noise, **options):
        noises.append([attacks.noise_at(noise, step, draw) for step in (0, 1) for draw in (0, 1)])
        return attacks.pgd(classifier, x, y, epsilon, noise=noise, **options)

    noises = []
    case = calm(attack=recording, steps=2, batch=40)
    case.attacked(case.everyone)
    replace(case, held=True).attacked(case.everyone)
    fresh, held = noises[:2], noises[2:]
    assert [len(one[0]) for one in fresh] == [40, 24] and [len(one[0]) for one in held] == [1, 1]
    drawn = [noise for one in fresh for noise in one]
    assert not any(torch.equal(a[:24], b[:24]) for a in drawn for b in drawn if a is not b)
    same = Calm().sample_noise(1, torch.Generator().manual_seed(case.seed))
    assert all(torch.equal(noise, same) for one in held for noise in one)


def test_several_draws_of_held_noise_are_refused():
    with pytest.raises(ValueError, match="expected one draw of noise that is held, got draws=4"):
        calm(held=True, draws=4)


def test_an_audit_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    list(audit.run(planted.case("noisy", 16), range(1, 20)))
    list(audit.run(foreign(Jumpy(), "hidden", steps=5), (1, 2, 5, 12, 13, 18, 19)))
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


def plane_case(wrap=lambda classifier: classifier, **options) -> Case:
    law = gaussians()
    classifier = BayesClassifier(MixtureDenoiser.of_law(law), log_levels(0.05, 2, 8), samples=4)
    x, y = law.sample(12, torch.Generator().manual_seed(0))
    return audit.case_of(wrap(classifier).eval(), x.float(), y, 0.05, closer=4, **options)


def test_a_case_of_a_diffusion_classifier_names_its_routes_and_levels():
    case = plane_case()
    assert list(case.routes) == ["uniform weights", "the telescoped gradient"]
    assert list(case.levels) == [4, 16]
    assert isinstance(case.view, AttackView) and case.deterministic
    assert case.view.classifier is case.classifier
    assert "red" not in lights(case, [1, 2, 3, 4, 5, 6, 8, 22]).values()
    assert "red" not in lights(replace(case, held=False), [1, 2, 3, 4, 5, 6, 8, 22]).values()


def test_a_vote_is_attacked_by_its_surrogate():
    case = plane_case(lambda classifier: MajorityVote(classifier, 3), held=False)
    vote = case.classifier
    assert case.view.classifier is vote.surrogate() and not case.deterministic
    assert replace(case, view=None).target is vote.surrogate()
    counts = Held.seeded(vote)(case.x)
    sure = (counts == 3).any(1)
    assert int(sure.sum()) >= 4, (
        "unanimous votes repeat; the noise behind them has to be seen all the same"
    )
    assert lights(replace(case, x=case.x[sure], y=case.y[sure]), [5]) == {5: "green"}


def test_a_purified_classifier_is_attacked_by_both_gradients_and_behind_the_purifier():
    def purified(exact):
        return lambda classifier: PurifiedClassifier(
            Purification(classifier.denoiser, steps=2, exact=exact), classifier
        )

    x = plane_case().x
    leaf = x.clone().requires_grad_()
    for exact in (True, False):
        case = plane_case(purified(exact))
        slopes = {}
        for name, route in {"itself": case.view, **case.routes}.items():
            logits = Held(route, case.claimed.noise)(leaf)
            slopes[name] = torch.autograd.grad(logits[:, 0].sum(), leaf)[0]
            if name != "the classifier alone":
                assert torch.equal(logits, case.asked(case.view)(x)), "other gradients, same values"
        other = [
            name
            for name, slope in slopes.items()
            if name != "the classifier alone" and not torch.allclose(slope, slopes["itself"])
        ]
        assert other and "the classifier alone" in slopes, f"exact={exact}: {list(slopes)}"
        assert "could not be made" not in next(audit.run(case, [23])).evidence


def test_a_vote_over_a_voter_that_ignores_its_noise_is_no_random_classifier():
    vote = MajorityVote(planted.Reseeded(), 3).eval()
    assert lights(audit.case_of(vote, *planted.images(12), 0.1, held=False), [5]) == {5: "red"}


class Rounded(torch.nn.Module):
    """Logits that are another hair apart where gradients are wanted: by rounding, or drawn there."""

    def __init__(self, drawn: bool):
        super().__init__()
        self.linear = torch.nn.Linear(64, 3)
        self.drawn = drawn

    def forward(self, x):
        scores = self.linear(x.flatten(1))
        if x.requires_grad:
            apart = 5e-6 * torch.ones(3)
            scores = scores + (torch.randn(3) * apart if self.drawn else apart) * torch.arange(3)
        return scores


@pytest.mark.parametrize("drawn", [False, True])
def test_rounding_with_gradients_is_no_noise_and_a_draw_there_is(drawn):
    with torch.random.fork_rng():
        torch.manual_seed(3)
        module = Rounded(drawn)
    classifier = Foreign(module.double(), 3, (1, 8, 8)).eval()
    x = torch.rand(12, 1, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    case = audit.case_of(classifier, x, decided(classifier(x)), 0.1)
    assert lights(case, [5]) == {5: "red" if drawn else "green"}


def test_a_classifier_that_seeds_the_global_generator_is_red():
    class Seeding(Calm):
        def logits(self, x, noise):
            torch.set_rng_state(torch.Generator().manual_seed(0).get_state())
            return super().logits(x, noise)

    (result,) = audit.run(calm(classifier=Seeding().eval(), votes=()), [5])
    assert result.light == "red" and "reseeds torch's global generator" in result.evidence


# -- other people's modules -------------------------------------------------------------------------------------------


class Linear(nn.Module):
    """The honest linear function as somebody else would write it."""

    def __init__(self):
        super().__init__()
        self.inner = planted.Honest()

    def forward(self, x):
        return self.inner.linear(x)


class Jumpy(Linear):
    """Draws its own noise from torch's global state."""

    def forward(self, x):
        return super().forward(x) + 1e-3 * torch.randn(len(x), planted.CLASSES)


class Kept(Linear):
    """Draws from a generator of its own."""

    def __init__(self):
        super().__init__()
        self.generator = torch.Generator().manual_seed(0)

    def forward(self, x):
        noise = torch.randn(len(x), planted.CLASSES, generator=self.generator)
        return super().forward(x) + 1e-3 * noise


class Clocked(Linear):
    """Another answer at every call, from what no generator rewinds."""

    def __init__(self):
        super().__init__()
        self.asked = 0

    def forward(self, x):
        self.asked += 1
        return super().forward(x) + 0.01 * torch.arange(planted.CLASSES).roll(self.asked)


class Argued(Linear):
    """Its noise is an argument."""

    def sample_noise(self, images, generator):
        return torch.randn((images, planted.CLASSES), generator=generator)

    def forward(self, x, noise):
        return super().forward(x) + 1e-3 * noise


class Pairs(Linear):
    """Logits, and something else."""

    def forward(self, x):
        return super().forward(x), x


class Shares(Linear):
    """Probabilities."""

    def forward(self, x):
        return super().forward(x).softmax(1)


class Dropped(Linear):
    """Drops pixels while it is in training mode."""

    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.1)

    def forward(self, x):
        return super().forward(self.drop(x))


def foreign(module: nn.Module, randomness: str = "none", **options) -> Case:
    """Somebody else's module under audit, as a random one where it says so."""
    classifier = Foreign(module.eval(), planted.CLASSES, planted.SHAPE, randomness)
    own = dict(held=randomness == "none", statement=planted.STATEMENT)
    epsilon = options.pop("epsilon", planted.EPSILON)
    return audit.case_of(classifier.eval(), *planted.images(24), epsilon, **{**own, **options})


@pytest.mark.parametrize(
    "module, randomness",
    [(Linear, "none"), (Jumpy, "hidden"), (Kept, "hidden"), (Argued, "argument")],
)
def test_honest_modules_of_other_people_have_no_red_light(module, randomness):
    case = foreign(module(), randomness)
    assert not reds(case)
    assert case.deterministic == (randomness == "none")


def test_hidden_noise_can_be_held():
    case = foreign(Jumpy(), "hidden", held=True)
    assert not reds(case) and case.deterministic
    (result,) = audit.run(case, [1])
    assert "one by one" in result.evidence


@pytest.mark.parametrize("module", [Jumpy, Kept, Clocked])
def test_hidden_randomness_is_discovered_where_none_is_declared(module):
    (result,) = audit.run(foreign(module()), [5])
    assert result.light == "red" and "it declares no noise" in result.evidence


def test_hidden_noise_that_cannot_be_rewound_or_is_not_there_is_red():
    for module in (Clocked(), Linear()):
        (result,) = audit.run(foreign(module, "hidden"), [5])
        assert result.light == "red" and "it declares noise" in result.evidence, module


def test_a_module_in_training_mode_is_red_and_says_so():
    case = foreign(Dropped())
    assert lights(case, [4, 5]) == {4: "green", 5: "green"}
    case.classifier.module.train()
    logits, randomness = audit.run(case, [4, 5])
    assert logits.light == "red" and "call .eval()" in logits.evidence
    assert randomness.light == "red", "dropout answers otherwise at every call"


def test_a_module_that_returns_a_tuple_is_red_wherever_it_is_asked():
    function, logits = audit.run(foreign(Pairs()), [1, 4])
    assert (function.light, logits.light) == ("red", "red")
    for result in (function, logits):
        assert "expected logits as a tensor, got tuple" in result.evidence


def test_probabilities_are_red_though_the_view_rescales_them():
    case = foreign(Shares())
    assert isinstance(case.view, AttackView)
    (result,) = audit.run(case, [4])
    assert result.light == "red" and "got rows of probabilities" in result.evidence
    vote = MajorityVote(Foreign(Noised(), planted.CLASSES, planted.SHAPE, "hidden"), 3).eval()
    (result,) = audit.run(replace(case, classifier=vote, view=None, held=False), [4])
    assert (
        result.light == "red" and "before any view: expected logits, got rows of" in result.evidence
    )


class Noised(Shares):
    """Probabilities of noised pictures."""

    def forward(self, x):
        return super().forward((x + 0.01 * torch.randn_like(x)).clamp(0, 1))


# -- cost -------------------------------------------------------------------------------------------------------------


class Counting(planted.Honest):
    """The honest classifier, which counts the images that it is asked about."""

    def __init__(self):
        super().__init__()
        self.asked = 0

    def logits(self, x, noise):
        self.asked += len(x)
        return self.linear(x)


class CountingNoisy(planted.Noisy):
    """The noisy classifier, which counts the images that it is asked about."""

    def __init__(self):
        super().__init__()
        self.asked = 0

    def logits(self, x, noise):
        self.asked += len(x)
        return super().logits(x, noise)


def counted(kind) -> Case:
    classifier = kind().eval()
    return honest(
        classifier=classifier,
        held=kind is Counting,
        starts=2,
        routes={"itself": classifier},
        levels={1: classifier, 2: classifier},
        sources={"itself": classifier},
    )


@pytest.mark.parametrize("kind", [Counting, CountingNoisy])
def test_no_check_asks_more_often_than_it_said_it_may(kind):
    case = counted(kind)
    classifier = case.classifier
    for kept in ("main", "fallen", "clean_falls", "luck"):
        getattr(case, kept)
    assert 0 < classifier.asked <= case.shared_cost
    for one in audit.CHECKS:
        before = classifier.asked
        assert "could not be made" not in one(case).evidence
        most = 0 if one.cost is None else one.cost(case)
        assert classifier.asked - before <= most, one.__name__
    assert audit.calls(case) <= 3 * classifier.asked, "a bound that says something"


def test_checks_that_ask_nothing_cost_nothing():
    case = honest()
    assert audit.calls(case, [25, 31]) == 0
    assert audit.calls(case, [6]) == audit.calls(case, [22, 25]) == case.shared_cost > 0


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
        json.loads(json.dumps(asdict(result), allow_nan=False)) for result in audit.run(honest())
    )


@pytest.mark.parametrize("value", [None, math.nan, math.inf])
def test_a_picture_with_a_number_that_was_not_measured_cannot_be_drawn(value):
    assert audit.Picture((0, 1), {"line": (0.0, 1.0)}, "x", "y").finite
    assert not audit.Picture((0, 1), {"line": (0.0, value)}, "x", "y").finite


def test_nan_is_no_answer():
    """Asked by what is no classifier of ours, which nobody has checked before it decides."""

    def broken(x):
        return torch.full((len(x), planted.CLASSES), math.nan)

    with pytest.raises(FloatingPointError, match="became NaN and cannot be judged"):
        honest(votes=()).answers(planted.images(3)[0], asked=broken)
