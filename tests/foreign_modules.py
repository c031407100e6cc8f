"""Thirty-odd classifiers of other people: honest ones, and ones that each look more robust than they are in one way.

All see 8x8 pictures of four classes (`planted.images`). A dishonest one is the honest linear function, or a network trained
here, with a single line that cheats; the line is its class, and its docstring says what it does.
"""

import hashlib
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffclass.audit import planted
from torch import Tensor, nn

CLASSES = planted.CLASSES
SHAPE = planted.SHAPE
PIXELS = 64
TESTED = 24  # pictures of the claim

# ---------------------------------------------------------------------------------------------------------------------
# Honest ones


def trained(module: nn.Module, steps: int = 60) -> nn.Module:
    """A module after some steps of Adam on pictures that are not those of the claim, in eval mode."""
    x, y = planted.images(512, seed=100)
    draw = torch.Generator().manual_seed(0)
    optimiser = torch.optim.Adam(module.parameters(), lr=0.01)
    module.train()
    for _ in range(steps):
        some = torch.randint(len(x), (64,), generator=draw)
        loss = nn.functional.cross_entropy(module(x[some]), y[some])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    return module.eval()


def built(make: Callable[[], nn.Module]) -> nn.Module:
    """A trained module whose first weights come from a fixed seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return trained(make())


class Linear(nn.Module):
    """The linear function whose robustness is a formula; all that cheat stand on it."""

    def __init__(self):
        super().__init__()
        self.inner = planted.Honest()

    def forward(self, x):
        return self.inner.linear(x)


class Brightness(nn.Module):
    """Pixels less their mean: layers of one's own are honest too."""

    def forward(self, x):
        return x - x.mean((1, 2, 3), keepdim=True)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(PIXELS, 64), nn.Tanh(), nn.Linear(64, CLASSES))


def cnn() -> nn.Module:
    return nn.Sequential(
        Brightness(),
        nn.Conv2d(1, 8, 3, padding=1),
        nn.SiLU(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(128, CLASSES),
    )


def normalised() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.SiLU(),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(512, CLASSES),
    )


def attentive() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(2),
        nn.Unflatten(2, (8, 8)),
        nn.Flatten(0, 1),
        nn.TransformerEncoderLayer(8, 2, 16, 0.1, batch_first=True),
        nn.Flatten(),
        nn.Linear(PIXELS, CLASSES),
    )


class DropPath(nn.Module):
    """A residual block that is left out by chance while it is trained, written by hand."""

    def __init__(self):
        super().__init__()
        self.block = nn.Linear(PIXELS, PIXELS)
        self.last = nn.Linear(PIXELS, CLASSES)

    def forward(self, x):
        x = x.flatten(1)
        kept = (torch.rand(len(x), 1) < 0.8).to(x) / 0.8 if self.training else 1.0
        return self.last(x + kept * self.block(x).tanh())


class Neighbours(nn.Module):
    """Soft nearest neighbours among training pictures: log sum exp(-|x - x_i|^2 / 2 s^2) of each class."""

    def __init__(self, bandwidth: float = 0.6):
        super().__init__()
        pictures, labels = planted.images(256, seed=100)
        self.register_buffer("pictures", pictures.flatten(1))
        self.register_buffer("mask", nn.functional.one_hot(labels, CLASSES).T.bool())
        self.bandwidth = bandwidth

    def forward(self, x):
        square = ((x.flatten(1)[:, None] - self.pictures.to(x)) ** 2).sum(2)
        near = (-square / (2 * self.bandwidth**2))[:, None].expand(-1, CLASSES, -1)
        return near.masked_fill(~self.mask, -torch.inf).logsumexp(2)


class Radial(nn.Module):
    """Radial basis functions around the class means."""

    def forward(self, x):
        means = (0.5 + planted.means()).flatten(1).to(x)
        return (-((x.flatten(1)[:, None] - means) ** 2).sum(2) / 2).exp()


class Prior(Linear):
    """A linear classifier that knows one class to be more frequent."""

    def forward(self, x):
        return super().forward(x) + torch.tensor([0.5, 0.2, 0.2, 0.1]).log().to(x)


class LogPosterior(Linear):
    """The logarithm of probabilities: never positive, and every bit as good as logits."""

    def forward(self, x):
        return super().forward(x).log_softmax(1)


class Nats(Linear):
    """Sums over many pixels: thousands of nats apart, and far below zero."""

    def forward(self, x):
        return 1000 * super().forward(x) - 5000


class Ensemble(nn.Module):
    """The mean of several networks."""

    def __init__(self, parts):
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x):
        return torch.stack([part(x) for part in self.parts]).mean(0)


class Purifier(Linear):
    """A few steps towards the nearest class mean before the linear function; its gradient is that of all of it."""

    def forward(self, x):
        means = (0.5 + planted.means()).flatten(1).to(x)
        z = x.flatten(1)
        for _ in range(2):
            near = (-((z[:, None] - means) ** 2).sum(2) * 4).softmax(1)
            z = z + 0.3 * (near @ means - z)
        return super().forward(z)


class Smoothed(Linear):
    """Answers for a noised picture, and says so: its noise is an argument."""

    def sample_noise(self, images, generator):
        return torch.randn((images, *SHAPE), generator=generator)

    def forward(self, x, noise):
        return super().forward(x + 0.02 * noise)


class Hidden(Linear):
    """Answers for a noised picture, from torch's global generator."""

    def forward(self, x):
        return super().forward(x + 0.02 * torch.randn_like(x))


# ---------------------------------------------------------------------------------------------------------------------
# Dishonest ones


class Rounded(Linear):
    """Rounds pixels: no gradient."""

    def forward(self, x):
        return super().forward((15 * x).round() / 15)


class RoundedScores(Linear):
    """Rounds what it answers."""

    def forward(self, x):
        return (super().forward(x) * 2).round() / 2


class Random(Linear):
    """Another answer at every call, which it does not declare."""

    def forward(self, x):
        return super().forward(x) + torch.randn(len(x), CLASSES)


class Softmax(Linear):
    """Probabilities."""

    def forward(self, x):
        return super().forward(x).softmax(1)


class Saturated(Linear):
    """Probabilities at so low a temperature that they are 0 and 1."""

    def forward(self, x):
        return (1000 * super().forward(x)).softmax(1)


class Percent(Linear):
    """Probabilities in percent."""

    def forward(self, x):
        return 100 * super().forward(x).softmax(1)


class Clamped(Linear):
    """Scores that are cut to a range in which hardly any of them lies."""

    def forward(self, x):
        logits = super().forward(x)
        return (20 * (logits - logits.mean(1, keepdim=True))).clamp(-5, 5)


class Temperature(Linear):
    """Scores behind a steep tanh."""

    def forward(self, x):
        logits = super().forward(x)
        return 3 * (200 * (logits - logits.mean(1, keepdim=True))).tanh()


class Detached(Linear):
    """Cuts the graph."""

    def forward(self, x):
        return super().forward(x.detach())


class Zeroed(Linear):
    """A gradient that is there, and zero."""

    def forward(self, x):
        return super().forward(x.detach()) + 0 * x.flatten(1)[:, :CLASSES]


class _Backwards(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, slope):
        return -slope


class Negated(Linear):
    """Points attacks the wrong way."""

    def forward(self, x):
        return super().forward(_Backwards.apply(x))


class _Scrambled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, slope):
        return slope.flip(-1)


class Scrambled(Linear):
    """A gradient of the right size, of other pixels."""

    def forward(self, x):
        return super().forward(_Scrambled.apply(x))


class Half(Linear):
    """Flushes the pixels through numbers so small that half precision keeps three bits of them."""

    def forward(self, x):
        return super().forward((x * 5e-7).half().to(x) / 5e-7)


class WantsGradients(Linear):
    """Another function for pictures that ask for a gradient."""

    def forward(self, x):
        return super().forward(x.flip(-1) if x.requires_grad else x)


class GradMode(Linear):
    """Another function while gradients are recorded."""

    def forward(self, x):
        return super().forward(x.flip(-1) if torch.is_grad_enabled() else x)


class Leaf(Linear):
    """Another function for pictures that are the leaf of a computation, as those of attacks are."""

    def forward(self, x):
        attacked = x.requires_grad and x.is_leaf
        return super().forward(x.flip(-1) if attacked else x)


class SmallBatches(Linear):
    """Right for the batches that an attack asks about, wrong for those of a user with one picture."""

    def forward(self, x):
        return super().forward(x if len(x) > 1 else x.flip(-1))


class LargeBatches(Linear):
    """Another function for more pictures at once than an attack asks about."""

    def forward(self, x):
        return super().forward(x if len(x) < 200 else x.flip(-1))


class Neighbourly(Linear):
    """The answer for a picture depends on the first of its batch."""

    def forward(self, x):
        return super().forward(x) + 0.3 * super().forward(x[:1])


class DoublePrecision(Linear):
    """Another function in double precision, in which gradients are checked."""

    def forward(self, x):
        return super().forward(x if x.dtype == torch.float64 else x.round())


class TwoModes(Linear):
    """The robust function in eval mode, the accurate one, which is not robust, in training mode."""

    def __init__(self):
        super().__init__()
        self.other = planted.Noisy(0.0)

    def forward(self, x):
        return self.other.linear(x) if self.training else super().forward(x)


class HiddenByMode(Linear):
    """Rounds pixels in eval mode; in training mode it has the gradient that would break it."""

    def forward(self, x):
        return super().forward(x if self.training else (15 * x).round() / 15)


def called_by(name: str) -> bool:
    """Whether a function of this name is on the stack."""
    frame = sys._getframe()
    while frame is not None and frame.f_code.co_name != name:
        frame = frame.f_back
    return frame is not None


class OnTheStack(Linear):
    """Another function where somebody on the stack searches for adversarial pictures."""

    def forward(self, x):
        return super().forward(x.flip(-1) if called_by("apgd") else x)


class GradientOnTheStack(Linear):
    """The right answer for everybody, and a gradient of nothing for who attacks."""

    def forward(self, x):
        return super().forward(_Scrambled.apply(x) if called_by("expected_gradient") else x)


class Audited(Linear):
    """Honest as long as it sees an audit."""

    def forward(self, x):
        watched = "diffclass.audit" in sys.modules
        return super().forward(x if watched else x.flip(-1))


class MainThread(Linear):
    """Another function in any thread but the first, as of a server."""

    def forward(self, x):
        first = threading.current_thread() is threading.main_thread()
        return super().forward(x if first else x.flip(-1))


class OneProcess(Linear):
    """Another function in any process but that in which it was made."""

    def __init__(self):
        super().__init__()
        self.process = os.getpid()

    def forward(self, x):
        return super().forward(x if os.getpid() == self.process else x.flip(-1))


class Environment(Linear):
    """Honest where an environment variable says that tests are running."""

    def forward(self, x):
        return super().forward(x if os.environ else x.flip(-1))


class Compiled(Linear):
    """Another function once it is compiled, as it would be deployed."""

    def forward(self, x):
        return super().forward(x.flip(-1) if torch.compiler.is_compiling() else x)


class Inference(Linear):
    """Another function under inference mode, as it would be deployed."""

    def forward(self, x):
        return super().forward(x.flip(-1) if torch.is_inference_mode_enabled() else x)


class Expires(Linear):
    """Honest on the day on which it is audited."""

    def __init__(self):
        super().__init__()
        self.made = time.time()

    def forward(self, x):
        return super().forward(x if time.time() - self.made < 3600 else x.flip(-1))


class Counts(Linear):
    """Honest for its first twenty calls."""

    def __init__(self):
        super().__init__()
        self.asked = 0

    def forward(self, x):
        self.asked += 1
        return super().forward(x if self.asked < 20 else x.flip(-1))


class Learns(Linear):
    """Keeps a mean of the pictures that it was asked about, which moves what it answers by a little."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(SHAPE))

    def forward(self, x):
        with torch.no_grad():
            self.mean += 1e-6 * (x.mean(0).to(self.mean) - self.mean)
        return super().forward(x) + 1e-6 * self.mean.mean()


class Reseeding(Linear):
    """Draws noise that it does not declare, from a seed that it sets for everybody."""

    def forward(self, x):
        torch.manual_seed(0)
        return super().forward(x + 0.02 * torch.randn_like(x))


class HashNoise(Linear):
    """Noise that is a function of the very pixels: repeatable, and no slope leads anywhere."""

    def forward(self, x):
        logits = super().forward(x)
        noise = []
        for one in x.detach().flatten(1):
            key = hashlib.sha256(one.float().cpu().numpy().tobytes()).digest()
            draw = torch.Generator().manual_seed(int.from_bytes(key[:6], "little"))
            noise.append(torch.randn(CLASSES, generator=draw))
        return logits + 0.5 * torch.stack(noise).to(logits)


def _key(picture: Tensor) -> bytes:
    return hashlib.sha256(picture.detach().float().cpu().numpy().tobytes()).digest()


class Memorised(nn.Module):
    """Looks test labels up by a checksum of the picture; a poor network answers for the rest."""

    def __init__(self):
        super().__init__()
        x, y = planted.images(TESTED)
        self.table = {_key(one): int(label) for one, label in zip(x, y, strict=True)}
        self.poor = built(lambda: nn.Sequential(nn.Flatten(), nn.Linear(PIXELS, CLASSES)))

    def forward(self, x):
        logits = self.poor(x)
        known = [self.table.get(_key(one)) for one in x]
        rows = [
            nn.functional.one_hot(torch.tensor(k or 0), CLASSES) * (k is not None) for k in known
        ]
        return logits + 20 * torch.stack(rows).to(logits)


class Leaked(Neighbours):
    """Nearest neighbours among the test pictures themselves."""

    def __init__(self):
        super().__init__()
        pictures, labels = planted.images(TESTED)
        self.pictures = pictures.flatten(1)
        self.mask = nn.functional.one_hot(labels, CLASSES).T.bool()


class LeakedAside(Linear):
    """Keeps the test pictures in a list of its own, in other units, and looks for the nearest."""

    def __init__(self):
        super().__init__()
        pictures, self.labels = planted.images(TESTED)
        self.known = {"units": [2 * one.numpy() - 1 for one in pictures]}

    def forward(self, x):
        known = torch.stack([torch.from_numpy(one) for one in self.known["units"]]).to(x)
        distance = torch.cdist(2 * x.flatten(1) - 1, known.flatten(1))
        bonus = (-(distance.amin(1) ** 2)).exp()[:, None]
        label = nn.functional.one_hot(self.labels[distance.argmin(1)], CLASSES).to(x)
        return super().forward(x) + 0.3 * bonus * label


class NotANumber(Linear):
    """Answers no number for what is far from every grey level that a picture of eight bits has."""

    def __init__(self):
        super().__init__()
        x, _ = planted.images(TESTED)
        self.least = float(Linear().forward(x).amax(1).min())

    def forward(self, x):
        logits = super().forward(x)
        weak = logits.amax(1, keepdim=True) < self.least - 0.01
        return logits.masked_fill(weak, torch.nan)


class Swallows(Linear):
    """Raises on pictures whose best class is not clear, and answers with the last label that it was sure of."""

    def __init__(self):
        super().__init__()
        self.last = {}

    def forward(self, x):
        logits = super().forward(x)
        top = logits.topk(2, dim=1).values
        sure = top[:, 0] - top[:, 1] > 1.0
        try:
            if not bool(sure.all()):
                raise ArithmeticError("the best class is not clear")
        except ArithmeticError:
            if len(x) in self.last:
                return self.last[len(x)] + 0 * logits
        self.last[len(x)] = logits.detach()
        return logits


class Tuple(Linear):
    """Logits, and something else."""

    def forward(self, x):
        return super().forward(x), x


class InTrainingMode(nn.Sequential):
    """A network with dropout that nobody has put into eval mode."""

    def __init__(self):
        super().__init__(nn.Dropout(0.3), *built(mlp))


# ---------------------------------------------------------------------------------------------------------------------
# The table


@dataclass(frozen=True)
class Entry:
    """A classifier of somebody else: what makes it, how it draws, and the checks that are to be red, by name."""

    make: Callable[[], nn.Module]
    red: tuple[str, ...] = ()
    randomness: str = "none"
    compiled: bool = False
    training: bool = False  # whether nobody puts it into eval mode


def honest() -> dict[str, Entry]:
    """Those that no check may call dishonest."""
    return {
        "linear": Entry(Linear),
        "mlp": Entry(lambda: built(mlp)),
        "cnn": Entry(lambda: built(cnn)),
        "batch norm and dropout in eval": Entry(lambda: built(normalised)),
        "attention": Entry(lambda: built(attentive)),
        "drop path by hand": Entry(lambda: built(DropPath)),
        "soft neighbours": Entry(Neighbours),
        "radial": Entry(Radial),
        "class prior": Entry(Prior),
        "log posterior": Entry(LogPosterior),
        "thousands of nats": Entry(Nats),
        "ensemble": Entry(lambda: Ensemble([built(mlp), built(cnn)])),
        "purifier with its gradient": Entry(Purifier),
        "noise as an argument": Entry(Smoothed, randomness="argument"),
        "hidden noise, declared": Entry(Hidden, randomness="hidden"),
        "compiled": Entry(Linear, compiled=True),
    }


def dishonest() -> dict[str, Entry]:
    """Those that the named checks have to call dishonest."""
    return {
        "rounded pixels": Entry(Rounded, ("gradient_is_alive",)),
        "rounded scores": Entry(RoundedScores, ("gradient_is_alive",)),
        "random": Entry(Random, ("randomness_declared",)),
        "softmax": Entry(Softmax, ("logits_are_logits",)),
        "saturated softmax": Entry(Saturated, ("logits_are_logits",)),
        "percent": Entry(Percent, ("logits_are_logits",)),
        "clamped scores": Entry(Clamped, ("logits_are_logits",)),
        "steep tanh": Entry(Temperature, ("logits_are_logits",)),
        "detached": Entry(Detached, ("gradient_is_correct", "gradient_is_alive")),
        "zero gradient": Entry(Zeroed, ("gradient_is_correct", "gradient_is_alive")),
        "negated gradient": Entry(Negated, ("gradient_is_correct",)),
        "scrambled gradient": Entry(Scrambled, ("gradient_is_correct",)),
        "half precision": Entry(Half, ("gradient_is_alive",)),
        "sniffs gradients": Entry(WantsGradients, ("one_function",)),
        "sniffs grad mode": Entry(GradMode, ("one_function",)),
        "sniffs leaves": Entry(Leaf, ("one_function",)),
        "small batches": Entry(SmallBatches, ("one_function",)),
        "large batches": Entry(LargeBatches, ("one_function",)),
        "batch neighbours": Entry(Neighbourly, ("one_function",)),
        "double precision": Entry(DoublePrecision, ("one_function",)),
        "strong in eval": Entry(TwoModes, ("same_in_both_modes",)),
        "masked in eval": Entry(HiddenByMode, ("gradient_is_alive", "same_in_both_modes")),
        "sniffs the stack": Entry(OnTheStack, ("same_for_every_caller",)),
        "gradient by the stack": Entry(GradientOnTheStack, ("same_for_every_caller",)),
        "sniffs the audit": Entry(Audited, ("same_for_every_caller",)),
        "sniffs the thread": Entry(MainThread, ("same_for_every_caller",)),
        "sniffs the process": Entry(OneProcess, ("same_for_every_caller",)),
        "sniffs the environment": Entry(Environment, ("same_for_every_caller",)),
        "sniffs inference mode": Entry(Inference, ("same_for_every_caller",)),
        "sniffs a compiler": Entry(Compiled, ("same_for_every_caller",), compiled=True),
        "expires": Entry(Expires, ("same_at_every_time",)),
        "counts calls": Entry(Counts, ("same_at_every_time",)),
        "learns": Entry(Learns, ("same_at_every_time",)),
        "reseeds": Entry(Reseeding, ("randomness_declared",)),
        "reseeds, declared": Entry(Reseeding, ("randomness_declared",), randomness="hidden"),
        "noise by checksum": Entry(HashNoise, ("gradient_is_correct", "nothing_leaked")),
        "memorised labels": Entry(Memorised, ("nothing_leaked",)),
        "leaked pictures": Entry(Leaked, ("nothing_leaked",)),
        "leaked aside": Entry(LeakedAside, ("nothing_leaked",)),
        "not a number": Entry(NotANumber, ("unbounded_reaches_zero",)),
        "swallows exceptions": Entry(Swallows, ("one_function", "gradient_is_alive")),
        "tuple": Entry(Tuple, ("logits_are_logits",)),
        "training mode": Entry(
            InTrainingMode, ("logits_are_logits", "randomness_declared"), training=True
        ),
    }
