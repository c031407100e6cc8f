"""What a random classifier answers most often, and the mean of its logits, which an attack climbs in its place."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from diffclass import units
from diffclass.classifiers.base import Classifier, Noise, decided, joined, on_device_of
from diffclass.noise import generator_of


class MeanLogits(Classifier):
    """The mean of a random classifier's logits over several noises: differentiable, where votes are not.

    Formula     1/n sum_i f(x, noise_i)
    Shapes      x [B,C,H,W], noise [B or 1] of seeds -> [B,K]
    Randomness  one seed a picture, from which its noises are drawn one after the other; they are never held together
    Errors      ValueError for fewer than one draw, or a classifier without noise, whose draws would all be one
    """

    def __init__(self, classifier: Classifier, draws: int):
        super().__init__()
        if classifier.deterministic:
            raise ValueError(
                "expected a random classifier, got a deterministic one, whose draws are all the same."
            )
        draws = units.check_whole(draws, "draws")
        if draws < 1:
            raise ValueError(f"expected at least one draw, got {draws}.")
        self.classifier = classifier
        self.draws = draws
        self.num_classes = classifier.num_classes
        self.image_shape = classifier.image_shape
        self.sigma_pixel = classifier.sigma_pixel
        self.scale = classifier.scale

    def sample_noise(self, images: int, generator: torch.Generator) -> Tensor:
        """One seed for each picture. Shapes: -> [images]."""
        return torch.randint(2**62, (images,), generator=generator, device=generator.device)

    def each_draw(self, x: Tensor, seeds: Tensor) -> Iterator[Tensor]:
        """The logits under one noise after the other. Shapes: x [B,C,H,W], seeds [B or 1] -> `draws` times [B,K]."""
        for number in range(self.draws):
            noises = [
                self.classifier.sample_noise(1, generator_of(seed, number))
                for seed in seeds.tolist()
            ]
            yield self.classifier.logits(x, on_device_of(x, joined(noises)))

    def logits(self, x: Tensor, noise: Noise) -> Tensor:
        """See `Classifier.logits`."""
        return sum(self.each_draw(x, noise)) / self.draws

    def gradients(self) -> dict[str, Classifier]:
        """See `Classifier.gradients`: those of the classifier, averaged."""
        return {
            name: MeanLogits(other, self.draws)
            for name, other in self.classifier.gradients().items()
        }

    def surrogate(self) -> Classifier:
        """See `Classifier.surrogate`: the mean of the classifier's own, where that counts votes."""
        if self.classifier.gradients():
            return self
        return MeanLogits(self.classifier.surrogate(), self.draws)

    def routes(self) -> dict[str, Classifier]:
        """Those of the classifier, averaged over the same noises; one that has no noise stays as it is."""
        return {
            name: route if route.deterministic else MeanLogits(route, self.draws)
            for name, route in self.classifier.routes().items()
        }

    @property
    def level_counts(self) -> tuple[int, ...]:
        """Those of the classifier."""
        return self.classifier.level_counts

    def at_levels(self, count: int) -> "MeanLogits":
        """The mean of the classifier with another number of levels or steps."""
        return MeanLogits(self.classifier.at_levels(count), self.draws)

    @property
    def calls(self) -> int:
        """See `Classifier.calls`."""
        return self.draws * self.classifier.calls


class MajorityVote(Classifier):
    """What a random classifier says most often: counts of its votes, which have no gradient.

    Formula     counts_k = #{i <= votes: argmax f(x, noise_i) = k}; the first of equal classes wins
    Shapes      x [B,C,H,W], noise [B or 1] of seeds -> [B,K], rows sum to `votes`
    Why         one lucky draw no longer decides; an attack climbs `surrogate()`, the mean logits, and this one judges
    Randomness  that of `MeanLogits`
    Errors      those of `MeanLogits`, and of `decided` for logits that are not finite
    """

    scale = "votes"

    def __init__(self, classifier: Classifier, votes: int):
        super().__init__()
        self.mean = MeanLogits(classifier, votes)
        self.votes = self.mean.draws
        self.num_classes = classifier.num_classes
        self.image_shape = classifier.image_shape
        self.sigma_pixel = classifier.sigma_pixel

    def sample_noise(self, images: int, generator: torch.Generator) -> Tensor:
        """See `MeanLogits.sample_noise`."""
        return self.mean.sample_noise(images, generator)

    @torch.no_grad()
    def logits(self, x: Tensor, noise: Noise) -> Tensor:
        """See `Classifier.logits`."""
        counts = torch.zeros(len(x), self.num_classes, dtype=x.dtype, device=x.device)
        for drawn in self.mean.each_draw(x, noise):
            counts += nn.functional.one_hot(decided(drawn), self.num_classes).to(counts)
        return counts

    def gradients(self) -> dict[str, Classifier]:
        """None: votes have no gradient."""
        return {}

    def surrogate(self) -> Classifier:
        """The mean logits of the same noises."""
        return self.mean.surrogate()

    def routes(self) -> dict[str, Classifier]:
        """Those of the mean logits, which can be climbed."""
        return self.mean.routes()

    @property
    def level_counts(self) -> tuple[int, ...]:
        """Those of the classifier that votes."""
        return self.mean.level_counts

    def at_levels(self, count: int) -> "MajorityVote":
        """The votes of the classifier with another number of levels or steps."""
        return MajorityVote(self.mean.classifier.at_levels(count), self.votes)

    @property
    def calls(self) -> int:
        """See `Classifier.calls`."""
        return self.mean.calls
