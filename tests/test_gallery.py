"""The gallery: what is drawn comes back, class by class, and says that it was generated."""

import pytest
import torch
from diffclass import units
from diffclass.data import gallery
from diffclass.denoisers.exact import MixtureDenoiser
from diffclass.storage import assets
from diffclass.training import drawing
from PIL import Image


@pytest.fixture
def painted(tmp_path, monkeypatch):
    """A gallery of three classes of nearly uniform colour, drawn from their exact denoiser."""
    colours = torch.tensor([[0.9, 0.1, 0.1], [0.1, 0.9, 0.1], [0.2, 0.2, 0.8]])
    means = units.to_model(colours[:, :, None, None].expand(3, 3, 8, 8))
    denoiser = MixtureDenoiser(means, torch.full((3,), 0.01), torch.ones(3), torch.arange(3))
    monkeypatch.setenv("DIFFCLASS_ASSETS", str(tmp_path))
    assert list(drawing.draw(denoiser, "exact", per_class=2))[-1] == (18, 18)
    return colours, tmp_path


def test_what_was_drawn_is_read_class_by_class(painted):
    colours, _ = painted
    images, labels = gallery.pictures(side=8)
    assert labels.tolist() == [0, 0, 1, 1, 2, 2] and images.shape == (6, 3, 8, 8)
    torch.testing.assert_close(images.mean((2, 3)), colours[labels], rtol=0, atol=0.02)


def test_it_says_that_it_was_generated_and_has_a_checksum(painted):
    _, folder = painted
    note = Image.open(folder / gallery.FILE).text["Description"]
    assert "Generated, not photographed: drawn by exact with seed 0" in note
    assert gallery.FILE in assets.checksums()
    (folder / gallery.FILE).write_bytes(b"changed")
    with pytest.raises(ValueError, match="the file was changed"):
        gallery.pictures()
