"""Draw the gallery: pictures that a network of the course generates."""

import io
from collections.abc import Iterator
from pathlib import Path

import torch
from PIL import Image, PngImagePlugin

from diffclass import units
from diffclass.data.gallery import FILE
from diffclass.denoisers import sampling
from diffclass.denoisers.base import Denoiser
from diffclass.storage import assets, files

# from where pixels are noise alone to below what eight bits show
LEVELS = sampling.karras_levels(18, 0.02, 20.0)


def draw(
    denoiser: Denoiser,
    by: str,
    per_class: int = 4,
    seed: int = 0,
    target: Path | None = None,
) -> Iterator[tuple[int, int]]:
    """Draw `per_class` pictures of each class and write them as one PNG, a row a class; yields (steps done, steps).

    Randomness  from `seed`
    Writes      target/cifar10-gallery.png (`assets/` unless named), which says by whom it was generated, its checksum
    """
    folder = target or assets.folder()
    classes = denoiser.num_classes
    labels = torch.arange(classes).repeat_interleave(per_class)
    steps = len(LEVELS) - 1
    run = sampling.heun(denoiser, labels, LEVELS, torch.Generator().manual_seed(seed))
    for done in range(1, steps + 1):
        x = next(run)
        yield done, steps
    pixels = (units.to_pixel(x).clamp(0, 1) * 255).round().byte()  # [K*n,3,H,W]
    rows = pixels.unflatten(0, (classes, per_class)).permute(0, 3, 1, 4, 2)  # [K,H,n,W,3]
    sheet = rows.reshape(classes * pixels.shape[2], per_class * pixels.shape[3], 3).numpy()
    note = PngImagePlugin.PngInfo()
    note.add_text(
        "Description",
        f"Generated, not photographed: drawn by {by} with seed {seed}, a row for each class.",
    )
    folder.mkdir(parents=True, exist_ok=True)
    encoded = io.BytesIO()
    Image.fromarray(sheet).save(encoded, format="PNG", pnginfo=note)
    files.write(folder / FILE, encoded.getvalue())
    assets.record([FILE], folder)
