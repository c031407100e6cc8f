"""The best smoothing noise: of the data set, as papers print it, and of each picture, which the union bound pays for."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from diffclass.certify.certificates import smoothing_radius
from diffclass.classifiers.base import Classifier
from diffclass.evaluation import certification, sigmas
from diffclass.evaluation.certification import Plan

SHAPE = (1, 2, 2)
OWN = dict(world="toy", classifier="toy", checkpoints={}, version="0")
NORMAL = torch.tensor([0.5, -0.5, 0.5, 0.5])
SIGMAS = (0.1, 0.3, 0.6)
DISTANCES = (0.5, 0.05, -0.3, 0.0, 0.15, -0.9)
RADII = (0.0, 0.1, 0.25, 0.4)


class HalfSpace(Classifier):
    """Two classes on either side of a plane, at any sigma: the true radius of its smoothed form is the distance."""

    num_classes = 2
    image_shape = SHAPE
    scale = "scores"
    calls = 1

    def __init__(self, sigma_pixel):
        super().__init__()
        self.sigma_pixel = sigma_pixel

    def logits(self, x, noise):
        distance = (x.flatten(1) - 0.5) @ NORMAL.to(x)
        return torch.stack([distance, -distance], 1)


def pictures():
    images = 0.5 + torch.tensor(DISTANCES)[:, None] * NORMAL
    return images.reshape(-1, *SHAPE), (torch.tensor(DISTANCES) < 0).long()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Finished runs of the same pictures at three sigmas, counted for alpha / 3."""
    images, labels = pictures()
    finished = []
    for sigma in SIGMAS:
        folder = tmp_path_factory.mktemp("run")
        plan = Plan(sigma, alpha=0.001 / 3, most=1500, radii=(0.1, 0.25))
        list(certification.certify(HalfSpace(sigma), images, labels, plan, folder, OWN))
        finished.append(certification.read(folder))
    return finished


def test_the_best_of_a_picture_is_its_largest_radius_at_a_third_of_alpha(runs):
    study = sigmas.study_of(runs[::-1], RADII)
    assert study.sigmas == SIGMAS and study.alpha == 0.001
    radii = np.array(
        [
            [smoothing_radius(votes, 0.001 / 3, "anytime").radius for votes in run.votes()]
            for run in runs
        ]
    )
    full = np.array(
        [
            [smoothing_radius(votes, 0.001, "anytime").radius for votes in run.votes()]
            for run in runs
        ]
    )
    right = np.abs(DISTANCES) > 0
    far = radii.max(0) >= np.array(RADII)[:, None]
    certain = (radii.max(0) > 0) & right
    assert study.of_each_picture.accuracy == pytest.approx((far & certain).mean(1))
    assert (full >= radii).all() and (full > radii).any()  # the wrong twin: each at the full alpha
    assert (radii.max(0)[right] <= np.abs(DISTANCES)[right]).all()
    assert radii.max(0)[3] == 0


def test_the_best_of_the_data_set_is_chosen_for_each_radius(runs):
    study = sigmas.study_of(runs, RADII)
    assert study.accuracy.shape == (3, 4)
    for place, sigma in enumerate(study.best):
        assert study.accuracy[SIGMAS.index(sigma), place] == study.accuracy[:, place].max()
    assert (study.of_each_picture.accuracy >= study.accuracy.max(0)).all()
    assert study.best[3] != 0.1  # whose ceiling is below


def changed(run, **settings):
    return replace(run, settings={**run.settings, **settings})


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda runs: runs[:1], "runs at two or more sigmas, got 1"),
        (lambda runs: [runs[0], changed(runs[1], classifier="another")], "another classifier"),
        (lambda runs: [runs[0], changed(runs[1], images="0" * 64)], "another images"),
        (lambda runs: [runs[0], replace(runs[1], rows=runs[1].rows[:4])], "got 4 of 6 pictures"),
        (lambda runs: [runs[0], runs[0]], "same different sigmas"),
        (
            lambda runs: [
                runs[0],
                changed(runs[1], plan={**runs[1].settings["plan"], "bound": "betting"}),
            ],
            "hard votes",
        ),
    ],
)
def test_runs_that_cannot_be_compared_are_refused(runs, spoil, sentence):
    with pytest.raises(ValueError, match=sentence):
        sigmas.study_of(spoil(runs), RADII)


def test_alpha_outside_its_range_is_refused(runs):
    with pytest.raises(ValueError, match="alpha"):
        sigmas.study_of(runs, RADII, alpha=1.0)
