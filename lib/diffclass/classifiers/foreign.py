"""Other people's modules as classifiers: the only place that looks at what a module is instead of asking it."""

import torch
from torch import Tensor, nn

from diffclass import units
from diffclass.classifiers.base import Classifier, Noise, check_logits

RANDOMNESS = ("none", "hidden", "argument")


class Foreign(Classifier):
    """A module of somebody else, from pixels in [0,1] to logits.

    Shapes      module(x [B,C,H,W]) -> [B,K], or module(x, noise) for randomness "argument"
    Randomness  "none": it draws nothing, or says so; "hidden": it draws from torch's global state or from generators of
                its own, which are rewound to a seed of ours and then go on as if uncalled, one picture at a time, as
                what it draws for a picture would depend on the pictures beside it; "argument": it has a `sample_noise`
                like ours
    Errors      ValueError for another kind of randomness; TypeError, ValueError for what is not logits [B,K]; see also
                `complaints`
    """

    scale = "scores"
    calls = 1

    def __init__(
        self,
        module: nn.Module,
        num_classes: int,
        image_shape: tuple[int, int, int],
        randomness: str = "none",
        sigma_pixel: float | None = None,
    ):
        super().__init__()
        if randomness not in RANDOMNESS:
            raise ValueError(
                f"expected randomness to be one of {', '.join(RANDOMNESS)}, got {randomness!r}."
            )
        if randomness == "argument" and not callable(getattr(module, "sample_noise", None)):
            raise ValueError(
                f"expected {type(module).__name__} to have sample_noise(images, generator), as its randomness is an "
                "argument, got a module without; say 'hidden' if it draws by itself."
            )
        self.module = module
        self.num_classes = units.check_class_count(num_classes)
        self.image_shape = tuple(image_shape)
        self.randomness = randomness
        self.sigma_pixel = sigma_pixel

    def complaints(self, x: Tensor) -> list[str]:
        """What speaks against measuring this module, one sentence each; the audit shows them, `evaluate` refuses.

        Shapes      x [B,C,H,W] in [0,1], a few pictures
        """
        problems = super().complaints(x)
        noise = self.sample_noise(len(x), torch.Generator().manual_seed(0))
        try:
            with torch.no_grad():
                logits = check_logits(self.logits(x, noise))
        except (TypeError, ValueError, FloatingPointError) as error:
            return [*problems, str(error)]
        sentence = flat_scores(logits) or clamped_scores(logits)
        return [*problems, sentence] if sentence else problems

    def sample_noise(self, images: int, generator: torch.Generator) -> Noise:
        """The module's own noise as an argument; of hidden noise, one seed for each picture."""
        if self.randomness == "argument":
            return self.module.sample_noise(images, generator)
        if self.randomness == "hidden":
            return torch.randint(2**62, (images,), generator=generator, device=generator.device)
        return ()

    def logits(self, x: Tensor, noise: Noise) -> Tensor:
        """See `Classifier.logits`."""
        return self._checked_logits(self._logits(x, noise), len(x))

    def _logits(self, x: Tensor, noise: Noise):
        if self.randomness == "argument":
            return self.module(x, noise)
        if self.randomness == "none":
            return self.module(x)
        pairs = zip(x.split(1), noise.expand(len(x)).tolist(), strict=True)
        return torch.cat([self._checked_logits(self._rewound(one, seed), 1) for one, seed in pairs])

    def _rewound(self, x: Tensor, seed: int):
        """One call with every generator that the module draws from set to a seed; all go on afterwards as if uncalled."""
        own = _generators(self.module)
        states = [generator.get_state() for generator in own]
        accelerators = [] if x.device.type == "cpu" else [x.device]
        with torch.random.fork_rng(accelerators, device_type=x.device.type):
            torch.set_rng_state(torch.Generator().manual_seed(seed).get_state())
            for device in accelerators:
                state = torch.Generator(device).manual_seed(seed).get_state()
                torch.get_device_module(device).set_rng_state(state, device)
            for generator in own:
                generator.manual_seed(seed)
            try:
                return self.module(x)
            finally:
                for generator, state in zip(own, states, strict=True):
                    generator.set_state(state)

    def _checked_logits(self, logits, images: int) -> Tensor:
        if not isinstance(logits, Tensor):
            raise TypeError(
                f"expected logits as a tensor, got {type(logits).__name__}; return the logits alone."
            )
        if not logits.is_floating_point():
            raise TypeError(
                f"expected logits of a floating-point dtype, got {str(logits.dtype).removeprefix('torch.')}; counts of "
                "votes and classes are no logits: return scores before the decision."
            )
        if tuple(logits.shape) != (images, self.num_classes):
            raise ValueError(
                f"expected logits of shape [{images},{self.num_classes}], got {list(logits.shape)}."
            )
        return logits


def are_probabilities(logits: Tensor) -> bool:
    """Whether rows look like probabilities: none negative, each of sum one. Shapes: [B,K]."""
    return _sum_to(logits, 1.0, 1e-4)


def flat_scores(logits: Tensor) -> str:
    """What is wrong with probabilities or percent in place of logits, in one sentence; "" for logits. Shapes: [B,K]."""
    if are_probabilities(logits):
        kind = "probabilities (none negative, each sum 1)"
    elif _sum_to(logits, 100.0, 0.1):
        kind = "percent, or counts of 100 votes (none negative, each sum 100)"
    else:
        return ""
    return f"expected logits, got rows of {kind}, on which attacks go flat; return what goes into the softmax."


def clamped_scores(logits: Tensor) -> str:
    """What is wrong with scores that a sigmoid or a clamp keeps in [0,1], in one sentence; "" for others.

    Shapes      [B,K] of a few pictures; a class whose logit is always 0, the one that others are compared with, says nothing
    Why         a tenth of such scores and more are at the ends of their range, where their slope vanishes; of logits that
                only happen to be in it, hardly any
    """
    scores = logits[:, (logits != 0).any(0)].detach()
    if not scores.numel() or float(scores.min()) < 0 or float(scores.max()) > 1:
        return ""
    at_the_ends = int(((scores < 0.01) | (scores > 0.99)).sum())
    if at_the_ends < max(2, scores.numel() / 10):
        return ""
    return (
        f"expected logits, got scores between {float(scores.min()):.3g} and {float(scores.max()):.3g}, as a sigmoid or a "
        "clamp to [0,1] leaves them, on which attacks go flat; return what goes into it."
    )


def _sum_to(logits: Tensor, total: float, tolerance: float) -> bool:
    """Whether no value is negative and each row has this sum, as far as the precision of the values goes."""
    rounding = 4 * total * torch.finfo(logits.dtype).eps
    sums = logits.detach().double().sum(1)
    return (
        len(logits) > 0
        and float(logits.min()) >= 0
        and bool(((sums - total).abs() < max(tolerance, rounding)).all())
    )


def _generators(module: nn.Module) -> list[torch.Generator]:
    problems = [
        value
        for part in module.modules()
        for value in vars(part).values()
        if isinstance(value, torch.Generator)
    ]
    return list({id(generator): generator for generator in problems}.values())
