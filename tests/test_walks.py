"""RDC's ablations: cosines by hand, what each number of a walk counts, and a file that is gone on with."""

from itertools import combinations

import pytest
import torch
from diffclass import attacks, zoo
from diffclass.classifiers.base import Classifier, decided, draw, fresh_noise
from diffclass.classifiers.purified import LikelihoodMaximisation, PurifiedClassifier
from diffclass.data.worlds import images_of
from diffclass.evaluation import walks
from diffclass.storage import assets, results
from torch.nn.functional import cosine_similarity


class Turning(Classifier):
    """Two classes whose gradient is a fixed direction plus so much of a random one."""

    num_classes = 2
    image_shape = (1, 4, 4)
    calls = 1

    def __init__(self, spread: float):
        super().__init__()
        self.spread = spread

    def sample_noise(self, images, generator):
        """A direction for each picture."""
        return torch.randn((images, 16), generator=generator)

    def logits(self, x, noise):
        """Scores along it."""
        score = (x.flatten(1) * (1 + self.spread * noise)).sum(1)
        return torch.stack([score, -score], 1)


def pictures(count):
    """Grey pictures of both classes."""
    return torch.full((count, 1, 4, 4), 0.5), torch.arange(count) % 2


@pytest.mark.parametrize("spread", [0.0, 0.5, 3.0])
def test_cosines_are_those_of_all_pairs_of_draws(spread):
    classifier = Turning(spread)
    x, y = pictures(7)
    found = walks.cosines_of(classifier, x, y, 4, 3, together=3)
    for picture in range(7):
        one = slice(picture, picture + 1)
        gradients = []
        for number in range(4):
            noise = fresh_noise(classifier, 7, 3, "agreement", kept=one)(0, number)
            gradients.append(attacks.expected_gradient(classifier, x[one], y[one], noise=noise)[0])
        pairs = [
            cosine_similarity(a.flatten(), b.flatten(), 0) for a, b in combinations(gradients, 2)
        ]
        assert float(found[picture]) == pytest.approx(float(torch.stack(pairs).mean()), abs=1e-5)
    if spread == 0:
        assert torch.allclose(found, torch.ones_like(found))


def test_the_interval_of_an_agreement_holds_its_mean_and_the_file_is_gone_on_with(tmp_path):
    path = tmp_path / "agreement.jsonl"
    first = list(walks.agreement(path, "digits", ["contrastive"], n=3, draws=2))
    more = list(walks.agreement(path, "digits", ["contrastive", "idc"], n=3, draws=2))
    assert [record.classifier for record in more] == ["idc"]
    assert results.read(path) == first + more
    for record in first + more:
        assert -1 <= record.low <= record.value <= record.high <= 1 and record.unit == "cosine"
    assert list(walks.agreement(path, "digits", ["idc"])) == []


def test_what_cannot_be_measured_is_refused_before_anything_is_written(tmp_path):
    path = tmp_path / "records.jsonl"
    for refused in (
        walks.agreement(path, "digits", ["dc"], n=0),
        walks.agreement(path, "digits", ["dc"], draws=1),
        walks.agreement(path, "digits", ["nobody"]),
        walks.ablate(path, n=0),
    ):
        with pytest.raises(ValueError, match="expected"):
            list(refused)
    assert not path.exists()


def test_each_number_of_a_walk_is_what_it_says(tmp_path, monkeypatch):
    monkeypatch.setattr(walks, "ETAS", (0.1,))
    monkeypatch.setattr(walks, "BANDS", (walks.BAND,))
    monkeypatch.setattr(walks, "STEPS", 3)
    path = tmp_path / "walks.jsonl"
    clean, unaware, through = walks.ablate(path, n=8, seed=2)
    classifier = zoo.classifier("digits", "dc")
    denoiser = zoo.classifier("digits", "rdc1").purifier.denoiser
    whole = PurifiedClassifier(LikelihoodMaximisation.paper(denoiser, 0.1, 1), classifier)
    x, y = (part[:8] for part in images_of("digits", "test"))

    def changed(way):
        noise = fresh_noise(way, 8, 2, "walks, attack")
        *_, last = attacks.pgd(way, x, y, 0.1, noise=noise, steps=3)
        return last.x

    def right(images):
        with torch.no_grad():
            return decided(whole(images, draw(whole, 8, 2, "walks, judge"))) == y

    assert clean.value == float(right(x).double().mean()) and clean.attack is None
    assert unaware.value == float(right(changed(classifier)).double().mean())
    ways = [right(changed(way)) for way in whole.gradients().values()]
    assert len(ways) == 2 and through.value == float((ways[0] & ways[1]).double().mean())
    assert "upper bound" in through.what and through.settings["epsilon"] == 0.1
    # whoever stops after the first number has all three, and the next run has nothing to do
    other = tmp_path / "stopped.jsonl"
    run = walks.ablate(other, n=8, seed=2)
    next(run)
    run.close()
    assert [r.value for r in results.read(other)] == [clean.value, unaware.value, through.value]
    assert list(walks.ablate(other, n=8, seed=2)) == []


def test_the_walks_and_the_agreements_are_on_record():
    records = results.read(assets.folder() / "records" / "rdc-walks.jsonl")
    made = [(r.settings["eta"], tuple(r.settings["band"]), r.settings["kind"]) for r in records]
    assert sorted(made) == sorted(
        (eta, band, kind) for eta, band in walks.places(0.1) for kind in walks.KINDS
    )
    agreed = results.read(assets.folder() / "records" / "gradient-agreement.jsonl")
    names = [(record.world, record.classifier) for record in agreed]
    assert len(set(names)) == len(names) and {world for world, _ in names} == {"digits", "cifar10"}
    for record in records + agreed:
        own = zoo.checkpoints(record.world, record.classifier)
        assert record.checkpoint == results.one_checkpoint(own)  # of today's weights
