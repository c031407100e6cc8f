"""Grainy digits, the perfect model of their latents, and the film of an elimination: all of it is what the library says."""

import base64
import copy
import json
import math

import pytest
import torch
import twins
from diffclass import data, units
from diffclass.classifiers.zero_shot import ZeroShotClassifier
from diffclass.course import figures, widgets
from diffclass.course.figures import UNKNOWN
from diffclass.course.scenes.results import DONE, STOPPED
from diffclass.course.scenes.zero_shot import PIECE, ZeroShotScene, timesteps
from diffclass.data import grainy
from diffclass.denoisers.latent import Autoencoder, Haar, LatentModel
from diffclass.noise import generator_of
from diffclass.storage import assets

LI = "noise, 1 (Li et al.)"


@pytest.fixture(scope="module")
def scene():
    return ZeroShotScene(12)


def drawn(count, seed=0):
    """Pictures of the law, in double precision, and their classes."""
    return grainy.grainy().sample(count, torch.Generator().manual_seed(seed), torch.float64)


# ---------------------------------------------------------------------------------------------------------------------
# The world


def unscaled(**options):
    """A model of latents that nobody has scaled."""
    model = grainy.model(**options)
    plain = Autoencoder(Haar(), grainy.LATENTS)
    return LatentModel(model.denoiser, plain, model.names, model.templates)


class Skewed(Haar):
    """Differences without the half: no change of lengths alike."""

    def __init__(self, **options):
        super().__init__(**options)
        self.axes[1] *= 2


def stretched(**options):
    """A model of latents whose autoencoder stretches one direction."""
    model = grainy.model(**options)
    vae = Autoencoder(Skewed(scaling_factor=grainy.latent_scale()), grainy.LATENTS)
    return LatentModel(model.denoiser, vae, model.names, model.templates)


@twins.rejected({"unscaled": dict(model=unscaled), "stretched": dict(model=stretched)})
def test_the_model_of_latents_is_the_law_of_pictures(model=grainy.model):
    """log p(z | k) = log p(x | k) - 64 ln scale, as the change of axes keeps lengths."""
    perfect = model()
    x, _ = drawn(20)
    z = perfect.autoencoder.encode(x)
    got = perfect.denoiser.log_density(z, 0.0) - grainy.grainy().log_density(units.to_model(x))
    wanted = torch.full_like(got, -64 * math.log(grainy.latent_scale()))
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-6)
    torch.testing.assert_close(perfect.autoencoder.decode(z), x, rtol=0, atol=1e-12)


def test_latents_have_the_variance_that_a_scaling_factor_is_for():
    x, _ = drawn(400)
    z = grainy.model().autoencoder.encode(x)
    assert float(z.var(0).mean()) == pytest.approx(1, abs=0.05)


def in_order_of_templates(template):
    """A twin of `described` in which bold and thin are exchanged."""
    swap = {grainy.BOLD: grainy.THIN, grainy.THIN: grainy.BOLD}
    return grainy.described(swap.get(template, template))


@twins.rejected({"bold and thin exchanged": dict(described=in_order_of_templates)})
def test_a_prompt_describes_the_digits_that_it_names(described=grainy.described):
    whole = grainy.grainy()
    bold, thin, mirrored = map(described, grainy.TEMPLATES[1:])
    assert len(bold.means) + len(thin.means) == len(whole.means) == len(mirrored.means)
    for k in range(10):
        ink = [law.means[law.labels == k].sum(1) for law in (bold, thin)]
        assert float(ink[0].min()) > float(ink[1].max())
    flipped = whole.means.reshape(-1, 8, 8).flip(2).flatten(1)
    assert torch.equal(mirrored.means, flipped) and not torch.equal(mirrored.means, whole.means)
    with pytest.raises(ValueError, match="the template"):
        grainy.described("a {}")


def test_prompts_of_a_class_stand_one_after_the_other():
    templates = (grainy.PLAIN, grainy.MIRRORED)
    both = grainy.model(templates)
    assert both.denoiser.num_classes == 20 and both.templates == 2
    x, _ = drawn(5)
    z = both.autoencoder.encode(x)
    got = both.denoiser.log_density(z, 0.3).unflatten(1, (10, 2))
    for place, template in enumerate(templates):
        alone = grainy.model((template,)).denoiser.log_density(z, 0.3)
        torch.testing.assert_close(got[..., place], alone)
    for wrong in (grainy.PLAIN, (), None):
        with pytest.raises(TypeError, match="templates as a list of texts"):
            grainy.model(wrong)


# ---------------------------------------------------------------------------------------------------------------------
# The film


@pytest.mark.parametrize("weighting", ZeroShotScene.WEIGHTINGS)
def test_the_film_ends_with_the_answer_of_the_library(scene, weighting):
    for index in range(6):
        shares = list(scene.shoot(index, 50, weighting))
        film = scene.shown
        classifier = scene.classifier(50, weighting)
        seeds = classifier.sample_noise(1, generator_of(scene.seed, index))
        answer = classifier.answer(film.x, seeds)
        assert film.bills[-1] == int(answer.evaluations) == classifier.calls == 10 * 5 + 5 * 45
        assert shares[-1] == 1 and film.ending == DONE
        for step in answer.history:
            at = film.bills.index(int(step.evaluations))
            assert torch.equal(film.alive[at], step.alive[0])
            lead = step.estimates[0] - step.estimates[0][film.alive[at]].min()
            torch.testing.assert_close(film.leads[at][film.alive[at]], lead[film.alive[at]])
        assert f"<b>{scene.names[int(answer.prediction)]}</b> leads" in scene.at(100)["note"]


def test_only_what_is_paid_for_is_known(scene):
    list(scene.shoot(3, 100, LI))
    film = scene.shown
    assert int((~film.losses.isnan()).sum()) == film.bills[-1] == 550
    for share in (1, 18, 19, 60, 100):
        now = film.upto(round(share / 100 * 550))
        known = (film.when > 0) & (film.when <= film.bills[now])
        assert int(known.sum()) == film.bills[now] <= max(10, 5.5 * share + 1)
    assert [int(alive.sum()) for alive in (film.alive[8], film.alive[9], film.alive[-1])] == [
        10,
        5,
        1,
    ]
    # a class that is out costs nothing any more, and its lag stays
    out = ~film.alive[9]
    assert int((film.when[out] > 100).sum()) == 0
    assert torch.equal(film.leads[9][out], film.leads[-1][out])


def test_the_heat_map_is_the_difference_to_the_leader(scene):
    list(scene.shoot(3, 50, LI))
    film = scene.shown
    whole = scene.differences(film, len(film.bills) - 1, 2)
    assert whole.shape == (10, 50)
    known = film.losses - film.losses[2]
    assert torch.equal(whole.nan_to_num(7), known.nan_to_num(7))
    first = scene.differences(film, 0, 2)
    assert int((~first.isnan()).sum()) == 10 and torch.equal(
        first[2][~first[2].isnan()], torch.zeros(1).double()
    )
    list(scene.shoot(3, 500, LI))
    film = scene.shown
    binned = scene.differences(film, len(film.bills) - 1, 0)
    ten = (film.losses - film.losses[0])[:, :10]
    torch.testing.assert_close(binned[:, 0], ten.nanmean(1))


def test_a_stopped_film_is_shown_as_far_as_it_came(scene):
    work = scene.shoot(5, 250, LI)
    next(work)
    work.close()
    film = scene.shown
    assert film.ending == STOPPED and film.bills[-1] == 10 * PIECE
    frame = scene.at(100)
    assert frame["panels"][4]["values"][:2] == [10 * PIECE, 10 * 25 + 5 * 225]
    assert "stopped" in frame["note"]
    list(scene.shoot(5, 250, LI))
    assert scene.shown is not film and scene.shown.ending == DONE


def test_the_same_film_is_not_shot_twice(scene):
    list(scene.shoot(2, 20, LI))
    film = scene.shown
    list(scene.shoot(1, 20, LI))
    assert list(scene.shoot(2, 20, LI)) == [1.0] and scene.shown is film


def test_the_timesteps_are_the_chains():
    levels = timesteps(500)
    assert len(levels) == 500
    assert float(levels.sigma[0]) == pytest.approx(0.0413, abs=2e-4)
    assert float(levels.sigma[-1]) == pytest.approx(14.61, abs=0.01)


def test_the_hero_turns_its_controls_into_films():
    hero = widgets.zero_shot_hero(1)
    assert hero.scene.settings == dict(index=1, budget=500, weighting=LI)
    hero.shooting["budget"].value = 20
    assert hero.scene.settings["budget"] == 20
    hero.controls["share"].value = 30
    panel = hero.stage.frame["panels"][2]
    assert panel["cursor"] == 30 and "% of 110 evaluations" in panel["xlabel"]
    assert hero.shooting["budget"].options[-1] == ("2750", 500)


# ---------------------------------------------------------------------------------------------------------------------
# The panel


def heat(values, **changed):
    """A panel of two rows."""
    told = dict(labels=["a", "b"], colours=["#000000"] * 2, limit=2.0, ticks=[(0.5, "500")])
    words = dict(title="t", xlabel="x", alt="a")
    return figures.heat(values, **{**told, **words, **changed})


def test_a_heat_map_has_the_colours_that_it_says():
    panel = heat([[0.0, 2.0, -2.0, math.nan], [1.0, -9.0, 9.0, 0.0]])
    cells = list(base64.b64decode(panel["image"]["data"]))
    cells = [tuple(cells[i : i + 4]) for i in range(0, len(cells), 4)]
    blue, orange, grey = (
        (*(int(c[i : i + 2], 16) for i in (1, 3, 5)), 255)
        for c in (figures.BEST, figures.WRONG, UNKNOWN)
    )
    clear = (*orange[:3], 0)
    assert panel["image"]["shape"] == [2, 4, 4]
    assert cells[:4] == [clear, orange, blue, grey] and cells[5:] == [blue, orange, clear]
    assert cells[4] == (*orange[:3], 128)
    with pytest.raises(ValueError, match="finite numbers to draw"):
        heat([[math.inf], [0.0]])
    with pytest.raises(ValueError, match="a label and a colour for each of 2 rows, got 1 and 2"):
        heat([[0.0], [0.0]], labels=["a"])


def test_a_classifier_of_exact_latents_says_what_it_costs():
    classifier = ZeroShotClassifier.released(grainy.model((grainy.PLAIN, grainy.MIRRORED)))
    assert classifier.cost().evaluations == 2 * 2750
    assert data.digits().class_names == classifier.model.names


# ---------------------------------------------------------------------------------------------------------------------
# The record of what others have published


def is_share(percent, n):
    """Whether a percentage, as it is rounded, is that of a whole number of n pictures."""
    if n is None:
        return True
    rounding = 0.5 * 10.0 ** -len(str(percent).partition(".")[2])
    return abs(100 * round(percent / 100 * n) / n - percent) <= rounding + 1e-9


def complaints(document):
    """What is missing in a record of published numbers."""
    wanted = {
        "model",
        "data",
        "accuracy",
        "n",
        "zero_shot",
        "recipe",
        "source",
        "provenance",
        "caveat",
    }
    found = []
    for place, row in enumerate(document["rows"]):
        if set(row) != wanted:
            found.append(f"row {place}: {sorted(wanted ^ set(row))}")
            continue
        if row["provenance"] not in document["tags"] or len(row["source"]) < 10:
            found.append(f"row {place}: no provenance")
        if len(row["caveat"]) < 20:
            found.append(f"row {place}: no caveat")
        if not 1 < row["accuracy"] < 100:
            found.append(f"row {place}: {row['accuracy']} is no accuracy in per cent")
        if not is_share(row["accuracy"], row["n"]) and "no whole number" not in row["caveat"]:
            found.append(f"row {place}: no whole number of {row['n']} is {row['accuracy']} %")
    return found


def test_every_published_number_says_where_it_comes_from():
    path = assets.folder() / "records" / "zero-shot-published.json"
    document = json.loads(path.read_text(encoding="utf-8"))
    assert len(document["rows"]) >= 10 and not complaints(document)
    for change in (dict(provenance="rumour"), dict(caveat=""), dict(accuracy=0.885), dict(n=7)):
        spoilt = copy.deepcopy(document)
        spoilt["rows"][0] |= change
        assert complaints(spoilt), change
    del spoilt["rows"][1]["source"]
    assert len(complaints(spoilt)) == 2
