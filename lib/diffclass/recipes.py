"""The networks in `assets/` and the classifiers made of them, measured and asked as the course does it."""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from diffclass import assets, certificates, cifar, data, gallery, measuring, noise, pictures, results
from diffclass.classifiers import BayesClassifier
from diffclass.denoisers import network
from diffclass.denoisers.base import Denoiser
from diffclass.denoisers.exact import MixtureDenoiser
from diffclass.noise import NoiseBank, Weighting

TEACHER, STUDENT = "digits-teacher.safetensors", "digits-student.safetensors"
MODELS = {
    "digits": {"student": STUDENT, "teacher": TEACHER},
    "cifar10": {name: f"cifar10-{name}.safetensors" for name in ("student", "teacher", "prototype")},
}
DIGIT_RANGE = (0.1, 3.0)  # where digits differ: below, all losses are small; above, all alike
DIGIT_LEVELS = noise.log_levels(*DIGIT_RANGE, 16)
CIFAR_RANGE = (0.05, 10.0)  # the same for photographs of 32x32 pixels
PLANE_RANGE = (0.02, 5.0)  # from below the narrowest law of the plane to beyond the widest
PLANE_SAMPLES = 16  # a point has two coordinates: one noise sample says little, and 16 cost little


def digit_classifier(denoiser: Denoiser, levels: noise.Levels = DIGIT_LEVELS, samples: int = 1, seed: int = 0,
                     weighting: Weighting = noise.elbo_weight) -> BayesClassifier:
    """The deterministic classifier of digits that the course uses: 16 levels, one noise each."""
    return BayesClassifier(denoiser, NoiseBank.fixed(levels, denoiser.image_shape, samples, seed), weighting)


def cifar_classifier(denoiser: Denoiser, levels: int = 36, seed: int = 0,
                     weighting: Weighting = noise.elbo_weight) -> BayesClassifier:
    """The deterministic classifier of CIFAR-10 that the course uses: levels in [0.05, 10], one noise each."""
    grid = noise.log_levels(*CIFAR_RANGE, levels)
    return BayesClassifier(denoiser, NoiseBank.fixed(grid, denoiser.image_shape, 1, seed), weighting)


def available_model(world: str, model: str | None) -> str:
    """The file of a world's network by name; without a name the first of `MODELS` that is in `assets/`.

    Errors      ValueError for a name that does not exist
    """
    models = MODELS[world]
    if model is not None:
        return chosen(model, models, "the model")
    listed = assets.checksums()
    return next((file for file in models.values() if assets.parts(file, listed)), next(iter(models.values())))


def chosen(value: str, allowed, what: str):
    """The entry of `allowed` (names, or a mapping from names) that `value` names, whatever its case.

    Errors      ValueError that lists the names
    """
    names = {name.lower(): name for name in allowed}
    if value.lower() not in names:
        choice = ", ".join(map(repr, allowed))
        raise ValueError(f"expected {what} to be {'one of ' * (len(allowed) > 1)}{choice}, got {value!r}.")
    name = names[value.lower()]
    return allowed[name] if isinstance(allowed, dict) else name


def load_digits_denoiser(name: str = STUDENT) -> Denoiser:
    """A trained digits denoiser from `assets/`, its checksum verified. Errors: those of `verified`, `load_denoiser`."""
    return network.load_denoiser(assets.verified(name))[0]


def hits(classifier, images: torch.Tensor, labels: torch.Tensor, batch: int = 100) -> Iterator[tuple[int, int]]:
    """Classify batch by batch, yielding how many are correct of how many seen so far, so that a caller can show it.

    Shapes      images [N,C,H,W] in [0,1], labels [N]
    """
    correct = 0
    for start in range(0, len(images), batch):
        with torch.no_grad():
            answers = classifier(images[start:start + batch]).argmax(1)
        correct += int((answers == labels[start:start + batch]).sum())
        yield correct, min(start + batch, len(images))


def accuracy(classifier, images: torch.Tensor, labels: torch.Tensor, batch: int = 100) -> int:
    """How many of the images are classified correctly. Shapes: images [N,C,H,W] in [0,1], labels [N] -> a count."""
    return max((correct for correct, _ in hits(classifier, images, labels, batch)), default=0)


@dataclass(frozen=True, eq=False)
class Evaluation:
    """A classifier, the labelled images it is to be measured on, and everything that was chosen, for a record.

    optimal     how many of the images the exact posterior classifies correctly; None where no law is known
    checkpoint  SHA-256 of the weights; None for closed forms
    """

    classifier: BayesClassifier
    images: torch.Tensor
    labels: torch.Tensor
    settings: dict
    checkpoint: str | None = None
    optimal: int | None = None


def evaluation(world: str = "digits", model: str | None = None, limit: int | None = None, levels: int = 16,
               weighting: str = "ELBO", seed: int = 0) -> Evaluation:
    """Prepare the measurement of an accuracy on test digits, test images of CIFAR-10, the gallery, or "plane:moons".

    Randomness  noise and points from `seed`; `limit` takes the first test images (their order is a random permutation)
    Errors      ValueError for a name that does not exist; those of `load_denoiser` and `cifar.cifar10`
    """
    weighting = chosen(weighting, list(noise.WEIGHTINGS), "the weighting")
    rule = noise.WEIGHTINGS[weighting]
    kind, _, law_name = world.partition(":")
    kind = chosen(kind, ("digits", "plane", "cifar10", "gallery"), "the world")
    if kind == "plane":
        law = chosen(law_name, data.PLANE_LAWS, "the law of the plane (as in plane:moons)")()
        if model is not None:
            raise ValueError(f"expected no model for the plane, got {model!r}; its denoiser is exact.")
        images, labels = law.sample(limit or 1000, torch.Generator().manual_seed(seed))
        bank = NoiseBank.fixed(noise.log_levels(*PLANE_RANGE, levels), law.image_shape, PLANE_SAMPLES, seed)
        classifier = BayesClassifier(MixtureDenoiser.of_law(law), bank, rule, prior=law.priors)
        optimal = int((law.posterior(images).argmax(1) == labels).sum())
        settings = dict(world=f"plane:{law.name}", model="exact", levels=levels, sigma=list(PLANE_RANGE),
                        samples=PLANE_SAMPLES, weighting=weighting)
        return Evaluation(classifier, images, labels, settings, optimal=optimal)
    if law_name:
        raise ValueError(f"expected the world {kind!r} without a law, got {world!r}.")
    file = available_model("digits" if kind == "digits" else "cifar10", model)
    denoiser = network.load_denoiser(assets.verified(file))[0]
    name = file.partition(".")[0].partition("-")[2]
    settings = dict(world=kind, model=name, levels=levels, samples=1, weighting=weighting)
    if kind == "digits":
        digits = data.digits()
        images, labels = digits.test_images[:limit], digits.test_labels[:limit]
        classifier = digit_classifier(denoiser, noise.log_levels(*DIGIT_RANGE, levels), 1, seed, rule)
        settings["sigma"] = list(DIGIT_RANGE)
    else:
        images, labels = cifar.cifar10("test", limit) if kind == "cifar10" else (p[:limit] for p in gallery.pictures())
        classifier = cifar_classifier(denoiser, levels, seed, rule)
        settings["sigma"] = list(CIFAR_RANGE)
    return Evaluation(classifier, images, labels, settings, assets.fingerprint(file))


def card_line(content: dict) -> str:
    """The accuracy on a model card, in words."""
    if "accuracy" not in content:
        return "no accuracy on its model card"
    a = content["accuracy"]
    return (f"test accuracy {a['correct'] / a['n']:.1%} [{a['low']:.1%}, {a['high']:.1%}] ({a['correct']} of {a['n']}, "
            "95 % Clopper-Pearson)")


def records(trial: Evaluation, correct: int, seed: int) -> list[results.Record]:
    """The measured accuracy as a record, followed by the optimal one of the same points where it is known."""
    n, settings = len(trial.labels), trial.settings
    where = {"digits": f"{n} test digits", "cifar10": f"the first {n} test images of CIFAR-10",
             "gallery": f"{n} pictures that such a network drew itself"}.get(
        settings["world"], f"{n} points of {settings['world']}")
    how = f"{settings['model']} denoiser, {settings['weighting']} weights"
    counts = [(f"accuracy of the diffusion classifier ({how}) on {where}", correct, settings)]
    if trial.optimal is not None:
        counts.append((f"accuracy of the exact posterior on {where}", trial.optimal, {"world": settings["world"]}))
    return [results.accuracy_record(count, n, what, certificates.interval(count, n), settings=own, seed=seed,
                                    source="diffclass evaluate", checkpoint=trial.checkpoint)
            for what, count, own in counts]


def store_settings(trial: Evaluation, seed: int, precision: str) -> dict:
    """What stored losses depend on: everything but the weighting, which is applied to them afterwards."""
    own = {key: value for key, value in trial.settings.items() if key != "weighting"}
    return {**own, "seed": seed, "checkpoint": trial.checkpoint, "precision": precision}


def stored_records(trial: Evaluation, losses: measuring.Losses, seed: int) -> list[results.Record]:
    """The accuracy under every weighting, from the same stored losses."""
    n = len(losses.labels)
    return [record for name, rule in noise.WEIGHTINGS.items() for record in records(
        replace(trial, labels=losses.labels, optimal=None, settings={**trial.settings, "weighting": name, "n": n}),
        int(losses.hits(rule).sum()), seed)]


def judge(name: str) -> Callable[[str], dict]:
    """What classifies a picture file as a digit, with the network of that name loaded once.

    Shapes      -> a function path -> prediction, posterior and losses (weighted, in nats) of the ten digits, and how
                familiar the picture is
    Errors      those of `load_digits_denoiser`; the function's are those of `load_picture`
    """
    classifier, world = digit_classifier(load_digits_denoiser(name)), data.digits()

    def verdict(path: str) -> dict:
        image = pictures.load_picture(path, world.image_shape)
        with torch.no_grad():
            logits = classifier(image)
        posterior = logits.softmax(1)[0].tolist()
        best = max(range(len(posterior)), key=posterior.__getitem__)
        losses = (classifier.log_prior.to(logits) - logits)[0].tolist()
        return dict(prediction=world.class_names[best], posterior=posterior, losses=losses,
                    familiarity=asdict(pictures.distance_report(image, world.train_images)))

    return verdict


def described(verdict: dict) -> str:
    """A verdict of `judge` in words: prediction, three best digits, ten losses, a warning for an unfamiliar picture."""
    order = sorted(range(len(verdict["posterior"])), key=lambda k: -verdict["posterior"][k])
    least = min(verdict["losses"])
    lines = [verdict["prediction"],
             "  posterior  " + "   ".join(f"{k}: {verdict['posterior'][k]:.1%}" for k in order[:3]),
             f"  losses     smallest {least:.1f} nats; above it " +
             " ".join(f"{k}:+{loss - least:.1f}" for k, loss in enumerate(verdict["losses"]))]
    if verdict["familiarity"]["far"]:
        lines.append(f"  WARNING    {verdict['familiarity']['sentence']}")
    return "\n".join(lines)


def card(path: Path) -> dict:
    """The model card inside a weights file, of whatever kind of network. Errors: as `network.read_header`."""
    return json.loads(network.read_header(path).get("card", "{}"))
