"""Corruptions: what each is defined by, more at each severity, and evaluation of corrupted worlds by name."""

import colorsys

import pytest
import torch
from diffclass import data, zoo
from diffclass.data import corruptions, worlds
from diffclass.data.corruptions import SEVERITIES, corrupted
from diffclass.evaluation import accuracies
from diffclass.storage import assets, results


def photos(n=4) -> torch.Tensor:
    """Smooth colour pictures between 0.2 and 0.7, which no corruption but brightness clips."""
    grid = torch.linspace(0, 3, 32)
    waves = [
        torch.sin((k + 1) * grid)[:, None] * torch.cos((c + 1) * grid + k)[None]
        for k in range(n)
        for c in range(3)
    ]
    return 0.45 + 0.25 * torch.stack(waves).reshape(n, 3, 32, 32)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# Of saturation there may be less or more: its severities are no order.
@pytest.mark.parametrize("name", sorted(set(SEVERITIES) - {"saturate"}))
def test_each_is_worse_at_every_severity_and_stays_a_picture(name):
    x = photos()
    distances = []
    for severity in range(1, 6):
        worse = corrupted(x, name, severity, generator())
        assert worse.shape == x.shape and 0 <= worse.min() and worse.max() <= 1
        assert torch.equal(worse, corrupted(x, name, severity, generator()))
        distances.append(float((worse - x).square().mean()))
    assert distances[0] > 0 and distances == sorted(distances)


def test_noise_and_photons_have_their_variance():
    x = torch.full((8, 3, 32, 32), 0.5)
    for severity in range(1, 6):
        deviation = SEVERITIES["noise"][severity - 1]
        photons = SEVERITIES["shot"][severity - 1]
        noisy, shot = (corrupted(x, name, severity, generator(1)) - x for name in ("noise", "shot"))
        assert float(noisy.std()) == pytest.approx(deviation, rel=0.03)
        assert float(shot.var()) == pytest.approx(0.5 / photons, rel=0.05)
        assert abs(float(noisy.mean())) < 0.003 and abs(float(shot.mean())) < 0.003


def test_a_blur_spreads_a_point_by_its_deviation_and_keeps_the_light():
    point = torch.zeros(1, 1, 33, 33)
    point[0, 0, 16, 16] = 1
    for severity, deviation in enumerate(SEVERITIES["blur"], start=1):
        spread = corrupted(point, "blur", severity, generator())[0, 0]
        places = torch.arange(33.0) - 16
        assert float(spread.sum()) == pytest.approx(1, abs=1e-5)
        for axis in (0, 1):  # the variance of the sampled kernel
            reach = torch.arange(-int(4 * deviation + 0.5), int(4 * deviation + 0.5) + 1.0)
            weights = torch.exp(-((reach / deviation) ** 2) / 2)
            wanted = float((weights * reach**2).sum() / weights.sum())
            assert float((spread.sum(axis) * places**2).sum()) == pytest.approx(wanted, rel=1e-4)


def test_contrast_and_brightness_move_pixels_as_they_say():
    x = photos()
    for severity, share in enumerate(SEVERITIES["contrast"], start=1):
        less = corrupted(x, "contrast", severity, generator())
        assert torch.allclose(less.mean((2, 3)), x.mean((2, 3)), atol=1e-5)
        assert torch.allclose(less.std((2, 3)), share * x.std((2, 3)), atol=1e-5)
    assert torch.allclose(corrupted(x, "brightness", 5, generator()), (x + 0.3).clamp(0, 1))


def test_impulses_and_speckles_are_as_many_and_as_large_as_they_say():
    x = torch.full((40, 3, 32, 32), 0.5)
    for severity in range(1, 6):
        share = SEVERITIES["impulse"][severity - 1]
        hit = corrupted(x, "impulse", severity, generator())
        assert float((hit == 1).double().mean()) == pytest.approx(share / 2, rel=0.15)
        assert float((hit == 0).double().mean()) == pytest.approx(share / 2, rel=0.15)
        assert bool(((hit == 0) | (hit == 1) | (hit == 0.5)).all())
        deviation = SEVERITIES["speckle"][severity - 1]
        grainy = corrupted(x, "speckle", severity, generator())
        assert float(grainy.std()) == pytest.approx(deviation * 0.5, rel=0.02)
    assert not corrupted(0 * x, "speckle", 5, generator()).any()  # black stays black


def test_a_lens_out_of_focus_spreads_a_point_over_its_disc():
    x = torch.zeros(1, 1, 9, 9)
    x[..., 4, 4] = 1
    soft = corrupted(x, "defocus", 3, generator())  # a disc below one pixel: its soft edge alone
    edge = torch.exp(-(torch.tensor([-1.0, 0.0, 1.0]) ** 2) / (2 * 0.6**2))
    edge = edge / edge.sum()
    assert torch.allclose(soft[0, 0, 3:6, 3:6], edge[:, None] * edge, atol=1e-6)
    assert float(soft.sum()) == pytest.approx(1, abs=1e-5)
    box = corrupted(x, "defocus", 5, generator())  # nine pixels, with hardly an edge
    assert torch.allclose(box[0, 0, 3:6, 3:6], torch.full((3, 3), 1 / 9), atol=1e-6)


def test_zooming_keeps_the_middle_and_drives_a_point_outwards():
    x = torch.zeros(1, 1, 32, 32)
    x[..., 15:17, 15:17] = 1
    x[..., 15:17, 28:30] = 1
    far = corrupted(x, "zoom", 5, generator())
    assert float(far[0, 0, 16, 16]) > 0.9 > 0.6 > float(far[0, 0, 16, 28])
    assert float(far[0, 0, 16, 30:].sum()) > 0.1 and float(far[0, 0, 16, 24:27].sum()) < 1e-6
    level = torch.full((1, 3, 32, 32), 0.3)
    assert torch.allclose(corrupted(level, "zoom", 5, generator()), level, atol=1e-6)


def test_pixels_are_fewer_and_keep_their_mean():
    x = photos()
    for severity, share in enumerate(SEVERITIES["pixelate"], start=1):
        coarse = corrupted(x, "pixelate", severity, generator())
        rows = (coarse.diff(dim=2).abs().amax((0, 1, 3)) > 0).sum()
        columns = (coarse.diff(dim=3).abs().amax((0, 1, 2)) > 0).sum()
        assert int(rows) + 1 == int(columns) + 1 == int(32 * share)
        assert torch.allclose(coarse.mean((2, 3)), x.mean((2, 3)), atol=0.01)


def test_saturation_is_that_of_hsv():
    x = photos(2)
    x[0, :, :2] = 0.4  # grey, which has no hue
    for severity, (times, plus) in enumerate(SEVERITIES["saturate"], start=1):
        found = corrupted(x, "saturate", severity, generator())
        for picture, row, column in ((0, 0, 5), (0, 1, 9), (0, 9, 3), (1, 20, 30), (1, 4, 4)):
            hue, saturation, value = colorsys.rgb_to_hsv(*x[picture, :, row, column].tolist())
            changed = min(1.0, times * saturation + plus)
            wanted = colorsys.hsv_to_rgb(hue, changed, value)
            assert found[picture, :, row, column].tolist() == pytest.approx(wanted, abs=1e-5)
    with pytest.raises(ValueError, match="three colours, whose saturation can change, got 1"):
        corrupted(x[:, :1], "saturate", 1, generator())


def test_a_world_can_be_corrupted_by_name():
    clean, labels = worlds.world_of("digits").test(50)
    worse, same = worlds.world_of("digits:noise-5").test(50)
    wanted = corrupted(data.digits().test_images[:50], "noise", 5, generator())
    assert torch.equal(labels, same) and torch.equal(clean, data.digits().test_images[:50])
    assert torch.equal(worse, wanted) and not torch.equal(worse, clean)
    other, _ = worlds.world_of("digits:noise-5").test(50, seed=1)
    assert torch.equal(other, corrupted(clean, "noise", 5, generator(1)))


def test_a_corrupted_world_can_be_evaluated_by_name():
    clean = accuracies.bayes_trial("digits", limit=50)
    worse = accuracies.bayes_trial("digits:noise-5", limit=50)
    assert worse.settings["world"] == "digits:noise-5" and torch.equal(clean.labels, worse.labels)
    assert torch.equal(worse.images, worlds.world_of("digits:noise-5").test(50)[0])
    (record,) = accuracies.records_of(worse, 40)
    assert (record.world, record.n, record.value) == ("digits:noise-5", 50, 0.8)
    assert "50 images of digits:noise-5" in record.what


@pytest.mark.parametrize(
    "world", ["digits:noise", "digits:fog-3", "digits:noise-6", "digits:noise-x"]
)
def test_unknown_corruptions_get_a_sentence(world):
    for asked in (worlds.world_of, accuracies.bayes_trial):
        with pytest.raises(
            ValueError, match="expected .*noise, shot, blur.* at a severity of 1 to 5"
        ):
            asked(world)


def test_pictures_of_another_range_are_not_corrupted():
    with pytest.raises(ValueError, match="expected images in"):
        corruptions.corrupted(2 * photos(), "noise", 1, generator())


def test_the_accuracies_under_corruptions_are_on_record_for_today_s_weights():
    records = results.read(assets.folder() / "records" / "corruptions-cifar10.jsonl")
    places = ["cifar10"] + [f"cifar10:{name}-{s}" for name in SEVERITIES for s in (1, 3, 5)]
    named = ("cnn", "adversarial", "one-call", "contrastive", "adversarial-dc")
    asked = [(record.classifier, record.world) for record in records]
    assert sorted(asked) == sorted((name, place) for name in named for place in places)
    for record in records:
        assert record.n == 100 and record.attack is None
        assert record.settings["checkpoints"] == zoo.checkpoints("cifar10", record.classifier)
