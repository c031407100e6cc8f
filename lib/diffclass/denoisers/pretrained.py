"""Networks that others trained, behind the one interface: timesteps and noise, v or x0 prediction vanish in here."""

import json
from pathlib import Path

import torch
from torch import Tensor, nn

from diffclass import noise
from diffclass.denoisers.base import Denoiser

PREDICTIONS = ("epsilon", "v_prediction", "sample")  # diffusers' names for noise, v and x0


class ScheduledDenoiser(Denoiser):
    """A network of a variance-preserving chain, asked at noise levels instead of timesteps.

    Formula     z = x_sigma / sqrt(1 + sigma^2) is the chain's image at the t with sigma_t = sigma; with a = 1/sqrt(1 +
                sigma^2), b = sigma a:  D = (z - b eps)/a,  D = a z - b v,  or the output itself for x0 prediction
    Source      Ho et al. 2020; Salimans & Ho 2022 for v
    Shapes      network(z [B,C,H,W], t [B], class_labels=[B] or None).sample -> [B,C,H,W]; t between two steps is
                interpolated in ln sigma
    """

    def __init__(
        self,
        network: nn.Module,
        betas: Tensor,
        predicts: str,
        num_classes: int,
        image_shape: tuple[int, int, int],
    ):
        super().__init__()
        if predicts not in PREDICTIONS:
            raise ValueError(
                f"expected a network that predicts one of {', '.join(PREDICTIONS)}, got {predicts!r}."
            )
        levels = noise.sigma_of_alpha_bar(noise.alpha_bar(torch.as_tensor(betas)))
        self.network = network
        self.predicts = predicts
        self.num_classes = num_classes
        self.image_shape = tuple(image_shape)
        # a network without classes answers the question without a class only
        self.has_null = num_classes == 0
        self.sigma_range = (float(levels[0]), float(levels[-1]))
        self.register_buffer("log_levels", levels.log().float())

    def timestep(self, sigma: Tensor) -> Tensor:
        """The time, between steps too, at which the chain has this noise level. Shapes: [B] -> [B]."""
        at = sigma.log().float().clamp(self.log_levels[0], self.log_levels[-1]).contiguous()
        right = torch.searchsorted(self.log_levels, at).clamp(1, len(self.log_levels) - 1)
        low = self.log_levels[right - 1]
        high = self.log_levels[right]
        return right - 1 + (at - low) / (high - low)

    def estimate(self, x_sigma: Tensor, sigma: Tensor, classes: Tensor) -> Tensor:
        """See `Denoiser.forward`."""
        times = len(classes)
        (images, own) = (len(x_sigma), self.image_shape)
        labels = classes.repeat(images) if self.num_classes else None
        signal = (1 + sigma**2).rsqrt().repeat_interleave(times)[:, None, None, None]
        spread = sigma.repeat_interleave(times)[:, None, None, None] * signal
        z = x_sigma.repeat_interleave(times, 0) * signal
        out = self.network(
            z, self.timestep(sigma).repeat_interleave(times).to(z), class_labels=labels
        ).sample
        x0 = {
            "epsilon": lambda: (z - spread * out) / signal,
            "v_prediction": lambda: signal * z - spread * out,
            "sample": lambda: out,
        }[self.predicts]()
        return x0.reshape(images, times, *own)


def from_diffusers(folder: str | Path) -> ScheduledDenoiser:
    """The denoiser in a pipeline folder of diffusers (DDPM, DDIM): its `unet` and what its `scheduler` says of it.

    Errors      FileNotFoundError or ValueError that says which part is missing or cannot be meant
    """
    from diffusers import DDPMScheduler, UNet2DModel  # here, not above: it takes seconds

    folder = Path(folder)
    for part in ("unet/config.json", "scheduler/scheduler_config.json"):
        if not (folder / part).exists():
            raise FileNotFoundError(
                f"expected a pipeline folder with {part}, found none in {folder.name}; a lone "
                "UNet2DModel does not say what it predicts, nor at which noise."
            )
    unet = (
        UNet2DModel.from_pretrained(folder / "unet", local_files_only=True)
        .eval()
        .requires_grad_(False)
    )
    settings = json.loads((folder / "scheduler/scheduler_config.json").read_text())
    scheduler = DDPMScheduler.from_config({k: v for k, v in settings.items() if k != "_class_name"})
    size = unet.config.sample_size
    channels = unet.config.in_channels
    height, width = (size, size) if isinstance(size, int) else size
    if unet.config.out_channels != channels:
        raise ValueError(
            f"expected a U-Net that returns its {channels} input channels, got "
            f"{unet.config.out_channels}; a learned variance is not read: keep its first half."
        )
    return ScheduledDenoiser(
        unet,
        scheduler.betas,
        scheduler.config.prediction_type,
        unet.config.num_class_embeds or 0,
        (channels, height, width),
    )
