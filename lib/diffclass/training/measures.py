"""What a model card states: the accuracy of the averaged network, clean and under attack, each with its interval."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from diffclass import attacks, intervals, noise
from diffclass.classifiers import idc
from diffclass.classifiers.base import Classifier, Fresh, Held
from diffclass.classifiers.bayes import BayesClassifier
from diffclass.classifiers.cnn import ConvClassifier
from diffclass.classifiers.idc import TranslationClassifier, Translator
from diffclass.classifiers.smoothed import Smoothed
from diffclass.denoisers.base import Denoiser
from diffclass.device import in_precision
from diffclass.evaluation import accuracies

CARD_STEPS = 20  # of the attack behind a card
CURVE_STEPS = 10  # of the attack along a run
CURVE_LEVELS = 12  # of a diffusion classifier along a run

# What measures a network: the network, test images in [0,1], their labels and a seed -> entries of its card or curve
Measure = Callable[[nn.Module, Tensor, Tensor, int], dict]


def counted(correct: int, n: int) -> dict:
    """A count as cards state it, with its 95 % interval."""
    low, high = intervals.interval(correct, n)
    return dict(correct=correct, n=n, low=low, high=high)


def survivors(
    classifier: Classifier,
    images: Tensor,
    labels: Tensor,
    epsilon: float,
    steps: int,
    batch: int = 200,
) -> int:
    """How many images no frame of a PGD attack in L-inf fools, the clean one included.

    Formula     an upper bound of the robust accuracy; the attack climbs the margin from the clean image
    Shapes      a deterministic classifier, images [N,C,H,W] in [0,1], labels [N] -> a count
    """
    count = 0
    for x, y in zip(images.split(batch), labels.split(batch), strict=True):
        fooled = [frame.fooled for frame in attacks.pgd(classifier, x, y, epsilon, steps=steps)]
        count += int((~torch.stack(fooled).any(0)).sum())
    return count


def under_attack(
    classifier: Classifier, images: Tensor, labels: Tensor, epsilon: float, batch: int = 200
) -> dict:
    """How many images survive PGD, as cards state it. Shapes: those of `survivors`."""
    count = survivors(classifier, images, labels, epsilon, CARD_STEPS, batch)
    return dict(
        **counted(count, len(labels)),
        attack=f"PGD-{CARD_STEPS}",
        loss="margin",
        start="the clean image",
        norm="linf",
        epsilon=epsilon,
        bound="upper bound of the robust accuracy",
    )


# ---------------------------------------------------------------------------------------------------------------------
# Denoisers, as the diffusion classifier that the course makes of them


# Lowest and highest edge of the noise levels, in model units
Span = tuple[float, float]


def held_bayes(span: Span, denoiser: Denoiser, levels: int) -> Held:
    """The diffusion classifier at so many levels of a span, one noise each, the same for every picture."""
    return Held.seeded(BayesClassifier(denoiser, noise.log_levels(*span, levels)))


def bayes_accuracy(span: Span, levels: int, precision: str) -> Measure:
    """The accuracy of a denoiser's diffusion classifier, in the precision that the denoiser was trained in."""
    low, high = span
    how = dict(weighting="ELBO", levels=f"{levels} log-spaced in [{low:g}, {high:g}]")

    def measure(denoiser: Denoiser, images: Tensor, labels: Tensor, seed: int) -> dict:
        classifier = held_bayes(span, denoiser, levels)
        with in_precision(precision, images):
            correct = accuracies.accuracy(classifier, images, labels)
        return dict(accuracy=counted(correct, len(labels)) | how)

    return measure


def bayes_under_attack(
    span: Span, levels: int, precision: str, epsilon: float, attacked: int = 100
) -> Measure:
    """The accuracy of a denoiser's diffusion classifier, and that of the first `attacked` images under attack."""
    clean = bayes_accuracy(span, levels, precision)

    def measure(denoiser: Denoiser, images: Tensor, labels: Tensor, seed: int) -> dict:
        classifier = held_bayes(span, denoiser, levels)
        with in_precision(precision, images):
            hit = under_attack(classifier, images[:attacked], labels[:attacked], epsilon, batch=50)
        return clean(denoiser, images, labels, seed) | dict(accuracy_under_attack=hit)

    return measure


def bayes_under_both(
    span: Span,
    levels: int,
    epsilon: float,
    surrogate: Callable[[], Classifier],
    attacked: int = 100,
) -> Measure:
    """As `bayes_under_attack` in single precision, and the accuracy on images that fool another network: by transfer.

    Shapes      surrogate: what makes the other network, when it is asked
    """
    under = bayes_under_attack(span, levels, "fp32", epsilon, attacked)

    def measure(denoiser: Denoiser, images: Tensor, labels: Tensor, seed: int) -> dict:
        other = surrogate().to(images.device)
        fooling = torch.cat(
            [
                [*attacks.pgd(other, x, y, epsilon, steps=CARD_STEPS)][-1].x.detach()
                for x, y in zip(images.split(200), labels.split(200), strict=True)
            ]
        )
        correct = accuracies.accuracy(held_bayes(span, denoiser, levels), fooling, labels)
        hit = counted(correct, len(labels)) | dict(
            attack=f"PGD-{CARD_STEPS} of another network", norm="linf", epsilon=epsilon
        )
        return under(denoiser, images, labels, seed) | dict(accuracy_by_transfer=hit)

    return measure


def bayes_curve(span: Span, precision: str) -> Measure:
    """The accuracy along a run: nothing on a CPU where the denoiser is called for each class, which takes too long."""

    def measure(denoiser: Denoiser, images: Tensor, labels: Tensor, seed: int) -> dict:
        if not (torch.accelerator.is_available() or denoiser.one_call):
            return {}
        classifier = held_bayes(span, denoiser, CURVE_LEVELS)
        with in_precision(precision, images):
            correct = accuracies.accuracy(classifier, images, labels)
        return dict(correct=correct, n=len(labels), levels=CURVE_LEVELS)

    return measure


# ---------------------------------------------------------------------------------------------------------------------
# Plain classifiers


def attacked_accuracy(epsilon: float, attacked: int) -> Measure:
    """The accuracy of a deterministic classifier, and that of the first `attacked` images under attack."""

    def measure(classifier: ConvClassifier, images: Tensor, labels: Tensor, seed: int) -> dict:
        correct = accuracies.accuracy(classifier, images, labels)
        return dict(
            accuracy=counted(correct, len(labels)),
            accuracy_under_attack=under_attack(
                classifier, images[:attacked], labels[:attacked], epsilon
            ),
        )

    return measure


def attacked_curve(epsilon: float) -> Measure:
    """The accuracy along a run, and how many images survive a shorter attack."""

    def measure(classifier: ConvClassifier, images: Tensor, labels: Tensor, seed: int) -> dict:
        return dict(
            correct=accuracies.accuracy(classifier, images, labels),
            n=len(labels),
            attack_steps=CURVE_STEPS,
            survived=survivors(classifier, images, labels, epsilon, CURVE_STEPS),
        )

    return measure


# ---------------------------------------------------------------------------------------------------------------------
# Plain classifiers of noised pictures


def noised(images: Tensor, sigma: float, seed: int) -> Tensor:
    """The images with Gaussian noise, not clamped. Shapes: [N,C,H,W] -> the same. Randomness: from `seed`, on the CPU."""
    eps = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))
    return images + sigma * eps.to(images)


def noised_accuracy(sigma: float, voted: int, votes: int) -> Measure:
    """The accuracy on images with one noise each and, of the first `voted`, that of the majority of votes.

    Units       sigma in pixels
    Randomness  the noise, and the votes, each picture its own, from the seed
    """

    def measure(classifier: ConvClassifier, images: Tensor, labels: Tensor, seed: int) -> dict:
        once = accuracies.accuracy(classifier, noised(images, sigma, seed), labels)
        smoothed = Fresh(Smoothed(classifier, votes=votes), torch.Generator().manual_seed(seed))
        most = accuracies.accuracy(smoothed, images[:voted], labels[:voted])
        return dict(
            accuracy=counted(once, len(labels)) | dict(sigma_pixel=sigma),
            accuracy_of_votes=counted(most, len(labels[:voted])) | dict(votes=votes),
        )

    return measure


def noised_curve(sigma: float) -> Measure:
    """The accuracy along a run, on images with one noise each. Units: sigma in pixels."""

    def measure(classifier: ConvClassifier, images: Tensor, labels: Tensor, seed: int) -> dict:
        correct = accuracies.accuracy(classifier, noised(images, sigma, seed), labels)
        return dict(correct=correct, n=len(labels))

    return measure


# ---------------------------------------------------------------------------------------------------------------------
# Translators


def translation_accuracy(translator: Translator, images: Tensor, labels: Tensor, seed: int) -> dict:
    """The accuracy with noise that is held and with fresh noise, and what a picture costs.

    Randomness  the fresh noise from `seed`, drawn where the images are
    """
    classifier = TranslationClassifier(translator)
    fresh = Fresh(classifier, torch.Generator(images.device).manual_seed(seed))
    counts = [
        accuracies.accuracy(asked, images, labels, batch=200)
        for asked in (Held.seeded(classifier), fresh)
    ]
    held, random = (counted(correct, len(labels)) for correct in counts)
    return dict(
        accuracy=held,
        accuracy_fresh_noise=random,
        flops=idc.classification_flops(classifier),
    )
