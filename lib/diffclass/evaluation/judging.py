"""Your own picture before a classifier of the course: posterior, losses, and how familiar the picture is."""

from collections.abc import Iterator
from dataclasses import asdict

import torch
from torch import Tensor

from diffclass import data
from diffclass.classifiers.base import decided
from diffclass.classifiers.bayes import BayesClassifier
from diffclass.data import cifar, pictures
from diffclass.data.worlds import world_of
from diffclass.zoo import networks

PHOTO_REFERENCES = 10_000  # training photographs among which the nearest is looked for


class Judge:
    """A classifier of a world, with the names of its classes and its training images, for pictures from files.

    Errors      those of `assets.verified` and `load_denoiser`
    """

    def __init__(self, world: str, model: str | None = None):
        place = world_of(world)
        denoiser, self.model = networks.load(world, model or networks.quick_model(place.kind))
        self.classifier = BayesClassifier(denoiser, networks.few_levels_of(self.model))
        self.noise = self.classifier.sample_noise(1, torch.Generator().manual_seed(0))
        self.class_names = place.class_names
        self.familiar = None
        if place.kind == "digits":
            self.familiar = data.digits().train_images
        elif cifar.cifar10_available()[0]:
            self.familiar = cifar.cifar10("train", PHOTO_REFERENCES, progress=False)[0]

    def losses(self, image: Tensor) -> Iterator[Tensor]:
        """The diffusion losses, a noise level at a time. Shapes: image [1,C,H,W] in [0,1] -> T times [1,K,1]."""
        with torch.no_grad():
            yield from self.classifier.losses_by_level(image, self.noise)

    def verdict(self, path: str) -> Iterator[tuple[int, int, dict | None]]:
        """Yields (noise levels asked, all of them, None), and at the end the verdict in place of None.

        Shapes      the verdict: prediction, classes, their posterior and losses (weighted, in nats), and how familiar
                    the picture is (None where the training images are not at hand)
        Errors      those of `pictures.load_picture`; those of `decided` for logits that are not finite
        """
        image = pictures.load_picture(path, self.classifier.image_shape)
        parts = []
        total = len(self.classifier.levels)
        for part in self.losses(image):
            parts.append(part)
            yield len(parts), total, None
        logits = self.classifier.logits_of(torch.cat(parts, 2))
        posterior = logits.softmax(1)[0].tolist()
        losses = (self.classifier.log_prior.to(logits) - logits)[0].tolist()
        familiarity = (
            None
            if self.familiar is None
            else asdict(pictures.distance_report(image, self.familiar))
        )
        yield (
            total,
            total,
            dict(
                prediction=self.class_names[int(decided(logits))],
                classes=list(self.class_names),
                posterior=posterior,
                losses=losses,
                familiarity=familiarity,
            ),
        )


def described(verdict: dict) -> str:
    """A verdict in words: prediction, three best classes, ten losses, a warning for an unfamiliar picture."""
    names = verdict["classes"]
    posterior = verdict["posterior"]
    losses = verdict["losses"]
    best = sorted(range(len(names)), key=lambda k: -posterior[k])
    least = min(losses)
    lines = [
        verdict["prediction"],
        "  posterior  " + "   ".join(f"{names[k]}: {posterior[k]:.1%}" for k in best[:3]),
        f"  losses     smallest {least:.1f} nats; above it "
        + " ".join(f"{name}:+{loss - least:.1f}" for name, loss in zip(names, losses, strict=True)),
    ]
    if verdict["familiarity"] is None:
        lines.append(
            "  note       the training images are not at hand, so how familiar it looks was not measured"
        )
    elif verdict["familiarity"]["far"]:
        lines.append(f"  WARNING    {verdict['familiarity']['sentence']}")
    return "\n".join(lines)
