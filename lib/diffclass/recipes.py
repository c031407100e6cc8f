"""How the networks in `assets/` were trained: data, settings and evaluation of each, as one call."""

import contextlib
import signal
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch

from diffclass import assets, certificates, data, noise, pictures, results, units
from diffclass.classifiers import BayesClassifier
from diffclass.denoisers import network
from diffclass.denoisers.base import Denoiser
from diffclass.denoisers.exact import MixtureDenoiser
from diffclass.noise import NoiseBank, Weighting
from diffclass.training import Progress, Training, denoising_loss, distillation_loss

TEACHER, STUDENT = "digits-teacher.safetensors", "digits-student.safetensors"
MODELS = {"teacher": TEACHER, "student": STUDENT}
DIGIT_RANGE = (0.1, 3.0)  # where digits differ: below, all losses are small; above, all alike
DIGIT_LEVELS = noise.log_levels(*DIGIT_RANGE, 16)
PLANE_RANGE = (0.02, 5.0)  # from below the narrowest law of the plane to beyond the widest
PLANE_SAMPLES = 16  # a point has two coordinates: one noise sample says little, and 16 cost little

SETTINGS = {
    TEACHER: dict(kind="ConditionalDenoiser", steps=500, batch=256, rate=2e-3),
    STUDENT: dict(kind="MultiHeadDenoiser", steps=3000, batch=128, rate=3e-3),
}


def digit_classifier(denoiser: Denoiser, levels: noise.Levels = DIGIT_LEVELS, samples: int = 1, seed: int = 0,
                     weighting: Weighting = noise.elbo_weight) -> BayesClassifier:
    """The deterministic classifier of digits that the course uses: 16 levels, one noise each."""
    return BayesClassifier(denoiser, NoiseBank.fixed(levels, denoiser.image_shape, samples, seed), weighting)


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
    """Prepare the measurement of an accuracy on the test digits, or on points of a plane law ("plane:moons").

    Randomness  noise and points from `seed`; `limit` takes the first test digits (their order is a random permutation)
    Errors      ValueError for a name that does not exist; those of `load_digits_denoiser`
    """
    weighting = chosen(weighting, list(noise.WEIGHTINGS), "the weighting")
    rule = noise.WEIGHTINGS[weighting]
    kind, _, law_name = world.partition(":")
    if chosen(kind, ("digits", "plane"), "the world") == "plane":
        law = chosen(law_name, data.PLANE_LAWS, "the law of the plane (as in plane:moons)")()
        if model is not None:
            raise ValueError(f"expected no model for the plane, got {model!r}; its denoiser is exact.")
        images, labels = law.sample(limit or 1000, torch.Generator().manual_seed(seed))
        bank = NoiseBank.fixed(noise.log_levels(*PLANE_RANGE, levels), law.image_shape, PLANE_SAMPLES, seed)
        classifier = BayesClassifier(MixtureDenoiser.of_law(law), bank, rule, prior=law.priors)
        optimal = int((law.posterior(images).argmax(1) == labels).sum())
        return Evaluation(classifier, images, labels, dict(world=f"plane:{law.name}", model="exact", levels=levels,
                          sigma=list(PLANE_RANGE), samples=PLANE_SAMPLES, weighting=weighting), optimal=optimal)
    if law_name:
        raise ValueError(f"expected the world 'digits' without a law, got {world!r}.")
    model, digits = chosen(model or "student", list(MODELS), "the model"), data.digits()
    denoiser = load_digits_denoiser(MODELS[model])
    classifier = digit_classifier(denoiser, noise.log_levels(*DIGIT_RANGE, levels), 1, seed, rule)
    settings = dict(world="digits", model=model, levels=levels, sigma=list(DIGIT_RANGE), samples=1, weighting=weighting)
    return Evaluation(classifier, digits.test_images[:limit], digits.test_labels[:limit], settings,
                      assets.checksums()[MODELS[model]])


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
    where = f"{n} test digits" if trial.optimal is None else f"{n} points of {settings['world']}"
    how = f"{settings['model']} denoiser, {settings['weighting']} weights"
    counts = [(f"accuracy of the diffusion classifier ({how}) on {where}", correct, settings)]
    if trial.optimal is not None:
        counts.append((f"accuracy of the exact posterior on {where}", trial.optimal, {"world": settings["world"]}))
    return [results.accuracy_record(count, n, what, certificates.interval(count, n), settings=own, seed=seed,
                                    source="diffclass evaluate", checkpoint=trial.checkpoint)
            for what, count, own in counts]


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


def remaining(folder: Path, teacher_only: bool = False) -> list[str]:
    """The networks that training has still to make: both, or only the student if its own training was interrupted."""
    checkpoints = folder / "checkpoints"
    if teacher_only:
        return [TEACHER]
    begun = (checkpoints / STUDENT).exists() and (folder / TEACHER).exists() and not (checkpoints / TEACHER).exists()
    return [STUDENT] if begun else [TEACHER, STUDENT]


def card(path: Path) -> dict:
    """The model card inside a weights file. Errors: as `load_denoiser`."""
    return network.load_denoiser(path)[1]


def stoppable(run: Iterator[Progress]) -> Iterator[Progress]:
    """The same progress, but Ctrl-C waits for the end of a step, so that the checkpoint is whole and the resumed run
    equals an unbroken one. A second Ctrl-C does not wait. For the main thread, where signals arrive."""
    pressed, before = [], signal.getsignal(signal.SIGINT)

    def press(number, frame):
        pressed.append(number)
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, press)
    try:
        with contextlib.closing(run):
            for progress in run:
                yield progress
                if pressed:
                    raise KeyboardInterrupt
                if progress.step == progress.steps:  # what follows only measures, and the checkpoint is complete
                    signal.signal(signal.SIGINT, before)
    finally:
        signal.signal(signal.SIGINT, before)


def train_digits(name: str, folder: Path, steps: int | None = None, seed: int = 0) -> Iterator[Progress]:
    """Train one of the two digits networks, yielding progress; the last act writes weights, card and checksum.

    Shapes      name is `TEACHER` or `STUDENT`; the student copies the teacher found in `folder`
    Randomness  all from `seed`
    Writes      folder/name, its line in SHA256SUMS, and folder/checkpoints/name while it runs (resumed if present)
    """
    settings = {**SETTINGS[name], **({"steps": steps} if steps else {})}
    world = data.digits()
    kind = settings.pop("kind")
    denoiser = network.build(kind, "DigitNet", world.num_classes, world.image_shape, seed=seed)
    loss = denoising_loss if name == TEACHER else distillation_loss(network.load_denoiser(folder / TEACHER)[0])
    run = Training(denoiser, units.to_model(world.train_images), world.train_labels, loss=loss, seed=seed,
                   checkpoint=folder / "checkpoints" / name, **settings)
    progress = None
    for progress in run:
        yield progress
    if progress is None:  # the checkpoint was complete already
        progress = Progress(run.step, run.step, float("nan"), run.step * settings["batch"], run.seconds)
    denoiser = run.average.eval()
    correct = accuracy(digit_classifier(denoiser), world.test_images, world.test_labels)
    content = _card(name, kind, {**settings, "seed": seed}, progress, correct, len(world.test_labels),
                    next(denoiser.parameters()).device.type)
    network.save_denoiser(denoiser, folder / name, content)
    assets.record([name], folder)
    (folder / "checkpoints" / name).unlink(missing_ok=True)


def _card(name: str, kind: str, settings: dict, progress: Progress, correct: int, n: int, device: str) -> dict:
    low, high = certificates.interval(correct, n)
    return dict(name=name, kind=kind, data="scikit-learn digits, 1397 training images", settings=settings,
                images_seen=progress.images, seconds=round(progress.seconds, 1), device=device,
                threads=torch.get_num_threads(), torch=torch.__version__.split("+")[0],
                command="diffclass train digits", date=datetime.now(UTC).strftime("%Y-%m-%d"),
                accuracy=dict(correct=correct, n=n, low=low, high=high, levels="16 log-spaced in [0.1, 3]",
                              weighting="ELBO"))
