"""Adapters followed along their training, and who fools whom: what is recorded is what can be computed again."""

import itertools

import pytest
import torch
import twins
from diffclass import attacks, likelihood, units, zoo
from diffclass.data.worlds import images_of
from diffclass.denoisers import network
from diffclass.denoisers.lora import Adapter
from diffclass.evaluation import accuracies, protocols
from diffclass.evaluation.protocols import Attack
from diffclass.storage import results
from diffclass.training import adapting, measures, recipes
from diffclass.training.recipes import RECIPES
from diffclass.training.train import training_of
from diffclass.zoo import networks

FGSM = Attack("CE", 1, "fgsm", fresh=False)


@pytest.fixture
def small(monkeypatch):
    """Few pictures and a short attack."""
    for name, value in dict(ATTACKED=4, TESTED=12, ATTACK_STEPS=2, EVERY=2).items():
        monkeypatch.setattr(adapting, name, value)


def student():
    return network.load_denoiser(networks.trained(networks.STUDENT))[0]


def test_a_run_is_measured_along_its_way(small, tmp_path):
    path = tmp_path / "records.jsonl"
    short = dict(steps=3, batch=4)
    name = "truth, by transfer"
    records = list(adapting.follow(path, (1,), [name], **short))
    assert records == results.read(path)
    steps = [r.settings["step"] for r in records if r.metric == "accuracy" and not r.attack]
    assert steps == [0, 2, 3]
    run = training_of(adapting.recipe_of(name, **short), 1, given=student())
    list(run)
    denoiser = run.average.eval()
    images, labels = (part[:12] for part in images_of("digits", "test"))
    held = adapting.held_bayes(denoiser)
    others = adapting.fooling(zoo.classifier("digits", "cnn"))
    assert float((others - images).abs().max()) == pytest.approx(0.1, abs=1e-6)
    last = {(r.metric, r.attack): r for r in records if r.settings.get("step") == 3}
    count = accuracies.accuracy(held, images, labels)
    assert last["accuracy", None].value == count / 12
    count = accuracies.accuracy(held, others, labels)
    assert last["accuracy", adapting.THROUGH_ANOTHER].value == count / 12
    count = measures.survivors(held, images[:4], labels[:4], 0.1, 2)
    assert (
        last["accuracy", adapting.THROUGH_ITSELF].value == count / 4
        and last["accuracy", adapting.THROUGH_ITSELF].n == 4
    )
    assert not list(adapting.follow(path, (1,), [name], **short)), "on record already"
    costs = tmp_path / "costs.jsonl"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adapting, "VARIANTS", {name: adapting.VARIANTS[name]})
        assert len(list(adapting.costs(costs, steps=3, seed=1))) == 1
    again = list(adapting.follow(costs, (1,), [name], **short))
    assert [r.value for r in again] == [r.value for r in records], "costs are no measurement"


def test_the_adapters_of_the_assets_are_measured_not_trained_again(monkeypatch):
    monkeypatch.delattr(adapting, "training_of")
    for variant, seed in adapting.STORED:
        recipe = adapting.recipe_of(variant)
        walked = dict(adapting.walked(variant, seed))
        assert list(walked) == [0, 100, 200, 300, 400]
        layer = "network.blocks.0.conv1.weight"
        layers = [denoiser.get_parameter(layer) for denoiser in walked.values()]
        assert all(not torch.equal(one, other) for one, other in itertools.pairwise(layers))
        file = networks.TRUTH["digits"][recipe.method]
        assert torch.equal(layers[-1], networks.adapted(student(), file).get_parameter(layer))


def test_what_a_step_takes(tmp_path, monkeypatch):
    path = tmp_path / "records.jsonl"
    monkeypatch.setattr(
        adapting,
        "VARIANTS",
        {name: adapting.VARIANTS[name] for name in list(adapting.VARIANTS)[::4]},
    )
    records = list(adapting.costs(path, steps=4))
    assert records == results.read(path) and len(records) == 2
    adapter, whole = (record.settings for record in records)
    assert all(record.value > 0 and record.n == 3 for record in records)
    assert whole["learning"] == whole["numbers"] > 5 * adapter["learning"]
    assert adapter["numbers"] == whole["numbers"] + adapter["learning"]
    count = Adapter.beside(student(), recipes.ADAPTED_LAYERS["digits"], 4).count
    assert adapter["learning"] == count and adapter["state_bytes"] == 12 * count


def gaps(logits, labels):
    """Loss of the best other class minus that of the truth, picture by picture."""
    found = []
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        own = row.pop(label)
        found.append(own - max(row))
    return torch.tensor(found, dtype=torch.float64)


@twins.rejected(
    {
        "the other way round": dict(
            measured=twins.patched(
                adapting.measured,
                adapting,
                margin_loss=lambda logits, y: -attacks.margin_loss(logits, y),
            )
        ),
        "the mean other class": dict(
            measured=twins.patched(
                adapting.measured,
                adapting,
                margin_loss=lambda logits, y: (
                    (logits.sum(1) - logits.gather(1, y[:, None])[:, 0]) / 9
                    - logits.gather(1, y[:, None])[:, 0]
                ),
            )
        ),
    }
)
def test_losses_of_truth_and_others_are_those_of_the_elbo(measured=adapting.measured):
    with pytest.MonkeyPatch.context() as patch:
        for name, value in dict(ATTACKED=2, TESTED=6, ATTACK_STEPS=1).items():
            patch.setattr(adapting, name, value)
        images, labels = (part[:6] for part in images_of("digits", "test"))
        denoiser = student()
        listed = list(
            measured(
                denoiser,
                images,
                dict(variant="v", step=0),
                dict(world="digits", classifier="tmdc", source="a test", seed=0),
            )
        )
    found = {record.metric: record for record in listed if record.unit == "nats"}
    held = adapting.held_bayes(denoiser)
    bank = likelihood.noise.NoiseBank(networks.DIGIT_LEVELS, held.noise[0][:, :, None])
    logits = torch.cat(
        [likelihood.elbo(denoiser, units.to_model(x)[None], bank) for x in images]
    ).detach()
    truth = -logits[torch.arange(6), labels]
    wanted = gaps(logits, labels)
    # the prior of ten classes is in the classifier's logits, and in the gap it is not
    prior = torch.tensor(10.0).log()
    gap = found["gap between them"]
    assert gap.value == pytest.approx(float(wanted.mean()), rel=1e-4)
    reach = 1.96 * float(wanted.std()) / 6**0.5
    assert gap.high - gap.value == pytest.approx(reach, rel=1e-4)
    own = found["loss of the truth"].value
    assert own == pytest.approx(float(truth.mean() + prior), rel=1e-5)
    assert found["loss of the best other class"].value == pytest.approx(own + gap.value, rel=1e-6)


def test_the_variants_begin_with_what_is_trained():
    for variant, method in (
        ("truth, by transfer", "tmdc"),
        ("contrast, white-box", "tmdc-contrastive"),
    ):
        recipe = adapting.recipe_of(variant)
        assert recipe.says == RECIPES[networks.TRUTH["digits"][method]].says
    told = {name: adapting.recipe_of(name).says["truth"] for name in adapting.VARIANTS}
    for name, truth in told.items():
        assert truth["contrast"] == (1.0 if name.startswith("contrast") else 0.0)
        assert truth["transferred"] == ("by transfer" in name)
    with pytest.raises(ValueError, match="expected the variant to be one of"):
        adapting.recipe_of("paper")


def test_all_weights_learn_where_they_are_asked_to():
    run = training_of(
        adapting.recipe_of("truth, by transfer, all weights", steps=1, batch=2), 0, given=student()
    )
    assert all(value.requires_grad for value in run.denoiser.parameters())
    adapter = training_of(
        adapting.recipe_of("truth, by transfer", steps=1, batch=2), 0, given=student()
    )
    assert {value.requires_grad for value in adapter.denoiser.parameters()} == {True, False}
    assert recipes.DIGITS_TRUTH("tmdc", recipes.FOOLING_ANOTHER, whole=True).save is not (
        recipes.save_adapter
    )


def fooling_the_cnn(images, labels):
    """One step through the plain CNN, to the edge of the budget: FGSM, without the class of attacks."""
    told = dict(steps=1, step_size=0.1, loss=attacks.cross_entropy_loss)
    *_, last = attacks.pgd(zoo.classifier("digits", "cnn"), images, labels, 0.1, **told)
    return last.x


def test_every_defence_is_asked_about_what_fooled_the_surrogate(tmp_path):
    path = tmp_path / "matrix.jsonl"
    asked = (("cnn",), ("cnn", "dc"), (FGSM,), "linf", 0.1, 8)
    records = list(adapting.transferred(path, *asked))
    assert records == results.read(path)
    images, labels = (part[:8] for part in images_of("digits", "test"))
    fooling = fooling_the_cnn(images, labels)
    wanted = [
        accuracies.accuracy(adapting._held("digits", name, 0), fooling, labels) / 8
        for name in ("cnn", "dc")
    ]
    assert [record.value for record in records] == wanted
    assert [record.attack for record in records] == ["white-box", "transfer from cnn"]
    assert {record.part for record in records} == {str(FGSM)}
    assert not list(adapting.transferred(path, *asked))
    more = list(adapting.transferred(path, ("cnn",), ("cnn", "dc"), (FGSM,), "linf", 0.05, 8))
    assert [record.settings["epsilon"] for record in more] == [0.05, 0.05]


def test_the_tables_ask_for_the_paper_s_attacks_and_for_everybody_s_own_gradient(monkeypatch):
    asked = []
    monkeypatch.setattr(adapting, "transferred", lambda *given: asked.append(given[1:]) or [])
    assert not list(adapting.tables("nowhere"))
    surrogates, defences, listed, norm, epsilon, count = asked[0]
    assert set(surrogates) <= set(defences) <= set(zoo.names("digits"))
    assert (norm, epsilon, count) == ("linf", 0.1, adapting.ATTACKED) and len(listed) == 1
    for surrogates, _, listed, norm, _, count in asked[1:]:
        assert surrogates == ("cnn",) and count == adapting.TABLED
        classifier = zoo.classifier("digits", "cnn")
        assert all(norm in zoo.attack(attack.method).norms for attack in listed)
        assert all(attack.climbed(classifier) is classifier for attack in listed)
    budgets = {(norm, epsilon) for _, _, _, norm, epsilon, _ in asked[1:]}
    assert {("linf", 0.05), ("l2", 0.05)} <= budgets, "as printed"
    paper = protocols.paper("tmdc", "linf", 0.05).attacks
    of_paper = {(attack.loss, attack.method, attack.steps) for attack in paper}
    assert of_paper <= {
        (a.loss, a.method, a.steps) for _, _, listed, *_ in asked[1:] for a in listed
    }


def test_an_adapter_meets_other_attacks_than_it_learned_from(small, tmp_path, monkeypatch):
    path = tmp_path / "crossed.jsonl"
    monkeypatch.setattr(adapting, "LEARNED", adapting.LEARNED[:1])
    monkeypatch.setattr(adapting, "MET", (FGSM,))
    short = dict(steps=3, batch=4)
    records = list(adapting.crossed(path, 1, **short))
    assert records == results.read(path) and not list(adapting.crossed(path, 1, **short))
    told = adapting.recipe_of(adapting.LEARNED[0]).says["truth"]["inner"]
    assert told == dict(epsilon=0.1, steps=1, stride=1.0)
    run = training_of(adapting.recipe_of(adapting.LEARNED[0], **short), 1, given=student())
    list(run)
    images, labels = (part[:12] for part in images_of("digits", "test"))
    fooling = fooling_the_cnn(images, labels)
    for step, denoiser in ((0, student()), (3, run.average.eval())):
        held = adapting.held_bayes(denoiser)
        found = {r.part: r for r in records if r.settings["step"] == step}
        assert found[str(FGSM)].value == accuracies.accuracy(held, fooling, labels) / 12
        own = found[adapting.THROUGH_ITSELF]
        assert own.n == 4
        assert own.value == measures.survivors(held, images[:4], labels[:4], 0.1, 2) / 4


def test_photographs_meet_the_budgets_of_the_paper_and_of_the_field(monkeypatch):
    asked = []
    monkeypatch.setattr(
        adapting, "transferred", lambda *given, **more: asked.append((given[1:], more)) or []
    )
    assert not list(adapting.photographs("nowhere"))
    assert {(norm, epsilon) for (_, _, _, norm, epsilon, _), _ in asked} == {
        ("linf", 0.05),
        ("linf", 8 / 255),
        ("l2", 0.5),
    }
    for (surrogates, defences, *_, count), more in asked:
        assert surrogates == ("cnn",) and count == adapting.ATTACKED
        assert more == dict(world="cifar10") and set(defences) <= set(zoo.names("cifar10"))


def test_as_released_dark_pixels_become_grey_at_no_budget_at_all():
    images, labels = (part[:4] for part in images_of("digits", "test"))
    cnn = zoo.classifier("digits", "cnn")
    still = adapting.as_released(cnn, images, labels, 0.0, 2)
    torch.testing.assert_close(still, images.clamp(min=0.5))
    moved = adapting.as_released(cnn, images, labels, 0.05, 2)
    assert float(moved.min()) >= 0.5 and float(moved.max()) <= 1
    assert float((moved - images).abs().max()) > 0.4, "far beyond the budget that is printed"
    bright = images.clamp(min=0.5)
    assert 0 < float((moved - bright).abs().max()) <= 0.025 + 1e-6, "half of it, in pixels"
