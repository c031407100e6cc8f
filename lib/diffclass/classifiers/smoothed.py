"""The smoothed classifier: the class that wins most often when Gaussian noise is added to the picture."""

from collections.abc import Iterator

import torch
from torch import Tensor

from diffclass import units
from diffclass.classifiers.base import Classifier, Noise, check_logits, decided, on_device_of, take
from diffclass.noise import generator_of

VOTE_BLOCK = 100  # votes that are drawn together, from one key


def smoothing_sigma(base: Classifier, sigma_pixel: float | None) -> float:
    """The one noise level of a smoothed classifier: that of its base, or the one it is told.

    Units       pixels in [0,1]
    Errors      ValueError where both are there and differ, or neither is; those of `units.check_sigma_pixel`
    """
    if base.sigma_pixel is None and sigma_pixel is None:
        raise ValueError(
            f"expected a smoothing noise sigma_pixel, as {type(base).__name__} has none of its own, got none."
        )
    if base.sigma_pixel is None:
        return units.check_sigma_pixel(sigma_pixel)
    if sigma_pixel is not None and not abs(sigma_pixel - base.sigma_pixel) <= 1e-9:
        raise ValueError(
            f"expected the noise that {type(base).__name__} was made for, sigma_pixel {base.sigma_pixel:g}, got "
            f"{sigma_pixel:g}; smoothing has one sigma."
        )
    return units.check_sigma_pixel(base.sigma_pixel)


def check_probabilities(classifier: Classifier) -> Classifier:
    """Return a classifier whose softmax is the probability of each class, as it says by `scale`, else raise a ValueError."""
    if classifier.scale != "nats":
        raise ValueError(
            f"expected a classifier whose logits are log-probabilities (nats), as soft votes average its probabilities, got "
            f"{type(classifier).__name__}, whose logits are {classifier.scale}; count its hard votes, by the bound anytime."
        )
    return classifier


class NoisedCopies(Classifier):
    """Mean logits over noised copies: what an attack climbs in place of the smoothed votes, which have no gradient.

    Formula     1/n sum_i f(x + sigma eps_i, noise_i)
    Source      Salman et al. 2019
    Shapes      x [B,C,H,W] in [0,1], noise [B or 1] of seeds -> [B,K]
    Randomness  one seed a picture; copies are drawn one after the other
    """

    def __init__(self, base: Classifier, sigma_pixel: float | None, draws: int):
        super().__init__()
        draws = units.check_whole(draws, "draws")
        if draws < 1:
            raise ValueError(f"expected at least one draw to average over, got {draws}.")
        self.base = base
        self.sigma = smoothing_sigma(base, sigma_pixel)
        self.draws = draws
        self.num_classes = base.num_classes
        self.image_shape = base.image_shape
        self.scale = base.scale

    def sample_noise(self, images: int, generator: torch.Generator) -> Tensor:
        """One seed for each picture. Shapes: -> [images]."""
        return torch.randint(2**62, (images,), generator=generator, device=generator.device)

    def drawn(self, seed: int, number: int, count: int) -> Noise:
        """The noise of `count` copies from the key (seed, number): that of the pixels, and the base's own.

        Why         drawn whole, on the CPU and in 32 bits, whatever part of it is asked for, where and how precisely
        """
        generator = generator_of(seed, number)
        eps = torch.randn((count, *self.image_shape), generator=generator, dtype=torch.float32)
        return eps, self.base.sample_noise(count, generator)

    def noised(self, x: Tensor, drawn: Noise) -> tuple[Tensor, Noise]:
        """The noised copies of one picture that some noise makes, as the base sees them, and the base's own noise.

        Shapes      [1,C,H,W], noise of n -> [n,C,H,W], noise of n
        """
        eps, noise = on_device_of(x, drawn)
        noised = x + self.sigma * eps
        # made for pictures: it never sees what no picture can hold
        if self.base.sigma_pixel is None:
            noised = noised.clamp(0, 1)
        return noised, noise

    def copies(self, x: Tensor, drawn: Noise) -> Tensor:
        """Logits of the noised copies of one picture. Shapes: [1,C,H,W], noise of n -> [n,K]."""
        return self.base.logits(*self.noised(x, drawn))

    def logits(self, x: Tensor, noise: Noise) -> Tensor:
        """See `Classifier.logits`."""
        seeds = noise.expand(len(x)).tolist()
        pairs = zip(x.split(1), seeds, strict=True)
        means = [self.copies(one, self.drawn(seed, 0, self.draws)).mean(0) for one, seed in pairs]
        return torch.stack(means)

    def gradients(self) -> dict[str, Classifier]:
        """See `Classifier.gradients`: those of the base, averaged."""
        return {
            name: NoisedCopies(other, self.sigma, self.draws)
            for name, other in self.base.gradients().items()
        }

    def surrogate(self) -> Classifier:
        """See `Classifier.surrogate`: the mean of the base's own, where that counts votes."""
        if self.base.gradients():
            return self
        return NoisedCopies(self.base.surrogate(), self.sigma, self.draws)

    @property
    def calls(self) -> int:
        """See `Classifier.calls`."""
        return self.draws * self.base.calls


class Smoothed(Classifier):
    """The votes of a classifier on noised copies of a picture: the function that a smoothing certificate is about.

    Formula     counts_k = #{i <= votes: argmax f(x + sigma eps_i, noise_i) = k}
    Source      Cohen et al. 2019
    Shapes      x [B,C,H,W] in [0,1], noise [B or 1] of seeds -> [B,K], rows sum to `votes`
    Units       sigma_pixel: the noise, in pixels of [0,1]; a base with a `sigma_pixel` of its own brings it
    Randomness  one seed a picture; votes come in whole blocks of 100, each from its own key, so that neither a batch
                size nor a resumed run changes a count
    Meaning     a base without a sigma of its own is asked about the clamped copies: clamping is part of the function
    """

    scale = "votes"

    def __init__(
        self, base: Classifier, sigma_pixel: float | None = None, votes: int = 100, draws: int = 16
    ):
        super().__init__()
        votes = units.check_whole(votes, "votes")
        if votes < 1:
            raise ValueError(f"expected at least one vote, got {votes}.")
        self.mean = NoisedCopies(base, sigma_pixel, draws)
        self.sigma = self.mean.sigma
        self.votes = votes
        self.num_classes = base.num_classes
        self.image_shape = base.image_shape

    def sample_noise(self, images: int, generator: torch.Generator) -> Tensor:
        """One seed for each picture. Shapes: -> [images]."""
        return self.mean.sample_noise(images, generator)

    def count(
        self, x: Tensor, seed: int, votes: int, *, together: int = VOTE_BLOCK
    ) -> Iterator[Tensor]:
        """The running counts of `billed_count` alone. Shapes: x [1,C,H,W] -> yields [K] of dtype long."""
        for counts, _ in self.billed_count(x, seed, votes, together=together):
            yield counts

    def billed_count(
        self, x: Tensor, seed: int, votes: int, *, together: int = VOTE_BLOCK
    ) -> Iterator[tuple[Tensor, int]]:
        """The votes on one picture, as running counts after every `together` of them; the last ones sum to `votes`.

        Shapes      x [1,C,H,W] -> yields [K] of dtype long, and the network calls that they took
        Randomness  block number b of 100 votes from the key (seed, b); how many are asked together changes no vote, but
                    for ties within rounding
        Errors      those of `units.check_images`; ValueError for several pictures or no votes; those of
                    `decided` for logits that are not finite and cannot vote
        """
        counts = torch.zeros(self.num_classes, dtype=torch.long)
        for logits, calls in self._asked(x, seed, votes, together):
            counts = counts + torch.bincount(decided(logits).cpu(), minlength=self.num_classes)
            yield counts.clone(), calls

    def billed_shares(
        self, x: Tensor, seed: int, votes: int, *, together: int = VOTE_BLOCK
    ) -> Iterator[tuple[Tensor, int]]:
        """The probabilities that the noised copies of one picture get, `together` at a time: soft votes.

        Shapes      x [1,C,H,W] -> yields [n,K] of dtype float64, rows sum to 1, and the network calls that all so far took
        Randomness  that of `billed_count`: the same copies under the same seed
        Errors      those of `billed_count`; ValueError for a classifier whose logits are no log-probabilities
        """
        check_probabilities(self.mean.base)
        for logits, calls in self._asked(x, seed, votes, together):
            yield check_logits(logits).cpu().double().softmax(1), calls

    @torch.no_grad()
    def _asked(
        self, x: Tensor, seed: int, votes: int, together: int
    ) -> Iterator[tuple[Tensor, int]]:
        """The base's logits of noised copies, `together` at a time, and the network calls so far."""
        self.checked(x)
        if len(x) != 1:
            raise ValueError(
                f"expected one image, got a batch of {len(x)}; a certificate is about one image at a time."
            )
        votes = units.check_whole(votes, "votes")
        if votes < 1:
            raise ValueError(f"expected at least one vote, got {votes}.")
        together = units.check_whole(together, "votes that are asked together", least=1)
        calls = 0
        for block, start in enumerate(range(0, votes, VOTE_BLOCK)):
            drawn = self.mean.drawn(seed, block, VOTE_BLOCK)
            wanted = min(VOTE_BLOCK, votes - start)
            for first in range(0, wanted, together):
                part = slice(first, min(first + together, wanted))
                noised, noise = self.mean.noised(x, take(drawn, part))
                logits, spent = self.mean.base.billed(noised, noise)
                calls += int(spent.sum())
                yield logits, calls

    @torch.no_grad()
    def logits(self, x: Tensor, noise: Noise) -> Tensor:
        """See `Classifier.logits`."""
        rows = []
        for one, seed in zip(x.split(1), noise.expand(len(x)).tolist(), strict=True):
            *_, counts = self.count(one, seed, self.votes)
            rows.append(counts)
        return torch.stack(rows).to(x)

    def gradients(self) -> dict[str, Classifier]:
        """None: votes have no gradient."""
        return {}

    def surrogate(self) -> Classifier:
        """Mean logits over noised copies."""
        return self.mean.surrogate()

    @property
    def calls(self) -> int:
        """See `Classifier.calls`."""
        return self.votes * self.mean.base.calls
