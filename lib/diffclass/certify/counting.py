"""The only random step of a certificate: counting votes on noised copies. The arithmetic is in `certificates`."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from diffclass import units
from diffclass.certify.certificates import Votes


def count_votes(
    classifier: nn.Module,
    x: Tensor,
    sigma_pixel: float,
    n: int,
    generator: torch.Generator,
    batch: int = 250,
) -> Iterator[Tensor]:
    """Votes of `classifier` on x + sigma_pixel eps, as running counts after every batch.

    Formula     counts_k = #{i <= n: argmax f(x + sigma eps_i) = k}
    Source      Cohen et al. 2019, Algorithm 1 (SampleUnderNoise)
    Shapes      x [1,C,H,W] in [0,1] -> yields [K] of dtype long; the last one sums to n
    Randomness  `generator` draws eps; a random classifier draws its own noise for every vote, which keeps votes
                independent. The noise is not clipped: the certificate is about Gaussian noise.
    Errors      TypeError, ValueError for an image, noise level or number of votes that cannot be meant;
                FloatingPointError for logits that are NaN, whose argmax would be a vote for some class
    """
    units.check_images(x, classifier.image_shape)
    if len(x) != 1:
        raise ValueError(
            f"expected one image, got a batch of {len(x)}; a certificate is about one image at a time."
        )
    if min(n, batch) < 1:
        raise ValueError(
            f"expected at least one vote, in batches of at least one, got n={n}, batch={batch}."
        )
    sigma_pixel = float(units.check_sigma(sigma_pixel, "sigma_pixel"))
    counts = torch.zeros(classifier.num_classes, dtype=torch.long)
    for start in range(0, n, batch):
        size = min(batch, n - start)
        eps = torch.randn((size, *x.shape[1:]), generator=generator, dtype=x.dtype).to(x.device)
        with torch.no_grad():
            logits = classifier(x + sigma_pixel * eps)
        if bool(torch.isnan(logits).any()):
            raise FloatingPointError(
                "the classifier's logits became NaN on noised images (sigma_pixel "
                f"{sigma_pixel:g}) and cannot vote; infinity minus infinity or 0/0 in it is the "
                "likely cause."
            )
        counts = counts + torch.bincount(logits.argmax(1).cpu(), minlength=len(counts))
        yield counts.clone()


def draw_votes(
    classifier: nn.Module,
    x: Tensor,
    sigma_pixel: float,
    *,
    selection: int = 100,
    estimation: int = 1000,
    seed: int = 0,
    batch: int = 250,
) -> Iterator[tuple[int, Votes | None]]:
    """The two independent counts of Cohen's Algorithm 1: one to guess the class, another to bound its probability.

    Shapes      x [1,C,H,W] -> yields (votes counted so far, None), and at the end (all, `Votes`)
    Randomness  the noised copies all from `seed`; a random classifier's own noise from its own generator
    Errors      those of `count_votes`
    """
    generator = torch.Generator().manual_seed(seed)
    done = 0
    counts = []
    for wanted in (selection, estimation):
        running = None
        for running in count_votes(classifier, x, sigma_pixel, wanted, generator, batch):
            yield done + int(running.sum()), None
        done += wanted
        counts.append(tuple(running.tolist()))
    yield done, Votes(counts[0], counts[1], sigma_pixel, seed)
