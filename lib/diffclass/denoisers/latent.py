"""Diffusion in the latents of an autoencoder: its pictures, its prompts, and its networks behind the one interface.

Prompts are classes here: the network of a pipeline, called with the text of each, is what a `ScheduledDenoiser` or a
`FlowDenoiser` asks about a class.
"""

from collections.abc import Sequence
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from diffclass import units
from diffclass.denoisers.base import Denoiser

FLOW_STEPS = 1000  # what a time in (0,1) is multiplied by before these networks embed it


class Autoencoder(nn.Module):
    """Pictures <-> the latents that a diffusion model was trained on.

    Formula     z = (mode of q(z | 2x - 1) - shift) * scale,  x = (decoder(z / scale + shift) + 1) / 2
    Source      Rombach et al. 2022 for the scale; Esser et al. 2024 for the shift
    Shapes      pixels [B,3,H,W] in [0,1] <-> latents [B,c,h,w]; latent_shape (c,h,w)
    Randomness  none: the mean of the encoder's Gaussian, not a sample of it
    Errors      ValueError for statistics of latents that the config names and this course does not read, or a latent shape
                of other channels
    """

    def __init__(self, vae: nn.Module, latent_shape: tuple[int, int, int]):
        super().__init__()
        config = vae.config
        unread = [name for name in ("latents_mean", "latents_std") if config.get(name) is not None]
        if unread:
            raise ValueError(
                f"expected latents that a scale and a shift make, got an autoencoder with {' and '.join(unread)}; pipelines "
                "use them in several ways, and none is read here."
            )
        if latent_shape[0] != config.latent_channels:
            raise ValueError(
                f"expected latents of {config.latent_channels} channels, as the autoencoder makes them, got a network for "
                f"{latent_shape[0]}; inpainting and depth networks take more than a picture, and are not read."
            )
        self.vae = vae
        self.scale = units.check_number(config.scaling_factor, "scaling_factor", above=0)
        shift = config.get("shift_factor")
        self.shift = 0.0 if shift is None else units.check_number(shift, "shift_factor")
        self.latent_shape = tuple(latent_shape)
        factor = 2 ** (len(config.block_out_channels) - 1)
        self.image_shape = (config.in_channels, *(factor * side for side in latent_shape[1:]))

    def encode(self, x: Tensor) -> Tensor:
        """The latents of pictures, differentiable. Shapes: [B,C,H,W] in [0,1] -> [B,c,h,w].

        Errors      those of `units.check_images`, and for half precision on a CPU
        """
        units.check_images(x, self.image_shape)
        own = own_weight(self.vae)
        z = units.to_model(x).to(own)
        return (self.vae.encode(z).latent_dist.mode().to(x) - self.shift) * self.scale

    def decode(self, latents: Tensor) -> Tensor:
        """The pictures of latents, not clamped. Shapes: [B,c,h,w] -> [B,C,H,W], about [0,1].

        Errors      those of `encode`
        """
        units.check_images(latents, self.latent_shape, pixel_range=False)
        own = own_weight(self.vae)
        return units.to_pixel(
            self.vae.decode((latents / self.scale + self.shift).to(own)).sample.to(latents)
        )


class Haar(nn.Module):
    """An autoencoder that loses nothing: of every patch of 2x2 pixels its sum and three differences, halved.

    Formula     z = H p of the four pixels p of a patch,  H H^T = I
    Why         lengths stay what they are, and so do Gaussians: a law that is known of pictures is known of latents
    Source      Haar 1910, one step of it
    Shapes      as diffusers' `AutoencoderKL` is called: encode(z [B,C,H,W]).latent_dist.mode() [B,4C,H/2,W/2], and
                decode(latents).sample back; H and W even
    """

    def __init__(self, channels: int = 1, scaling_factor: float = 1.0):
        from diffusers.configuration_utils import FrozenDict  # here, not above: it takes seconds

        super().__init__()
        self.config = FrozenDict(
            in_channels=channels,
            latent_channels=4 * channels,
            block_out_channels=(4 * channels,) * 2,
            scaling_factor=scaling_factor,
        )
        signs = torch.tensor([[1, 1, 1, 1], [1, 1, -1, -1], [1, -1, 1, -1], [1, -1, -1, 1]])
        self.axes = nn.Parameter(signs.double() / 2, requires_grad=False)

    def encode(self, z: Tensor) -> SimpleNamespace:
        """The differences of every patch, without a spread: a Gaussian of no width."""
        patches = pixel_unshuffle(z, 2).unflatten(1, (-1, 4))
        turned = torch.einsum("ij,bcjhw->bcihw", self.axes, patches).flatten(1, 2)
        return SimpleNamespace(latent_dist=SimpleNamespace(mode=lambda: turned))

    def decode(self, latents: Tensor) -> SimpleNamespace:
        """The pixels again."""
        patches = torch.einsum("ij,bcihw->bcjhw", self.axes, latents.unflatten(1, (-1, 4)))
        return SimpleNamespace(sample=pixel_shuffle(patches.flatten(1, 2), 2))


def own_weight(network: nn.Module) -> Tensor:
    """A weight of a network, whose device and precision its inputs take.

    Errors      ValueError for half precision on a CPU, where layers have no kernels or lose what a loss is made of
    """
    own = next(network.parameters())
    if own.dtype == torch.float16 and own.device.type == "cpu":
        raise ValueError(
            "expected a precision that a CPU computes in, got half precision (fp16); load it in fp32 or bf16, or move it to "
            "an accelerator first."
        )
    return own


class PromptedUNet(nn.Module):
    """A text-conditional U-Net whose classes are prompts, as `ScheduledDenoiser` calls it.

    Shapes      texts [K or K+1,L,D], one a prompt, then that of ""; (z [N,C,H,W], t [N], class_labels [N]).sample -> [N,C,H,W]
    """

    def __init__(self, unet: nn.Module, texts: Tensor):
        super().__init__()
        self.unet = unet
        self.register_buffer("texts", texts)

    def forward(self, z: Tensor, t: Tensor, class_labels: Tensor) -> SimpleNamespace:
        """One call of the network."""
        own = own_weight(self.unet)
        texts = self.texts.to(own)[class_labels.to(own.device)]
        answer = self.unet(z.to(own), t.to(own), encoder_hidden_states=texts).sample
        return SimpleNamespace(sample=answer.to(z))


class LabelledTransformer(nn.Module):
    """A class-conditional transformer (DiT), as `ScheduledDenoiser` calls it.

    Shapes      ids [K+1], its own number of each class, then that of "no class"; as `PromptedUNet`. A learned variance,
                the second half of its channels, is left out
    """

    def __init__(self, transformer: nn.Module, ids: Tensor):
        super().__init__()
        self.transformer = transformer
        self.register_buffer("ids", ids)

    def forward(self, z: Tensor, t: Tensor, class_labels: Tensor) -> SimpleNamespace:
        """One call of the network."""
        own = own_weight(self.transformer)
        labels = self.ids.to(own.device)[class_labels.to(own.device)]
        answer = self.transformer(z.to(own), timestep=t.to(own), class_labels=labels).sample
        return SimpleNamespace(sample=answer[:, : z.shape[1]].to(z))


class PromptedVelocity(nn.Module):
    """The transformer of Stable Diffusion 3, whose classes are prompts, as `FlowDenoiser` calls it.

    Shapes      texts [K+1,L,D], pooled [K+1,E]; (x_t [N,C,H,W], t [N] in (0,1), classes [N]) -> [N,C,H,W]
    """

    def __init__(self, transformer: nn.Module, texts: Tensor, pooled: Tensor):
        super().__init__()
        self.transformer = transformer
        self.register_buffer("texts", texts)
        self.register_buffer("pooled", pooled)

    def forward(self, x_t: Tensor, t: Tensor, classes: Tensor) -> Tensor:
        """One call of the network."""
        own = own_weight(self.transformer)
        asked = classes.to(own.device)
        answer = self.transformer(
            hidden_states=x_t.to(own),
            timestep=(FLOW_STEPS * t).to(own),
            encoder_hidden_states=self.texts.to(own)[asked],
            pooled_projections=self.pooled.to(own)[asked],
        ).sample
        return answer.to(x_t)


class PackedVelocity(nn.Module):
    """The transformer of Flux, which takes patches of 2x2 latents as a sequence, as `FlowDenoiser` calls it.

    Shapes      as `PromptedVelocity`; H and W are even
    """

    def __init__(self, transformer: nn.Module, texts: Tensor, pooled: Tensor):
        super().__init__()
        self.transformer = transformer
        self.register_buffer("texts", texts)
        self.register_buffer("pooled", pooled)

    def forward(self, x_t: Tensor, t: Tensor, classes: Tensor) -> Tensor:
        """One call of the network, which multiplies t by 1000 itself."""
        own = own_weight(self.transformer)
        asked = classes.to(own.device)
        patches = pixel_unshuffle(x_t.to(own), 2)
        height, width = patches.shape[2:]
        rows = torch.arange(height, device=own.device).repeat_interleave(width)
        columns = torch.arange(width, device=own.device).repeat(height)
        places = torch.stack([torch.zeros_like(rows), rows, columns], 1).to(own)
        texts = self.texts.to(own)[asked]
        answer = self.transformer(
            hidden_states=patches.flatten(2).transpose(1, 2),
            timestep=t.to(own),
            encoder_hidden_states=texts,
            pooled_projections=self.pooled.to(own)[asked],
            img_ids=places,
            txt_ids=places.new_zeros(texts.shape[1], 3),
        ).sample
        return pixel_shuffle(answer.transpose(1, 2).unflatten(2, (height, width)), 2).to(x_t)


class LatentModel(nn.Module):
    """A diffusion model of latents, the autoencoder before it, and the classes that its prompts name.

    Shapes      denoiser of K x templates prompts, those of a class one after the other; names of K classes
    Errors      ValueError for prompts that do not match the classes, or latents that do not fit
    """

    def __init__(
        self,
        denoiser: Denoiser,
        autoencoder: Autoencoder,
        names: Sequence[str],
        templates: int = 1,
    ):
        super().__init__()
        names = check_names(names)
        templates = units.check_whole(templates, "templates", least=1)
        if denoiser.num_classes != len(names) * templates:
            raise ValueError(
                f"expected {templates} prompts for each of {len(names)} classes, {len(names) * templates} in all, got a "
                f"denoiser of {denoiser.num_classes}; make the prompts and the classes from the same list of names."
            )
        if tuple(denoiser.image_shape) != autoencoder.latent_shape:
            raise ValueError(
                f"expected a denoiser of the autoencoder's latents, {list(autoencoder.latent_shape)}, got one of "
                f"{list(denoiser.image_shape)}."
            )
        self.denoiser = denoiser
        self.autoencoder = autoencoder
        self.names = names
        self.templates = templates

    def with_denoiser(self, denoiser: Denoiser) -> "LatentModel":
        """The same model with another denoiser, such as an adapted one. Errors: those of the class."""
        return LatentModel(denoiser, self.autoencoder, self.names, self.templates)


def check_names(names: Sequence[str]) -> tuple[str, ...]:
    """Return the names of two classes or more, all of them different texts, else raise.

    Errors      TypeError for one text in place of several, or what is no text; ValueError for fewer, empty or equal ones
    """
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise TypeError(
            f"expected the names of classes as a list of texts, got {names!r:.60}; pass ['cat', 'dog']."
        )
    if not all(isinstance(name, str) for name in names):
        other = next(name for name in names if not isinstance(name, str))
        raise TypeError(f"expected the names of classes as texts, got {other!r:.60} among them.")
    units.check_class_count(len(names))
    same = sorted({name for name in names if names.count(name) > 1 or not name.strip()})
    if same:
        raise ValueError(
            f"expected names that tell the classes apart, got {same[0]!r} twice or empty; two classes of one prompt have one "
            "loss."
        )
    return tuple(names)


def prompts_of(names: Sequence[str], templates: Sequence[str]) -> tuple[str, ...]:
    """Every template filled with every name, those of a class one after the other.

    Shapes      K names, P templates, each with one {} -> K * P prompts
    Errors      those of `check_names`; TypeError, ValueError for templates that name no class
    """
    names = check_names(names)
    if isinstance(templates, str) or not isinstance(templates, Sequence) or not len(templates):
        raise TypeError(
            f"expected templates as a list of texts, got {templates!r:.60}; pass ['a photo of a {{}}.']."
        )
    for template in templates:
        if not isinstance(template, str) or template.count("{}") != 1:
            raise ValueError(
                f"expected templates with one {{}} for the name of the class, got {template!r:.60}; without it every class "
                "has the same prompt."
            )
    return tuple(template.replace("{}", name) for name in names for template in templates)
