"""A case made of a classifier of this library: the view that attacks get, other gradients, other numbers of levels."""

from torch import Tensor, nn

from diffclass import noise
from diffclass.attacks.views import AttackView
from diffclass.audit.base import Case
from diffclass.classifiers import stand_in

TELESCOPED = 8  # draws behind the telescoped gradient


def case_of(
    classifier: nn.Module, x: Tensor, y: Tensor, epsilon: float, norm: str = "linf", **options
) -> Case:
    """A case whose attacks get an `AttackView`, and every other road that the classifier's kind offers.

    Of a majority vote the voter is attacked, as votes have no gradient. Routes of a purified classifier are the other
    gradient (exact or BPDA) and the classifier behind it; of a diffusion classifier uniform weights and the telescoped
    gradient. Levels are half and twice as many noise levels or steps.
    Shapes      x [n,C,H,W] in [0,1], y [n];  options: other fields of `Case`, which win over what is found here
    """
    voter = classifier.classifier if hasattr(classifier, "votes") else classifier
    view = AttackView.calibrated(voter, x[:64])
    routes = {name: AttackView(route, view.temperature) for name, route in _routes(voter).items()}
    levels = {count: AttackView(other, view.temperature) for count, other in _levels(voter).items()}
    return Case(
        classifier,
        x,
        y,
        epsilon,
        norm,
        **{**dict(view=view, routes=routes, levels=levels), **options},
    )


def _routes(classifier: nn.Module) -> dict[str, nn.Module]:
    if hasattr(classifier, "with_gradient"):
        other = (
            "the identity's gradient (BPDA)" if classifier.purifier.exact else "the exact gradient"
        )
        return {
            other: classifier.with_gradient(not classifier.purifier.exact),
            "the classifier alone": classifier.classifier,
        }
    if not hasattr(classifier, "weighting"):
        return {}
    found = {}
    if classifier.weighting is not noise.unit_weight:
        found["uniform weights"] = classifier.twin()
        found["uniform weights"].weighting = noise.unit_weight
    if classifier.weighting in (noise.elbo_weight, noise.discrete_elbo_weight):
        found["the telescoped gradient"] = stand_in.telescoped(classifier, TELESCOPED)
    return found


def _levels(classifier: nn.Module) -> dict[int, nn.Module]:
    """Twins with half and twice as many noise levels of the classifier, or steps of the purifier."""
    if hasattr(classifier, "bank"):
        bank = classifier.bank
        count = len(bank.levels)
        ends = (float(bank.lower[0]), float(bank.upper[-1]))

        def other(more: int) -> nn.Module:
            twin = classifier.twin()
            twin.bank = noise.NoiseBank.fixed(
                noise.log_levels(*ends, more), classifier.image_shape, bank.samples, seed=count
            ).to(bank.noise)
            return twin
    elif hasattr(getattr(classifier, "purifier", None), "steps"):
        count = classifier.purifier.steps

        def other(more: int) -> nn.Module:
            purifier = classifier.purifier.twin()
            purifier.steps = more
            return type(classifier)(purifier, classifier.classifier)
    elif hasattr(classifier, "translator"):  # more steps than its bridge has, there are none
        twin = classifier.twin()
        twin.steps = (*classifier.steps[:-1:2], 0)
        return {len(twin.steps): twin} if twin.steps != classifier.steps else {}
    else:
        return {}
    return {more: other(more) for more in sorted({max(1, count // 2), 2 * count}) if more != count}
