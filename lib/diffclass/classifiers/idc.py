"""IDC: a picture is translated into the image label of its class along a Brownian bridge, and the nearest label wins.

A network that has never heard of classes walks from the input towards one of the labels in a few noisy steps.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from diffclass import units
from diffclass.classifiers.base import Classifier, Noise
from diffclass.classifiers.bayes import check_level_count
from diffclass.classifiers.bridges import Bridge, check_apart, check_steps, distances, every_step
from diffclass.denoisers import network
from diffclass.storage import weights

TEMPERATURE = 0.1  # of the released attack head, softmax(-d / 0.1)


# ---------------------------------------------------------------------------------------------------------------------
# The network that estimates the label


class PrunedUNet(nn.Module):
    """IDC's U-Net for 32x32 pictures: 9.39 M parameters and 3.386 GMAC with widths (64, 256), as for CIFAR-10.

    Source      Mei et al. 2024 (IDC), Figure 5 and released code: one residual block a level, residual up- and
                down-sampling, scale-shift norms, attention in the middle only; (64, 256, 512) is that of CIFAR-100
    Shapes      x [B,C,H,W], log_odds [B], None -> [B,C,H,W]
    """

    def __init__(
        self,
        channels: int = 3,
        size: int = 32,
        widths: Sequence[int] = (64, 256),
        dropout: float = 0.3,
    ):
        super().__init__()
        # here, not above: it takes seconds and digits do not need it
        from diffusers import (
            UNet2DModel,
        )

        self.config = dict(widths=list(widths), dropout=dropout)
        self.unet = UNet2DModel(
            sample_size=size,
            in_channels=channels,
            out_channels=channels,
            layers_per_block=1,
            block_out_channels=tuple(widths),
            attention_head_dim=widths[-1] // 8,
            down_block_types=("ResnetDownsampleBlock2D",) * len(widths),
            dropout=dropout,
            up_block_types=("ResnetUpsampleBlock2D",) * len(widths),
            resnet_time_scale_shift="scale_shift",
        )

    def forward(self, x: Tensor, log_odds: Tensor, classes: None = None) -> Tensor:
        """One call of the network."""
        return self.unet(x, 1000 * log_odds.sigmoid()).sample


def _pruned(image_shape: Sequence[int], seed: int, **config) -> PrunedUNet:
    """The U-Net with weights N(0, 0.02^2) drawn from `seed`, as IDC's are."""
    # modules first fill themselves from the global generator
    with torch.random.fork_rng(devices=[]):
        net = PrunedUNet(image_shape[0], image_shape[1], **config)
    generator = torch.Generator().manual_seed(seed)
    for module in net.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.normal_(module.weight, std=0.02, generator=generator)
            nn.init.zeros_(module.bias)
    return net


def _small(name: str, image_shape: Sequence[int], seed: int, **config) -> nn.Module:
    """The digits' own network, or that on patches, with one head and no classes."""
    return network.build(
        "MultiHeadDenoiser", name, 1, tuple(image_shape), has_null=False, seed=seed, **config
    ).network


_NETWORKS = {
    "DigitNet": partial(_small, "DigitNet"),
    "PatchNet": partial(_small, "PatchNet"),
    "PrunedUNet": _pruned,
}


class Translator(nn.Module):
    """A network that estimates the label at the end of a bridge, and the labels that it was trained for.

    Formula     x0_hat = x_t - F(x_t, ln(m_t / (1 - m_t)))
    Source      Mei et al. 2024 (IDC): the network predicts the whole way back, O = x_t - x0
    Shapes      x_t [B,C,H,W] in model space, t a number or [B] -> [B,C,H,W] in model space, not clipped
    """

    def __init__(self, network: nn.Module, labels: Tensor, bridge: Bridge | None = None):
        super().__init__()
        self.network = network
        self.bridge = bridge or Bridge()
        self.register_buffer("labels", check_apart(labels))

    @property
    def num_classes(self) -> int:
        """K."""
        return len(self.labels)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return tuple(self.labels.shape[1:])

    def forward(self, x_t: Tensor, t: int | Tensor) -> Tensor:
        m = self.bridge.shares.to(x_t)[t].expand(len(x_t))
        return x_t - self.network(x_t, torch.logit(m), None)


# ---------------------------------------------------------------------------------------------------------------------
# The classifier


@dataclass(frozen=True)
class TranslationStep:
    """One network call on the way: position t, state x_t, the label as estimated from it (clipped), all model space.

    Shapes      x_t, estimate [B,C,H,W]; distances [B,K] of the estimate to the labels, in pixels
    """

    t: int
    x_t: Tensor
    estimate: Tensor
    distances: Tensor


class TranslationClassifier(Classifier):
    """Translate a picture and ask which label the translation is nearest to.

    Formula     x_T = 2x - 1;   x0_hat = clip(translator(x_t, t));   x_n ~ q(x_n | x_t, x0_hat) down to t = 0;
                logit_k(x) = -mean |P_hat - P_k| / temperature,   P_hat the last estimate in pixels
    Source      Mei et al. 2024 (IDC); softmax of these logits is the released attack head. They are scores, not
                log-probabilities: a perfect translation has a share of about one third in it
    Shapes      x [B,C,H,W] in [0,1], noise [B or 1,N-1,C,H,W] for N steps -> logits [B,K]
    Randomness  `sample_noise`: one noise for each step but the last (a single step has none); the released code evaluates with fresh noise
    """

    scale = "scores"

    def __init__(
        self,
        translator: Translator,
        steps: Sequence[int] | None = None,
        *,
        temperature: float = TEMPERATURE,
        eot: int = 1,
    ):
        super().__init__()
        if not temperature > 0:
            raise ValueError(
                f"expected a temperature > 0, got {temperature}; the released head uses 0.1."
            )
        self.translator = translator
        self.temperature = float(temperature)
        self.steps = check_steps(
            every_step(translator.bridge.steps) if steps is None else steps, translator.bridge
        )
        self.num_classes = translator.num_classes
        self.image_shape = translator.image_shape
        self.eot = eot

    def sample_noise(self, images: int, generator: torch.Generator) -> Noise:
        """See `Classifier.sample_noise`. Shapes: -> [images,N-1,C,H,W]; of a single step, which has no noise, ()."""
        if len(self.steps) == 1:
            return ()
        shape = (len(self.steps) - 1, images, *self.image_shape)
        return torch.randn(shape, generator=generator, device=generator.device).movedim(1, 0)

    def walk(self, x: Tensor, noise: Noise) -> Iterator[TranslationStep]:
        """The translation, one network call after another; the last estimate decides. Shapes: x [B,C,H,W] in [0,1]."""
        return self._walk(x, self.prepared(x, noise))

    def _walk(self, x: Tensor, noise: Noise) -> Iterator[TranslationStep]:
        x_t = units.to_model(x)
        labels = self.translator.labels.to(x)
        for i, t in enumerate(self.steps):
            estimate = self.translator(x_t, t).clamp(-1, 1)
            yield TranslationStep(t, x_t, estimate, distances(units.to_pixel(estimate), labels))
            if i + 1 < len(self.steps):
                mean, variance = self.translator.bridge.posterior(
                    x_t, estimate, t, self.steps[i + 1]
                )
                x_t = mean + variance.sqrt() * noise[:, i]

    def logits(self, x: Tensor, noise: Noise) -> Tensor:
        """See `Classifier.logits`."""
        *_, last = self._walk(x, noise)
        return -last.distances / self.temperature

    @property
    def level_counts(self) -> tuple[int, ...]:
        """Half of the steps; more than its bridge has, there are none."""
        fewer = (*self.steps[:-1:2], 0)
        return (len(fewer),) if fewer != self.steps else ()

    def at_levels(self, count: int) -> "TranslationClassifier":
        """The same translation with every other step left out."""
        check_level_count(self, count)
        fewer = (*self.steps[:-1:2], 0)
        return TranslationClassifier(
            self.translator, fewer, temperature=self.temperature, eot=self.eot
        )

    @property
    def calls(self) -> int:
        """See `Classifier.calls`."""
        return len(self.steps)

    def extra_repr(self) -> str:
        return f"steps={list(self.steps)}"


def classification_flops(classifier: TranslationClassifier) -> int:
    """FLOP of the layers with weights for one picture, all steps: what the paper counts, two for a multiply-add.

    Source      counted by torch while it classifies; 27.09 G for IDC on CIFAR-10. The two small products inside the
                middle attention (0.03 GMAC a call) have no weights and are left out, as they are there
    """
    like = next(classifier.parameters())
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        noise = classifier.sample_noise(1, torch.Generator().manual_seed(0))
        classifier(torch.zeros(1, *classifier.image_shape).to(like), noise)
    counts = counter.get_flop_counts()
    root = type(classifier).__name__
    return sum(
        sum(counts[f"{root}.{name}"].values())
        for name, layer in classifier.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d)
    )


# ---------------------------------------------------------------------------------------------------------------------
# Weights


def build(
    network: str, labels: Tensor, bridge: Bridge | None = None, seed: int = 0, **config
) -> Translator:
    """A fresh translator by its network's name around labels [K,C,H,W]. Randomness: weights from `seed`."""
    if network not in _NETWORKS:
        raise ValueError(
            f"expected one of {list(_NETWORKS)}, got {network!r}; was the file made by another version?"
        )
    return Translator(_NETWORKS[network](tuple(labels.shape[1:]), seed, **config), labels, bridge)


def save_translator(
    translator: Translator,
    path: str | Path,
    card: dict | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write weights, labels, architecture and model card as safetensors; old files survive an interruption."""
    net = translator.network
    own = {k: v for k, v in net.config.items() if k not in ("channels", "classes", "heads", "size")}
    architecture = dict(network=type(net).__name__, bridge=asdict(translator.bridge), **own)
    weights.save_weights(translator, architecture, path, card, dtype)


def load_translator(path: str | Path) -> tuple[Translator, dict]:
    """A translator and its model card from what `save_translator` wrote.

    Errors      those of `network.load_weights` and `network.filled`; ValueError for a network of another kind
    """
    path = Path(path)
    state, architecture, card = weights.load_weights(path)
    if "bridge" not in architecture or "labels" not in state:
        raise ValueError(
            f"expected {path.name} to hold a translator with its bridge and labels, got the architecture "
            f"{sorted(architecture)}; denoisers are read by `network.load_denoiser`."
        )
    bridge = Bridge(**architecture.pop("bridge"))
    translator = build(labels=state["labels"], bridge=bridge, **architecture)
    return weights.filled(translator, state, f"{architecture['network']} in {path.name}"), card
