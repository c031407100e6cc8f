"""JEM's training: a classifier whose log-sum-exp is also raised at data and lowered where its own chains stand."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from diffclass import units
from diffclass.classifiers.base import Noise
from diffclass.classifiers.joint import JointClassifier, uniform, walk
from diffclass.training.losses import Loss

# Beyond this loss a run has diverged. While all is well both of its parts are a few nats; once chains have found how to
# raise the density without end, the loss grows tenfold within a few steps, and then it is no number any more.
LIMIT = 100.0


@dataclass(frozen=True)
class Chains:
    """How the pictures are drawn that data are held against, as the paper has it.

    steps     of Langevin dynamics that each chosen chain makes for one step of training
    step      times the gradient of log p; noise: of every step. Both in model space: the temperature is 5e-5, not 1
    restart   share of the chosen chains that begin anew, from U(-1, 1)
    blur      standard deviation of the noise on data, in model space: a density of eight-bit values alone would be spikes
    weight    of the density beside the cross-entropy
    """

    steps: int = 20
    step: float = 1.0
    noise: float = 0.01
    restart: float = 0.05
    blur: float = 0.03
    weight: float = 1.0

    def __post_init__(self):
        if not 0 <= self.restart <= 1:
            raise ValueError(
                f"expected a share of chains that begin anew in [0, 1], got {self.restart}."
            )


def likelihood_gap(classifier: JointClassifier, data: Tensor, drawn: Tensor) -> Tensor:
    """A loss whose gradient is that of the mean negative log-likelihood, where `drawn` is distributed as the model.

    Formula     mean E(data) - mean E(drawn), E = -log sum_y exp f_y;  d/dw -log p(x) = dE(x)/dw - mean over p of dE/dw
    Source      Hinton 2002; Grathwohl et al. 2020, equation 2
    Shapes      both [B,C,H,W] in model space -> scalar, in nats
    """
    return classifier.log_density(drawn).mean() - classifier.log_density(data).mean()


def moved_chains(
    classifier: JointClassifier, count: int, chains: Chains, generator: torch.Generator
) -> Tensor:
    """Where so many chains of the replay stand after their next steps; the replay keeps it.

    Source      Du & Mordatch 2019: chains that go on from step to step of training, a few of them begun anew
    Shapes      -> [count,C,H,W] in model space
    Randomness  which chains, which begin anew and where, and their steps: from `generator`
    Errors      ValueError for more chains than the replay has
    """
    replay = classifier.replay
    if count > len(replay):
        raise ValueError(
            f"expected a batch of at most {len(replay)} images, one for each chain, got {count}; build more chains."
        )
    place = generator.device
    chosen = torch.randperm(len(replay), generator=generator, device=place)[:count].to(
        replay.device
    )
    anew = torch.rand(count, generator=generator, device=place) < chains.restart
    begun = uniform((count, *classifier.image_shape), generator).to(replay)
    start = torch.where(anew[:, None, None, None].to(replay.device), begun, replay[chosen])
    *_, end = walk(
        classifier.log_density, start, chains.steps, chains.step, chains.noise, generator
    )
    replay[chosen] = end
    return end


def joint_loss(chains: Chains) -> Loss:
    """Cross-entropy, and the likelihood of noised data against what the model's chains stand on.

    Formula     mean of -log softmax(f(x))_y + weight (mean E(x) - mean E(drawn)),  x = data + blur eps,
                E = -log sum_y exp f_y, drawn by `walk` from the chains of the replay
    Source      Grathwohl et al. 2020 (JEM), algorithm 1: log p(x, y) = log p(y | x) + log p(x)
    Shapes      images [B,C,H,W] in [0,1], labels [B] -> scalar
    Deviates    from the paper's WRN-28-10 with Adam at 1e-4: by the network, its activation, AdamW, the rate, the number
                of chains and the average, all of the recipe; chains, blur and weights of the loss are the paper's
    Fails       the training may diverge, as the paper says of its own: `limit` tells when, and a run then goes back
    """

    def draw(
        classifier: JointClassifier, images: Tensor, labels: Tensor, generator: torch.Generator
    ) -> Noise:
        drawn = moved_chains(classifier, len(images), chains, generator)
        eps = torch.randn(images.shape, generator=generator, device=generator.device)
        return drawn, eps.to(images)

    def value(classifier: JointClassifier, images: Tensor, labels: Tensor, noise: Noise) -> Tensor:
        drawn, eps = noise
        z = units.to_model(images) + chains.blur * eps
        # unchecked: blurred data leave the range of pixels, and a run that diverges is judged by its loss
        wrong = cross_entropy(classifier.logits(units.to_pixel(z), ()), labels)
        return wrong + chains.weight * likelihood_gap(classifier, z, drawn)

    return Loss(draw, value, limit=LIMIT)
