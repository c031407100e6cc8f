"""One training loop, an iterator: progress, plotting and early stopping stay outside, and it resumes to the step.

A denoiser is trained by denoising (`denoising_loss`) or by copying another denoiser (`distillation_loss`).
"""

import copy
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffclass.denoisers.base import Denoiser

# What a loss is given: the denoiser, a batch of model-space images, their labels, and the generator of this step
Loss = Callable[[Denoiser, Tensor, Tensor, torch.Generator], Tensor]


def draw_sigma(count: int, generator: torch.Generator, log_mean: float = -0.8, log_std: float = 1.2,
               sigma_range: tuple[float, float] = (0.01, 80.0)) -> Tensor:
    """Training noise levels: ln sigma ~ N(log_mean, log_std^2), kept in the denoiser's range. Shapes: -> [B]."""
    return (log_mean + log_std * torch.randn(count, generator=generator)).exp().clamp(*sigma_range)


def _noised(denoiser: Denoiser, images: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    sigma = draw_sigma(len(images), generator, sigma_range=denoiser.sigma_range).to(images)
    eps = torch.randn(images.shape, generator=generator).to(images)
    weight = (sigma**2 + 0.25) / (0.25 * sigma**2)  # EDM's 1 / c_out^2: every level starts with a loss of about one
    return images + sigma[:, None, None, None] * eps, sigma, weight


def denoising_loss(denoiser: Denoiser, images: Tensor, labels: Tensor, generator: torch.Generator,
                   null_rate: float = 0.1) -> Tensor:
    """EDM's denoising loss under the true label; a share `null_rate` of the labels is withheld (the null class).

    Formula     mean over images and pixels of lambda(sigma) (D_y(x + sigma eps, sigma) - x)^2
    Source      Karras et al. 2022, equation 8; label dropout: Ho & Salimans 2022
    Shapes      images [B,C,H,W] in model space, labels [B] -> scalar
    """
    x_sigma, sigma, weight = _noised(denoiser, images, generator)
    dropped = torch.rand(len(labels), generator=generator).to(images.device) < null_rate
    labels = torch.where(dropped, denoiser.num_classes, labels)
    square = (denoiser.paired(x_sigma, sigma, labels) - images) ** 2
    return (weight[:, None, None, None] * square).mean()


def distillation_loss(teacher: Denoiser) -> Loss:
    """The loss that copies every head of `teacher`: the heads of wrong classes see every image.

    Formula     mean over images, classes (and "no class") and pixels of lambda(sigma) (D_k - teacher_k)^2
    Source      Chen et al. 2024 (RDC), multi-head diffusion
    """
    every = list(range(teacher.num_classes + 1))

    def loss(denoiser: Denoiser, images: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        x_sigma, sigma, weight = _noised(denoiser, images, generator)
        with torch.no_grad():
            wanted = teacher(x_sigma, sigma, every)
        square = (denoiser(x_sigma, sigma, every) - wanted) ** 2
        return (weight[:, None, None, None, None] * square).mean()

    return loss


@dataclass(frozen=True)
class Progress:
    """Where a training run stands: step of steps, its loss, images seen, seconds spent training in all."""

    step: int
    steps: int
    loss: float
    images: int
    seconds: float


class Training:
    """A run: iterate over it to train, stop whenever you like, iterate again (or make it again) to go on.

    Randomness  step i draws its batch, noise and levels from (seed, i) alone, so a resumed run equals an unbroken one
    Writes      `checkpoint`, a safetensors file with weights, average and optimiser state, every `save_every` steps
    """

    def __init__(self, denoiser: Denoiser, images: Tensor, labels: Tensor, *, loss: Loss = denoising_loss, steps: int,
                 batch: int = 256, rate: float = 2e-3, ema: float = 0.995, seed: int = 0,
                 checkpoint: str | Path | None = None, save_every: int = 100):
        self.denoiser, self.images, self.labels, self.loss = denoiser, images, labels, loss
        self.settings = dict(steps=steps, batch=batch, rate=rate, ema=ema, seed=seed, count=len(images))
        self.average = copy.deepcopy(denoiser).requires_grad_(False)
        self.optimiser = torch.optim.AdamW(denoiser.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=0.01)
        self.step, self.seconds = 0, 0.0
        self.checkpoint, self.save_every = Path(checkpoint) if checkpoint else None, save_every
        if self.checkpoint and self.checkpoint.exists():
            self._resume()

    def __iter__(self) -> Iterator[Progress]:
        steps = self.settings["steps"]
        try:
            while self.step < steps:
                started = time.perf_counter()
                value = self._one_step(steps)
                self.step += 1
                self.seconds += time.perf_counter() - started
                if self.checkpoint and (self.step % self.save_every == 0 or self.step == steps):
                    self.save()
                yield Progress(self.step, steps, value, self.step * self.settings["batch"], self.seconds)
        finally:  # an interrupted or abandoned run keeps what it has done
            if self.checkpoint and 0 < self.step < steps:
                self.save()

    def _one_step(self, steps: int) -> float:
        settings = self.settings
        generator = torch.Generator().manual_seed(settings["seed"] * 1_000_003 + self.step)
        chosen = torch.randint(len(self.images), (settings["batch"],), generator=generator).to(self.images.device)
        warm = min(1.0, (self.step + 1) / 20)
        for group in self.optimiser.param_groups:  # warm up, then fall linearly to a hundredth
            group["lr"] = settings["rate"] * warm * max(0.01, 1 - self.step / steps)
        self.denoiser.train()
        loss = self.loss(self.denoiser, self.images[chosen], self.labels[chosen], generator)
        if not torch.isfinite(loss):
            raise FloatingPointError(f"the loss became {float(loss.detach())} at step {self.step}; lower the rate "
                                     f"({settings['rate']:g}) and start again from the last checkpoint.")
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.denoiser.parameters(), 1.0)
        self.optimiser.step()
        keep = min(settings["ema"], (self.step + 1) / (self.step + 10))
        with torch.no_grad():
            for mean, value in zip(self.average.parameters(), self.denoiser.parameters(), strict=True):
                mean.lerp_(value, 1 - keep)
        return float(loss.detach())

    def save(self) -> None:
        """Write the checkpoint; the previous one survives an interruption."""
        tensors = {f"now.{n}": v for n, v in self.denoiser.state_dict().items()}
        tensors |= {f"average.{n}": v for n, v in self.average.state_dict().items()}
        for index, state in self.optimiser.state_dict()["state"].items():
            tensors |= {f"optimiser.{index}.{n}": torch.as_tensor(v) for n, v in state.items()}
        header = json.dumps(dict(settings=self.settings, step=self.step, seconds=self.seconds))
        self.checkpoint.parent.mkdir(parents=True, exist_ok=True)
        partial = self.checkpoint.with_suffix(".part")
        save_file({n: v.detach().cpu().contiguous().clone() for n, v in tensors.items()}, partial, {"run": header})
        partial.replace(self.checkpoint)

    def _resume(self) -> None:
        try:
            with safetensors.safe_open(self.checkpoint, framework="pt") as file:
                run = json.loads((file.metadata() or {}).get("run", "null"))
            tensors = load_file(self.checkpoint)
        except safetensors.SafetensorError as error:
            raise ValueError(f"expected a training checkpoint in {self.checkpoint.name}, got a damaged file ({error}); "
                             "delete it to start afresh.") from None
        differing = {k for k in self.settings if run is None or run["settings"].get(k) != self.settings[k]}
        if differing:
            raise ValueError(f"expected to resume {self.checkpoint.name} with the settings it was started with, but "
                             f"{sorted(differing)} differ; delete it to start afresh, or use the old settings.")
        own = self.denoiser.state_dict()
        if {n[4:] for n in tensors if n.startswith("now.")} != set(own) or any(
                tensors[f"now.{n}"].shape != v.shape for n, v in own.items()):
            raise ValueError(f"the checkpoint {self.checkpoint.name} holds another architecture; delete it to start afresh.")
        self.denoiser.load_state_dict({n: tensors[f"now.{n}"] for n in own})
        self.average.load_state_dict({n: tensors[f"average.{n}"] for n in own})
        state: dict[int, dict] = {}
        for name, value in tensors.items():
            if name.startswith("optimiser."):
                _, index, field = name.split(".")
                state.setdefault(int(index), {})[field] = value
        self.optimiser.load_state_dict({**self.optimiser.state_dict(), "state": state})
        self.step, self.seconds = run["step"], run["seconds"]
