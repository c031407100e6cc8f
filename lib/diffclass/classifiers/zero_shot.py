"""A text-to-image model as a classifier: which prompt explains a picture's latents best, for how many evaluations."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import interpolate
from torch.utils.flop_counter import FlopCounterMode

from diffclass import likelihood, noise, units
from diffclass.classifiers import racing
from diffclass.classifiers.base import Classifier, Noise
from diffclass.classifiers.bayes import check_level_count, check_prior, half_and_double
from diffclass.denoisers.latent import LatentModel, own_weight
from diffclass.noise import Levels, NoiseBank, Weighting

CHUNK = 32  # inputs of the network at once: a text-to-image network is large
DISTANCES = {"l1": torch.abs, "l2": torch.square}


@dataclass(frozen=True)
class Cost:
    """What a picture costs at most: network evaluations, and FLOP of one of them and of the encoder, two a multiply-add."""

    evaluations: int
    flop_each: int
    flop_encoding: int

    @property
    def flop(self) -> int:
        """FLOP of a picture, at most."""
        return self.evaluations * self.flop_each + self.flop_encoding

    def hours(self, pictures: int, flop_per_second: float) -> float:
        """How long so many pictures take at most, on a machine of this speed.

        Errors      those of `units.check_whole` and `units.check_number`
        """
        pictures = units.check_whole(pictures, "pictures", least=0)
        speed = units.check_number(flop_per_second, "FLOP a second", above=0)
        return pictures * self.flop / speed / 3600

    def __str__(self) -> str:
        return (
            f"at most {self.evaluations:,} network evaluations a picture, {self.flop_each:.3g} FLOP each, and "
            f"{self.flop_encoding:.3g} FLOP of encoding: {self.flop:.3g} FLOP a picture"
        )


class ZeroShotClassifier(Classifier):
    """Which class's prompts denoise a picture's latents best, the worst classes left out as the levels grow denser.

    Formula     z = encode(x);  score_k = mean over templates, G mean over the levels so far of  w_g sigma_g^2 ||eps -
                eps_k||_p^p, - ln prior_k;  eps - eps_k = (D_k(z + sigma eps, sigma) - z) / sigma;  logit_k = - score_k of
                the last stage that k was in, lowered below every class that outlived it, by as much as it lay behind then
    Source      Li et al. 2023 and its code: 500 of 1000 timesteps, w = 1 on the noise error, stages of 50 and 500, five
                classes kept after the first: 10 x 50 + 5 x 450 = 2750 evaluations of ten classes
    Shapes      x [B,3,H,W] in [0,1], resized where the autoencoder's pictures have another size -> [B,K]
    Units       "nats" of the latents' density for one stage, l2 and `noise.elbo_weight`; "scores" otherwise
    Randomness  `sample_noise`: one seed a picture, of which the noise of every level is drawn when it is asked for; the
                same for every class and template
    Gradient    through the encoder and every stage; who is left out is decided and not differentiated
    """

    def __init__(
        self,
        model: LatentModel,
        levels: Levels,
        counts: Sequence[int] | None = None,
        keep: Sequence[int] = (1,),
        weighting: Weighting = noise.even_noise_weight,
        *,
        distance: str = "l2",
        prior: Sequence[float] | None = None,
        image_shape: tuple[int, int, int] | None = None,
        chunk: int = CHUNK,
    ):
        super().__init__()
        self.num_classes = len(model.names)
        counts = (len(levels),) if counts is None else counts
        self.counts, self.keep = racing.check_stages(counts, keep, len(levels), self.num_classes)
        if self.counts[-1] != len(levels):
            raise ValueError(
                f"expected a last stage of all {len(levels)} levels, got {self.counts[-1]}; take a grid of as many levels."
            )
        model.denoiser.check_levels(levels.sigma)
        self.distance = units.chosen(distance, list(DISTANCES), "the distance")
        own = model.autoencoder.image_shape
        self.image_shape = own if image_shape is None else units.check_image_shape(image_shape)
        if self.image_shape[0] != own[0]:
            raise ValueError(
                f"expected pictures of {own[0]} channels, as the autoencoder takes, got the shape {list(self.image_shape)}; "
                "repeat a grey channel."
            )
        self.model = model
        self.levels = levels
        self.weighting = weighting
        self.chunk = units.check_whole(chunk, "chunk", least=1, most=likelihood.LARGEST)
        self.register_buffer("log_prior", check_prior(prior, self.num_classes))
        likelihoods = (noise.elbo_weight, noise.discrete_elbo_weight)
        plain = len(self.counts) == 1 and distance == "l2" and weighting in likelihoods
        self.scale = "nats" if plain else "scores"

    @classmethod
    def released(cls, model: LatentModel, **options) -> "ZeroShotClassifier":
        """As Li's code classifies CIFAR-10: 500 timesteps, 50 of them for all classes, the others for the best five, l1.

        Cost        K x 50 + 5 x 450 evaluations a template: 2750 for ten classes
        Why not     for a flow, which is no chain: Bayes' rule asks it with weighting=noise.elbo_weight and distance="l2"
        Errors      those of the class; ValueError for fewer than five classes
        """
        told = dict(counts=(50, 500), keep=(5, 1), distance="l1")
        return cls(model, model.denoiser.grid(500), **{**told, **options})

    # -----------------------------------------------------------------------------------------------------------------
    # The classifier

    def sample_noise(self, images: int, generator: torch.Generator) -> Tensor:
        """One seed for each picture. Shapes: -> [images]."""
        return torch.randint(2**62, (images,), generator=generator, device=generator.device)

    def encode(self, x: Tensor) -> Tensor:
        """The latents of pictures, differentiable: what an attack on the encoder alone moves. Shapes: [B,3,H,W] -> [B,c,h,w].

        Errors      those of `units.check_images`
        """
        self.checked(x)
        size = self.model.autoencoder.image_shape[1:]
        if tuple(x.shape[2:]) != tuple(size):
            x = interpolate(x, size, mode="bicubic", antialias=True).clamp(0, 1)
        return self.model.autoencoder.encode(x)

    def logits(self, x: Tensor, noise: Noise) -> Tensor:
        """See `Classifier.logits`."""
        return settled([*self._stages(x, noise)], x.dtype)

    def answer(self, x: Tensor, noise: Noise) -> racing.Answer:
        """What was found after each stage, with the evaluations spent on each picture: for an animation.

        Shapes      x [B,3,H,W] in [0,1], noise of B pictures or of one -> an `Answer` with its history
        Errors      those of the classifier
        """
        drawn = self.prepared(x, noise)
        alive = torch.ones(len(x), self.num_classes, dtype=torch.bool, device=x.device)
        spent = torch.zeros(len(x), dtype=torch.long, device=x.device)
        new = racing.stage_levels(len(self.levels), self.counts)
        history = []
        with torch.no_grad():
            for index, (estimates, left) in zip(new, self._stages(x, drawn), strict=True):
                spent = spent + len(index) * self.model.templates * alive.sum(1)
                alive = left
                history.append(racing.Answer(estimates, left, spent, torch.ones_like(left[:, 0])))
        return racing.answer(iter(history))

    def _stages(self, x: Tensor, seeds: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        z = self.encode(x)
        everyone = torch.ones(len(x), self.num_classes, dtype=torch.bool, device=x.device)

        def losses(index: Tensor, asked: Tensor) -> Tensor:
            # in pieces, as the noise of a batch at all levels would fill the memory
            each = [self.losses(z, seeds, piece, asked) for piece in index.split(self.chunk)]
            return torch.cat(each, -1)

        yield from racing.stages(
            losses, self.scores, everyone, len(self.levels), self.counts, self.keep
        )

    def losses(self, z: Tensor, seeds: Tensor, index: Tensor, asked: Tensor) -> Tensor:
        """Weighted errors of some levels for the classes asked for, under one noise; NaN for the others.

        Formula     w_g sigma_g^2 ||(D_k(z + sigma_g eps, sigma_g) - z) / sigma_g||_p^p, averaged over the templates
        Shapes      latents z [B,c,h,w], seeds [B] or [1], index [n] of the levels, asked [B,K] -> [B,K,n]
        """
        levels = self.levels.to(z.double())[index]
        power = {"l1": 1, "l2": 2}[self.distance]
        weights = self.weighting(self.levels.to(z.double()))[index] * levels.sigma ** (2 - power)
        return weights * self._errors(z, self.drawn(z, seeds, index), index, asked)

    def scores(self, sums: Tensor) -> Tensor:
        """What decides: summed losses less the log-prior, the smallest best. Shapes: [B,K] -> [B,K]."""
        return sums - self.log_prior.to(sums)

    def drawn(self, z: Tensor, seeds: Tensor, index: Tensor) -> Tensor:
        """The noise of some levels, each picture's from its own seed. Shapes: index [n] -> [n,1,B or 1,c,h,w]."""
        shape = tuple(z.shape[1:])
        each = [
            torch.stack(
                [
                    torch.randn(shape, generator=noise.generator_of(seed, level))
                    for seed in seeds.tolist()
                ]
            )
            for level in index.tolist()
        ]
        return torch.stack(each)[:, None].to(z)

    def _errors(self, z: Tensor, eps: Tensor, index: Tensor, asked: Tensor) -> Tensor:
        """||D_k - z||_p^p of the classes asked for, averaged over the templates; NaN for the others. Shapes: -> [B,K,n]."""
        levels = self.levels[index]
        columns = []
        for k in range(self.num_classes):
            rows = asked[:, k].nonzero().flatten()
            column = z.new_full((len(z), len(index)), math.nan, dtype=torch.float64)
            if len(rows):
                bank = NoiseBank(levels, eps if eps.shape[2] == 1 else eps[:, :, rows])
                prompts = range(k * self.model.templates, (k + 1) * self.model.templates)
                errors = likelihood.diffusion_errors(
                    self.model.denoiser,
                    z[rows],
                    bank,
                    prompts,
                    self.chunk,
                    DISTANCES[self.distance],
                )
                column = column.index_copy(0, rows, errors[..., 0].mean(1).double())
            columns.append(column)
        return torch.stack(columns, 1)

    # -----------------------------------------------------------------------------------------------------------------
    # What it costs, and for less

    @property
    def calls(self) -> int:
        """See `Classifier.calls`."""
        left = (self.num_classes, *self.keep[:-1])
        # not counts[j] - counts[j - 1]: a sub-grid of 50 levels has none of the 20 that were measured before
        new = racing.stage_levels(len(self.levels), self.counts)
        return self.model.templates * sum(k * len(n) for k, n in zip(left, new, strict=True))

    def cost(self) -> Cost:
        """What a picture costs at most, from one call of the network and one of the encoder: before anything is classified."""
        place = own_weight(self.model.autoencoder.vae).device
        picture = torch.full((1, *self.image_shape), 0.5, device=place)
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            with FlopCounterMode(display=False) as encoding:
                z = self.encode(picture)
            with FlopCounterMode(display=False) as each:
                self.model.denoiser(z, float(self.levels.sigma[0]), [0])
        return Cost(self.calls, each.get_total_flops(), encoding.get_total_flops())

    @property
    def level_counts(self) -> tuple[int, ...]:
        """Half and twice as many levels, the stages in proportion, where they stay apart."""
        return tuple(count for count in half_and_double(len(self.levels)) if self._fits(count))

    def _fits(self, count: int) -> bool:
        try:
            self.model.denoiser.grid(count)
        except ValueError:
            return False
        return len(set(self._proportional(count))) == len(self.counts)

    def _proportional(self, count: int) -> list[int]:
        return [max(1, before * count // len(self.levels)) for before in self.counts]

    def at_levels(self, count: int) -> "ZeroShotClassifier":
        """The same classifier with `count` levels of its denoiser's own grid."""
        check_level_count(self, count)
        return self.changed(
            levels=self.model.denoiser.grid(count), counts=self._proportional(count)
        )

    def changed(self, **options) -> "ZeroShotClassifier":
        """The same classifier with another model, levels, stages, weighting, distance, prior or chunk."""
        own = dict(
            model=self.model,
            levels=self.levels,
            counts=self.counts,
            keep=self.keep,
            weighting=self.weighting,
            distance=self.distance,
            prior=self.log_prior.exp().cpu(),
            image_shape=self.image_shape,
            chunk=self.chunk,
        )
        return ZeroShotClassifier(**{**own, **options})

    def extra_repr(self) -> str:
        return (
            f"{self.levels}, counts={self.counts}, keep={self.keep}, weighting={self.weighting.__name__}, "
            f"distance={self.distance!r}"
        )


def settled(history: list[tuple[Tensor, Tensor]], dtype: torch.dtype) -> Tensor:
    """Logits from the stages of an elimination: finite, and the later a class is left out, the larger.

    Formula     logit_k = - estimate_k for those of the last stage;  for those left out before it
                min over survivors of their logits - (estimate_k - the largest of the survivors' at that stage)
    Why         estimates of different stages are not comparable, and -inf has no gradient for an attack to climb
    Shapes      (estimates [B,K], alive [B,K]) of every stage -> [B,K]
    """
    logits = -history[-1][0].to(dtype)
    for stage in reversed(range(len(history) - 1)):
        estimates, left = history[stage]
        before = history[stage - 1][1] if stage else torch.ones_like(left)
        floor = logits.masked_fill(~left, math.inf).amin(1, keepdim=True)
        worst = estimates.masked_fill(~left, -math.inf).amax(1, keepdim=True)
        below = torch.nextafter(floor.detach(), torch.full_like(floor, -math.inf))
        behind = (floor - (estimates - worst).to(dtype)).minimum(below)
        logits = torch.where(before & ~left, behind, logits)
    return logits
