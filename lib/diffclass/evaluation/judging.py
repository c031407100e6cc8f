"""Your own picture before a classifier of the course: posterior, losses, and how familiar the picture is."""

from collections.abc import Iterator
from dataclasses import asdict

import torch
from torch import Tensor

from diffclass import data
from diffclass.data import cifar, pictures
from diffclass.zoo import networks

PHOTO_REFERENCES = 10_000  # training photographs among which the nearest is looked for


class Judge:
    """A classifier of a world, with the names of its classes and its training images, for pictures from files.

    Errors      those of `assets.verified` and `load_denoiser`
    """

    def __init__(self, world: str, model: str | None = None):
        denoiser, self.model = networks.load(world, model)
        if world == "digits":
            digits = data.digits()
            self.class_names = digits.class_names
            self.familiar = digits.train_images
            self.classifier = networks.digit_classifier(denoiser)
            return
        self.class_names = cifar.CIFAR10_CLASSES
        self.familiar = None
        self.classifier = networks.cifar_classifier(denoiser, networks.PHOTO_LEVELS)
        if cifar.cifar10_available()[0]:
            self.familiar = cifar.cifar10("train", PHOTO_REFERENCES, progress=False)[0]

    def losses(self, image: Tensor) -> Iterator[Tensor]:
        """The diffusion losses, a noise level at a time. Shapes: image [1,C,H,W] in [0,1] -> T times [1,K,1]."""
        for level in range(len(self.classifier.bank.levels)):
            part = self.classifier.twin()
            part.bank = self.classifier.bank.level(level)
            with torch.no_grad():
                yield part.losses(image)

    def verdict(self, path: str) -> Iterator[tuple[int, int, dict | None]]:
        """Yields (noise levels asked, all of them, None), and at the end the verdict in place of None.

        Shapes      the verdict: prediction, classes, their posterior and losses (weighted, in nats), and how familiar
                    the picture is (None where the training images are not at hand)
        Errors      those of `pictures.load_picture`
        """
        image = pictures.load_picture(path, self.classifier.image_shape)
        found = []
        total = len(self.classifier.bank.levels)
        for part in self.losses(image):
            found.append(part)
            yield len(found), total, None
        logits = self.classifier.logits_of(torch.cat(found, 2))
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
                prediction=self.class_names[int(logits.argmax())],
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
