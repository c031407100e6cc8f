"""The networks inside the learned denoisers: F(c_in x, ln sigma, classes or None) -> [B, heads * C, H, W]."""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import (
    avg_pool2d,
    interpolate,
    pixel_shuffle,
    pixel_unshuffle,
    scaled_dot_product_attention,
    silu,
)

WIDENING = 4  # channels of the embedding of level and class, over those of the first layer
ROOT_HALF = 0.5**0.5  # the sum of a block and its skip keeps the variance


class DigitNet(nn.Module):
    """A residual convolutional network for 8x8 digits, small enough to be trained in front of the reader.

    Shapes      x [B,C,H,W], log_sigma [B], classes [B] or None -> [B, heads*C, H, W]
    """

    def __init__(
        self,
        channels: int = 1,
        classes: int = 0,
        heads: int = 1,
        width: int = 48,
        blocks: int = 4,
        size: int = 8,
    ):
        super().__init__()
        self.config = dict(
            channels=channels, classes=classes, heads=heads, width=width, blocks=blocks, size=size
        )
        self.register_buffer("frequencies", torch.linspace(0.25, 4.0, 16))
        self.embed = nn.Sequential(nn.Linear(32, width), nn.SiLU(), nn.Linear(width, width))
        self.classes = nn.Embedding(classes, width) if classes else None
        self.enter = nn.Conv2d(channels, width, 3, padding=1)
        # where a stroke is matters on an 8x8 grid
        self.place = nn.Parameter(torch.zeros(1, width, size, size))
        self.blocks = nn.ModuleList(_Block(width) for _ in range(blocks))
        self.leave = nn.Sequential(
            nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, heads * channels, 3, padding=1)
        )
        nn.init.zeros_(self.leave[-1].weight)
        nn.init.zeros_(self.leave[-1].bias)

    def forward(self, x: Tensor, log_sigma: Tensor, classes: Tensor | None) -> Tensor:
        """One call of the network."""
        angles = log_sigma[:, None] * self.frequencies
        condition = self.embed(torch.cat([angles.sin(), angles.cos()], 1))
        if self.classes is not None:
            condition = condition + self.classes(classes)
        h = self.enter(x) + self.place
        for block in self.blocks:
            h = block(h, condition)
        return self.leave(h)


class _Block(nn.Module):
    """A residual block whose channels are scaled and shifted by the condition."""

    def __init__(self, width: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(8, width)
        self.norm2 = nn.GroupNorm(8, width)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.modulate = nn.Linear(width, 2 * width)

    def forward(self, h: Tensor, condition: Tensor) -> Tensor:
        """h [B,width,H,W], condition [B,width] -> [B,width,H,W]."""
        scale, shift = self.modulate(nn.functional.silu(condition))[:, :, None, None].chunk(2, 1)
        inner = self.conv1(nn.functional.silu(self.norm1(h)))
        inner = self.conv2(nn.functional.silu(self.norm2(inner) * (1 + scale) + shift))
        return h + inner


class PatchNet(nn.Module):
    """The digits' network on the patches of a photograph: live on a laptop, and trained on a CPU in an hour.

    Source      space-to-depth, Shi et al. 2016: patches of 4x4 pixels become the channels of an 8x8 grid, and back
    Shapes      x [B,C,H,W], log_sigma [B], classes [B] or None -> [B, heads*C, H, W]
    """

    def __init__(
        self,
        channels: int = 3,
        classes: int = 0,
        heads: int = 1,
        width: int = 128,
        blocks: int = 6,
        size: int = 32,
        patch: int = 4,
    ):
        super().__init__()
        self.config = dict(
            channels=channels,
            classes=classes,
            heads=heads,
            width=width,
            blocks=blocks,
            size=size,
            patch=patch,
        )
        self.patch = patch
        self.inner = DigitNet(channels * patch**2, classes, heads, width, blocks, size // patch)

    def forward(self, x: Tensor, log_sigma: Tensor, classes: Tensor | None) -> Tensor:
        """One call of the network."""
        return pixel_shuffle(
            self.inner(pixel_unshuffle(x, self.patch), log_sigma, classes), self.patch
        )


class UNet(nn.Module):
    """`diffusers.UNet2DModel` as F(x, ln sigma, classes): its timestep is 250 ln sigma, its null class the last.

    Source      EDM's c_noise = ln(sigma)/4, in the units of a positional embedding for t in 0..1000; patches of pixels
                as channels (space-to-depth), Shi et al. 2016: a quarter of the work for patches of 2x2
    Shapes      x [B,C,H,W], log_sigma [B], classes [B] or None -> [B, heads*C, H, W]
    Errors      ValueError for a patch that does not divide the picture
    """

    def __init__(
        self,
        channels: int = 3,
        classes: int = 0,
        heads: int = 1,
        size: int = 32,
        widths: tuple[int, ...] = (64, 128, 128),
        layers: int = 2,
        attention: bool = True,
        dropout: float = 0.0,
        patch: int = 1,
    ):
        super().__init__()
        if patch < 1 or size % patch:
            raise ValueError(
                f"expected a patch that divides a picture of {size}x{size} pixels, got {patch}; "
                "were the weights made for pictures of another size?"
            )
        # here, not above: it takes seconds and digits do not need it
        from diffusers import UNet2DModel

        self.config = dict(
            channels=channels,
            classes=classes,
            heads=heads,
            size=size,
            widths=list(widths),
            layers=layers,
            attention=attention,
            dropout=dropout,
            patch=patch,
        )
        self.patch = patch
        plain = ["DownBlock2D"] * len(widths)
        attentive = ["UpBlock2D"] * len(widths)
        if attention and len(widths) > 1:
            plain[1] = "AttnDownBlock2D"
            attentive[-2] = "AttnUpBlock2D"
        self.unet = UNet2DModel(
            sample_size=size // patch,
            in_channels=channels * patch**2,
            out_channels=heads * channels * patch**2,
            block_out_channels=tuple(widths),
            layers_per_block=layers,
            down_block_types=tuple(plain),
            up_block_types=tuple(attentive),
            dropout=dropout,
            attention_head_dim=min(64, *widths),
            # one channel a group would erase the embedding of level and class, a shift by channel
            norm_num_groups=min(32, math.gcd(*widths) // 2),
            num_class_embeds=classes or None,
        )

    def forward(self, x: Tensor, log_sigma: Tensor, classes: Tensor | None) -> Tensor:
        """One call of the network."""
        patches = pixel_unshuffle(x, self.patch)
        return pixel_shuffle(
            self.unet(patches, 250 * log_sigma, class_labels=classes).sample, self.patch
        )


# ---------------------------------------------------------------------------------------------------------------------
# DDPM++, as EDM's released networks have it


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(max(1, min(32, channels // 4)), channels, eps=1e-6)


class _SongBlock(nn.Module):
    """A residual block, with the picture halved or doubled at its start or attention at its end where asked."""

    def __init__(
        self, enter: int, leave: int, embedding: int, attention: bool = False, resample: str = ""
    ):
        super().__init__()
        self.enter = enter
        self.resample = resample
        self.norm0 = _norm(enter)
        self.conv0 = nn.Conv2d(enter, leave, 3, padding=1)
        self.affine = nn.Linear(embedding, leave)
        self.norm1 = _norm(leave)
        self.conv1 = nn.Conv2d(leave, leave, 3, padding=1)
        self.skip = nn.Conv2d(enter, leave, 1) if enter != leave or resample else None
        self.norm2 = _norm(leave) if attention else None
        self.qkv = nn.Conv2d(leave, 3 * leave, 1) if attention else None
        self.proj = nn.Conv2d(leave, leave, 1) if attention else None

    def resampled(self, x: Tensor) -> Tensor:
        """The mean of every 2x2 pixels, or every pixel four times. Shapes: [B,C,H,W] -> [B,C,H/2,W/2] or the double."""
        if self.resample == "down":
            return avg_pool2d(x, 2)
        return interpolate(x, scale_factor=2) if self.resample else x

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """x [B,enter,H,W], embedding [B,E] -> [B,leave,H',W']."""
        shift = self.affine(embedding)[:, :, None, None]
        inner = self.conv0(self.resampled(silu(self.norm0(x)))) + shift
        x = self.resampled(x)
        straight = x if self.skip is None else self.skip(x)
        x = ROOT_HALF * (self.conv1(silu(self.norm1(inner))) + straight)
        if self.qkv is None:
            return x
        q, k, v = self.qkv(self.norm2(x)).flatten(2).unflatten(1, (-1, 3)).transpose(1, 3).unbind(2)
        mixed = scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
        return ROOT_HALF * (x + self.proj(mixed))


class SongUNet(nn.Module):
    """F(c_in x, ln sigma, classes) of the networks that EDM released: DDPM++ with c_noise = ln(sigma)/4.

    Source      Song et al. 2021 (DDPM++); Karras et al. 2022, appendix F.3; the names of the weights are the release's
    Shapes      x [B,C,H,W], log_sigma [B], classes [B] (ignored by a network without labels) -> [B,C,H,W]
    """

    def __init__(
        self,
        channels: int = 3,
        classes: int = 0,
        heads: int = 1,
        size: int = 32,
        labels: int = 0,
        augment: int = 0,
        width: int = 128,
        multiples: tuple[int, ...] = (2, 2, 2),
        depth: int = 4,
        attention: tuple[int, ...] = (16,),
    ):
        super().__init__()
        self.config = dict(
            channels=channels,
            classes=classes,
            heads=heads,
            size=size,
            labels=labels,
            augment=augment,
            width=width,
            multiples=list(multiples),
            depth=depth,
            attention=list(attention),
        )
        embedding = WIDENING * width
        frequencies = 10_000 ** (-torch.arange(width // 2) / (width // 2 - 1))
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.map_label = nn.Linear(labels, width) if labels else None
        # released weights have it; it is asked without augmentation, which adds nothing
        self.map_augment = nn.Linear(augment, width, bias=False) if augment else None
        self.map_layer0 = nn.Linear(width, embedding)
        self.map_layer1 = nn.Linear(embedding, embedding)
        grid = [(size >> level, width * multiple) for level, multiple in enumerate(multiples)]
        self.enc = nn.ModuleDict()
        self.dec = nn.ModuleDict()
        now = width
        skips = [width]
        for level, (side, wide) in enumerate(grid):
            name = f"{side}x{side}"
            if level:
                self.enc[f"{name}_down"] = _SongBlock(now, now, embedding, resample="down")
                skips.append(now)
            else:
                self.enc[f"{name}_conv"] = nn.Conv2d(channels, width, 3, padding=1)
            for i in range(depth):
                self.enc[f"{name}_block{i}"] = _SongBlock(
                    now, wide, embedding, attention=side in attention
                )
                now = wide
                skips.append(now)
        for side, wide in reversed(grid):
            name = f"{side}x{side}"
            if side == grid[-1][0]:
                self.dec[f"{name}_in0"] = _SongBlock(now, now, embedding, attention=True)
                self.dec[f"{name}_in1"] = _SongBlock(now, now, embedding)
            else:
                self.dec[f"{name}_up"] = _SongBlock(now, now, embedding, resample="up")
            for i in range(depth + 1):
                attentive = i == depth and side in attention
                self.dec[f"{name}_block{i}"] = _SongBlock(
                    now + skips.pop(), wide, embedding, attention=attentive
                )
                now = wide
        self.dec[f"{size}x{size}_aux_norm"] = _norm(now)
        self.dec[f"{size}x{size}_aux_conv"] = nn.Conv2d(now, channels, 3, padding=1)

    def embedding(self, log_sigma: Tensor, classes: Tensor | None) -> Tensor:
        """The level and the class, as every block receives them. Shapes: [B], [B] -> [B, 4 width]."""
        angles = log_sigma[:, None] / 4 * self.frequencies.to(log_sigma)
        condition = torch.cat([angles.sin(), angles.cos()], 1)
        if self.map_label is not None:  # a one-hot label times the root of their number
            label = self.map_label.in_features**0.5 * self.map_label.weight.T[classes]
            condition = condition + self.map_label.bias + label
        return silu(self.map_layer1(silu(self.map_layer0(condition))))

    def forward(self, x: Tensor, log_sigma: Tensor, classes: Tensor | None) -> Tensor:
        """One call of the network."""
        embedding = self.embedding(log_sigma, classes)
        skips = []
        for layer in self.enc.values():
            x = layer(x, embedding) if isinstance(layer, _SongBlock) else layer(x)
            skips.append(x)
        *blocks, norm, last = self.dec.values()
        for block in blocks:
            x = block(x if x.shape[1] == block.enter else torch.cat([x, skips.pop()], 1), embedding)
        return last(silu(norm(x)))


def initialise(network: nn.Module, generator: torch.Generator) -> None:
    """torch's default initialisation, drawn again from a generator: modules fill themselves from global state."""
    for module in network.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            if module.weight.any():  # a layer that starts at zero stays at zero
                nn.init.kaiming_uniform_(module.weight, a=math.sqrt(5), generator=generator)
                bound = 1 / math.sqrt(module.weight[0].numel())
                if module.bias is not None:
                    nn.init.uniform_(module.bias, -bound, bound, generator=generator)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, generator=generator)
        elif isinstance(module, nn.MultiheadAttention):
            nn.init.xavier_uniform_(module.in_proj_weight, generator=generator)
