"""What the explorer can be left as and taken up again from: a state, as JSON or in a link, and a record of its results."""

import base64
import binascii
import json
import zlib
from dataclasses import asdict, dataclass, fields

import numpy as np
import torch
from torch import Tensor

from diffclass import __version__, units
from diffclass.attacks import size_of
from diffclass.classifiers.base import decided
from diffclass.course.scenes.explorer import (
    METHODS,
    NORMS,
    WHO,
    WORLDS,
    Asked,
    ExplorerScene,
    Film,
    Lane,
    missing,
)
from diffclass.data.worlds import SHAPES
from diffclass.zoo import classifiers

VERSION = 1
LONGEST = 100_000  # characters of a state that is read: a photograph of one's own has 4 000
RECORD = "explorer record"
STORED = "stored in a record"


@dataclass(frozen=True)
class State:
    """Everything that the explorer's controls say.

    picture     the place of a picture in its world, or one of the reader's own as `packed` gives it
    Units       budget and smoothing in pixels of [0,1], sigma in model space
    """

    world: str = "digits"
    classifiers: tuple[str, ...] = ("dc",)
    picture: int | str = 4
    seed: int = 0
    sigma: float = 0.6
    norm: str = "L2"
    budget: float = 1.0
    method: str = next(iter(METHODS))
    steps: int = 20
    who: str = WHO[0]
    smoothing: float = 0.25
    votes: int = 1000
    step: int = 0

    def as_json(self) -> str:
        """The state as one JSON document."""
        return json.dumps({"explorer": VERSION, **asdict(self)}, ensure_ascii=False)

    def as_link(self) -> str:
        """The state as the value of `state` in an address."""
        packed = zlib.compress(self.as_json().encode(), 9)
        return base64.urlsafe_b64encode(packed).decode().rstrip("=")

    @property
    def asked(self) -> Asked:
        """What it asks of an attack."""
        return Asked(self.norm, self.budget, self.method, self.steps, self.who)


def of_link(text: str) -> tuple[State, list[str]]:
    """The state of an address. Errors: ValueError for what is none; see `of_json`."""
    try:
        raw = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
        unpacking = zlib.decompressobj()
        unpacked = unpacking.decompress(raw, LONGEST).decode()
    except (binascii.Error, zlib.error, UnicodeDecodeError):
        raise ValueError(
            "expected the state of an explorer, as JSON or as the text of a link, got something else; was it cut short?"
        ) from None
    if not unpacking.eof:
        raise ValueError(
            "expected the state of an explorer, got the text of a link that was cut short."
        )
    return of_json(unpacked)


def of_json(text: str) -> tuple[State, list[str]]:
    """The state in a JSON document, and a sentence for whatever in it does not exist here, which is left as it is.

    Errors      ValueError for what is no state at all
    """
    if len(text) > LONGEST:
        raise ValueError(f"expected the state of an explorer, got {len(text)} characters.")
    try:
        document = json.loads(text)
    except json.JSONDecodeError as reason:
        raise ValueError(f"expected the state of an explorer as JSON, got {reason}.") from None
    if isinstance(document, dict) and document.get("kind") == RECORD:
        document = document.get("state")
    if not isinstance(document, dict) or "explorer" not in document:
        raise ValueError(
            'expected the state of an explorer, a JSON object with a field "explorer", got something else.'
        )
    complaints = []
    if document["explorer"] != VERSION:
        complaints.append(
            f"This state is of version {document['explorer']!r}, not {VERSION}; what is known of it is taken."
        )
    usual = State()
    chosen = {}
    world = document.get("world", usual.world)
    if world not in WORLDS:
        complaints.append(f"There is no world {world!r}; the {usual.world} are shown.")
        world = usual.world
        document = {**document, "world": world, "picture": usual.picture}
    for one in fields(State):
        value = document.get(one.name, getattr(usual, one.name))
        if one.name == "classifiers":
            value, said = _classifiers(world, value)
            complaints += said
        problem = _problem(one.name, value, world)
        if problem:
            complaints.append(f"{problem} {getattr(usual, one.name)!r} is taken instead.")
            value = getattr(usual, one.name)
        chosen[one.name] = value
    return State(**chosen), complaints


def _classifiers(world: str, names) -> tuple[tuple[str, ...], list[str]]:
    """Those of the names that can be asked, and a sentence for each that cannot."""
    said = []
    kept = []
    for name in names if isinstance(names, (list, tuple)) else [names]:
        if name not in classifiers.names(world):
            said.append(f"There is no classifier {name!r} of {WORLDS[world]} any more.")
        elif missing(world, name):
            said.append(missing(world, name))
        else:
            kept.append(name)
    return tuple(kept[:2]) or ("dc" if world == "digits" else "contrastive",), said


def _problem(name: str, value, world: str) -> str | None:
    """What is wrong with a field of a state, or None."""
    number = type(value) in (int, float) and abs(value) < 1e6
    listed = {"norm": NORMS, "method": METHODS, "who": WHO}
    if name in listed and value not in tuple(listed[name]):
        return f"There is no {name} {value!r}."
    if name in ("seed", "steps", "votes", "step") and not (type(value) is int and 0 <= value < 1e6):
        return f"{name} is a whole number, not {value!r}."
    if name in ("sigma", "budget", "smoothing") and not (number and value >= 0):
        return f"{name} is a number, not {value!r}."
    if name == "picture":
        try:
            if type(value) is not int:
                unpacked(value, SHAPES[world])
        except (TypeError, ValueError) as reason:
            return f"The picture cannot be read ({reason})."
    return None


def packed(x: Tensor) -> str:
    """A picture in 8 bits as text. Shapes: [1,C,H,W] in [0,1]."""
    pixels = (x[0].clamp(0, 1) * 255).round().byte().cpu().numpy()
    return base64.b64encode(zlib.compress(pixels.tobytes(), 9)).decode()


def unpacked(text: str, shape: tuple[int, int, int]) -> Tensor:
    """The picture that `packed` gave. Shapes: -> [1,C,H,W]. Errors: ValueError for anything else."""
    count = int(np.prod(shape))
    try:
        raw = zlib.decompressobj().decompress(base64.b64decode(text, validate=True), count + 1)
    except (binascii.Error, zlib.error, TypeError) as reason:
        raise ValueError(f"expected a packed picture, got something else: {reason}") from None
    if len(raw) != count:
        raise ValueError(f"expected a picture of {count} numbers, got another one.")
    return torch.from_numpy(np.frombuffer(raw, np.uint8).copy()).reshape(1, *shape).float() / 255


# ---------------------------------------------------------------------------------------------------------------------
# Results


def record(scene: ExplorerScene, state: State) -> dict:
    """What was found of the present picture, with everything that is needed to find it again.

    Meaning     of an attack the last picture's perturbation, as float32; of a certificate its counts
    """
    return {
        "kind": RECORD,
        "version": __version__,
        "state": json.loads(state.as_json()),
        "subject": scene.subject.title,
        "results": [_result(scene, lane) for lane in scene.lanes],
    }


def _result(scene: ExplorerScene, lane: Lane) -> dict:
    clean = lane.look(None, scene.subject.x).logits
    found: dict = {
        "classifier": lane.name,
        "checkpoints": classifiers.checkpoints(scene.world, lane.name),
        "says": scene.class_names[scene.predicted(lane)],
        "logits": clean.tolist(),
        "network calls": lane.spent,
    }
    if lane.film is not None and lane.film.frames:
        last = lane.film.frames[-1]
        found["attack"] = {
            **asdict(lane.film.asked),
            "through": lane.film.through,
            "outcome": lane.film.outcome,
            "says": scene.class_names[int(decided(last.logits))],
            "perturbation": _floats(last.x - scene.subject.x),
        }
    if lane.nearest.size is not None:
        found["shortest fooling change"] = {"l2": lane.nearest.size, "by": lane.nearest.attack}
    certified = lane.certified
    if certified is not None and certified.certificate is not None:
        found["certificate"] = {"voter": certified.voter, **asdict(certified.certificate)}
    return found


def _floats(values: Tensor) -> str:
    return base64.b64encode(values.float().cpu().numpy().tobytes()).decode()


def _perturbation(text: str, like: Tensor) -> Tensor:
    try:
        raw = base64.b64decode(text, validate=True)
        values = torch.from_numpy(np.frombuffer(raw, np.float32).copy()).reshape(like.shape)
    except (binascii.Error, TypeError, ValueError, RuntimeError) as reason:
        raise ValueError(f"expected a perturbation of shape {list(like.shape)}: {reason}") from None
    return units.check_reals(values, "a perturbation")


def reopened(scene: ExplorerScene, document: dict) -> list[str]:
    """Show the attacks of a record on the present picture, asked about anew; whether each claim holds, in sentences.

    Errors      ValueError for a record without results
    """
    results = document.get("results")
    if not isinstance(results, list):
        raise ValueError("expected a record of the explorer with results, got one without.")
    said = []
    by_name = {one.get("classifier"): one for one in results if isinstance(one, dict)}
    for lane in scene.lanes:
        stored = by_name.get(lane.name, {}).get("attack")
        if stored is None:
            continue
        delta = _perturbation(stored.get("perturbation"), scene.subject.x)
        claimed = stored.get("says")
        show_stored(scene, lane, delta, float(stored.get("budget", 0)), stored.get("norm", "L∞"))
        now = scene.class_names[int(decided(lane.film.frames[-1].logits))]
        holds = "which holds" if now == claimed else f"but says <b>{now}</b> here"
        said.append(
            f"The record claims that {lane.title} calls the changed picture {claimed}, {holds}."
        )
    return said


def show_stored(scene: ExplorerScene, lane: Lane, delta: Tensor, budget: float, norm: str) -> None:
    """Show a stored perturbation as a film of two pictures: the clean one and the changed one, asked about here.

    Shapes      delta [1,C,H,W]
    """
    x = scene.subject.x
    film = Film(steps=1, asked=Asked(norm, budget, STORED, 1), through=lane.name, ending="done")
    for number, image in enumerate((x, (x + delta).clamp(0, 1))):
        size = size_of(image - x, NORMS.get(norm, "linf"))
        scene.add(lane, film, number, image, size)
    lane.show(film)
