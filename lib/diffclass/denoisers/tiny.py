"""Tiny pipelines with random weights, written by diffusers itself: the way from a saved folder to a posterior, offline.

They know nothing of pictures. What they prove is the way: every part, file, precision and shape of a real pipeline is here,
at a thousandth of its size.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

WORDS = ("a", "photo", "of", "cat", "dog", "ship", "truck", "blurry")
NAMES = ("cat", "dog", "ship")


def seeded(build: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """The network that a function builds, its weights drawn anew, the same every time; ready to be asked.

    Formula     matrices and kernels N(0, 1/inputs), biases 0, factors 1
    Randomness  a generator of this seed: what the network's own class draws first leaves no trace
    """
    with torch.random.fork_rng(devices=[]):
        network = build().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if weight.ndim < 2:
                weight.fill_(float(name.endswith("weight")))
            else:
                weight.normal_(generator=generator).div_(math.sqrt(weight[0].numel()))
    return network


def autoencoder(channels: int = 4, **options) -> nn.Module:
    """Pictures of 8x8 pixels <-> latents of 4x4. Errors: those of diffusers' `AutoencoderKL` for its options."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=channels,
        sample_size=8,
        **options,
    )


def unet(**options) -> nn.Module:
    """A U-Net that is told a text. Errors: those of diffusers' `UNet2DConditionModel` for its options."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        **{
            **dict(
                sample_size=4,
                in_channels=4,
                out_channels=4,
                layers_per_block=1,
                block_out_channels=(8, 16),
                norm_num_groups=4,
                down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
                cross_attention_dim=16,
                attention_head_dim=4,
            ),
            **options,
        }
    )


def tokenizer(folder: Path):
    """A CLIP tokenizer of `WORDS`; other words are spelt letter by letter."""
    from transformers import CLIPTokenizer

    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    vocabulary = {}
    for token in ["<|startoftext|>", "<|endoftext|>", ".", ".</w>", *letters]:
        vocabulary.setdefault(token, len(vocabulary))
    for letter in letters:
        vocabulary.setdefault(f"{letter}</w>", len(vocabulary))
    merges = ["#version: 0.2"]
    for word in WORDS:
        parts = [*word[:-1], f"{word[-1]}</w>"]
        while len(parts) > 1:
            merge = f"{parts[0]} {parts[1]}"
            if merge not in merges:
                merges.append(merge)
            parts = [parts[0] + parts[1], *parts[2:]]
            vocabulary.setdefault(parts[0], len(vocabulary))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("\n".join(merges) + "\n")
    settings = dict(tokenizer_class="CLIPTokenizer", model_max_length=12)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return CLIPTokenizer.from_pretrained(folder)


def text_encoder(words, kind: str = "CLIPTextModel") -> nn.Module:
    """A CLIP text encoder for a tokenizer."""
    import transformers

    config = transformers.CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=32,
        projection_dim=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=12,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return getattr(transformers, kind)(config)


def stable_diffusion(folder: Path, scheduler=None, vae=None, network=None) -> tuple:
    """A Stable Diffusion pipeline, saved in a folder. Shapes: -> the folder's path, the pipeline."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    words = tokenizer(folder / "words")
    told = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)
    pipeline = StableDiffusionPipeline(
        vae=seeded(autoencoder) if vae is None else vae,
        text_encoder=seeded(lambda: text_encoder(words)),
        tokenizer=words,
        unet=seeded(unet) if network is None else network,
        scheduler=DDIMScheduler(**told, clip_sample=False) if scheduler is None else scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder / "pipeline")
    return folder / "pipeline", pipeline


def stable_diffusion_3(folder: Path, shift: float = 3.0, vae=None, **scheduler) -> tuple:
    """A Stable Diffusion 3 pipeline without T5, saved in a folder. Shapes: -> the folder's path, the pipeline."""
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )

    words = tokenizer(folder / "words")

    def transformer():
        return SD3Transformer2DModel(
            sample_size=4,
            patch_size=1,
            in_channels=4,
            out_channels=4,
            num_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=32,
            caption_projection_dim=16,
            pooled_projection_dim=32,
            pos_embed_max_size=4,
        )

    own = dict(scaling_factor=1.5305, shift_factor=0.0609)
    kind = "CLIPTextModelWithProjection"
    pipeline = StableDiffusion3Pipeline(
        transformer=seeded(transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=shift, **scheduler),
        vae=seeded(lambda: autoencoder(**own)) if vae is None else vae,
        text_encoder=seeded(lambda: text_encoder(words, kind)),
        tokenizer=words,
        text_encoder_2=seeded(lambda: text_encoder(words, kind)),
        tokenizer_2=words,
        text_encoder_3=None,
        tokenizer_3=None,
    )
    pipeline.save_pretrained(folder / "pipeline")
    return folder / "pipeline", pipeline


def dit(folder: Path) -> tuple:
    """A class-conditional transformer of three classes, with a learned variance, saved in a folder.

    Shapes      -> the folder's path, the pipeline
    """
    from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    def transformer():
        return DiTTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=4,
            out_channels=8,
            num_layers=1,
            norm_num_groups=4,
            sample_size=4,
            patch_size=2,
            num_embeds_ada_norm=3,
        )

    pipeline = DiTPipeline(
        transformer=seeded(transformer),
        vae=seeded(autoencoder),
        scheduler=DDIMScheduler(clip_sample=False),
    )
    pipeline.save_pretrained(folder / "pipeline")
    index = folder / "pipeline" / "model_index.json"
    labels = {"0": "tench, Tinca tinca", "1": "goldfish", "2": "ship"}
    index.write_text(json.dumps({**json.loads(index.read_text()), "id2label": labels}))
    return folder / "pipeline", pipeline


def flux(folder: Path, guidance: bool = False) -> tuple:
    """A Flux pipeline, saved in a folder. Shapes: -> the folder's path, the pipeline."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    words = tokenizer(folder / "words")
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
    sentences = T5Tokenizer(
        vocab=[*special, *((f"\u2581{word}", -1.0) for word in WORDS)], extra_ids=0
    )

    def transformer():
        return FluxTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=16,
            pooled_projection_dim=16,
            axes_dims_rope=(2, 2, 4),
            guidance_embeds=guidance,
        )

    def t5():
        sizes = dict(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
        return T5EncoderModel(T5Config(vocab_size=len(sentences), **sizes))

    pipeline = FluxPipeline(
        transformer=seeded(transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=seeded(lambda: autoencoder(scaling_factor=0.3611, shift_factor=0.1159)),
        text_encoder=seeded(lambda: text_encoder(words)),
        tokenizer=words,
        text_encoder_2=seeded(t5),
        tokenizer_2=sentences,
    )
    pipeline.save_pretrained(folder / "pipeline")
    return folder / "pipeline", pipeline
