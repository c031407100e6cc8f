"""A case made of a classifier by what it declares: what attacks climb, other gradients, other numbers of levels."""

import torch
from torch import Tensor

from diffclass.attacks.views import AttackView
from diffclass.audit.base import Case
from diffclass.classifiers.base import Classifier


def case_of(
    classifier: Classifier, x: Tensor, y: Tensor, epsilon: float, norm: str = "linf", **options
) -> Case:
    """A case whose attacks get an `AttackView`, and every other road that the classifier names.

    The view is that of its surrogate, which is itself unless it counts votes. Routes are its gradients, where there are
    several, and the routes that it names; levels the same with other numbers of noise levels or steps.
    Shapes      x [n,C,H,W] in [0,1], y [n];  options: other fields of `Case`, which win over what is chosen here
    """
    climbed = classifier.surrogate()
    temperature = _temperature(climbed, x[:64], options.get("seed", 0))
    gradients = climbed.gradients()
    routes = climbed.routes()
    if len(gradients) > 1:  # one is that of the view; they do not say which
        routes = {f"the {name} gradient": other for name, other in gradients.items()} | routes
    levels = {count: climbed.at_levels(count) for count in climbed.level_counts}
    own = dict(
        view=AttackView(climbed, temperature),
        routes={name: AttackView(route, temperature) for name, route in routes.items()},
        levels={count: AttackView(other, temperature) for count, other in levels.items()},
    )
    return Case(classifier, x, y, epsilon, norm, **{**own, **options})


def _temperature(classifier: Classifier, x: Tensor, seed: int) -> float:
    """The median gap between the two best classes; 1 where that cannot be asked, as the checks are there to say why."""
    noise = classifier.sample_noise(1, torch.Generator().manual_seed(seed))
    try:
        return AttackView.calibrated(classifier, x, noise).temperature
    except Exception:
        return 1.0
