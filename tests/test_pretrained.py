"""Networks of others: whatever they predict, the denoiser is the same; what cannot be meant is refused."""

import json

import pytest
import torch
from diffclass import noise
from diffclass.denoisers import edm, network, pretrained
from diffclass.denoisers.exact import MixtureDenoiser

BETAS = noise.linear_betas()


class Oracle(torch.nn.Module):
    """The exact noise, v or x0 of a mixture at a (possibly fractional) timestep: what a perfect network says."""

    def __init__(self, predicts):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.exact = MixtureDenoiser(
            torch.randn(4, 2, 1, 1, generator=generator),
            torch.full((4,), 0.3),
            torch.full((4,), 0.5),
            torch.tensor([0, 0, 1, 1]),
        )
        self.levels = noise.sigma_of_alpha_bar(noise.alpha_bar(BETAS)).double()
        self.predicts = predicts

    def forward(self, z, t, class_labels):
        low = t.double().floor().long().clamp(0, 998)
        part = t.double() - low
        sigma = torch.exp((1 - part) * self.levels[low].log() + part * self.levels[low + 1].log())
        signal = (1 + sigma**2).rsqrt()[:, None, None, None]
        spread = sigma[:, None, None, None] * signal
        every = self.exact(z / signal, sigma)
        x0 = every[torch.arange(len(z)), class_labels]
        eps = (z - signal * x0) / spread
        out = {"epsilon": eps, "sample": x0, "v_prediction": signal * eps - spread * x0}[
            self.predicts
        ]
        return type("Output", (), {"sample": out})


@pytest.mark.parametrize("predicts", pretrained.PREDICTIONS)
def test_every_prediction_gives_the_exact_denoiser(predicts):
    oracle = Oracle(predicts)
    denoiser = pretrained.ScheduledDenoiser(oracle, BETAS, predicts, 2, (2, 1, 1))
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(5, 2, 1, 1, generator=generator, dtype=torch.float64)
    for sigma in (0.05, 0.4, 3.0, 60.0):
        got = denoiser(x * (1 + sigma), sigma)
        wanted = oracle.exact(x * (1 + sigma), sigma)
        torch.testing.assert_close(got, wanted, rtol=2e-4, atol=2e-4)


def test_a_wrong_prediction_type_is_another_denoiser():
    oracle = Oracle("epsilon")
    wrong = pretrained.ScheduledDenoiser(oracle, BETAS, "v_prediction", 2, (2, 1, 1))
    x = torch.ones(1, 2, 1, 1, dtype=torch.float64)
    assert (wrong(x, 1.0) - oracle.exact(x, 1.0)).abs().max() > 0.05


def test_timesteps_are_those_of_the_chain_and_grow_between_them():
    denoiser = pretrained.ScheduledDenoiser(Oracle("epsilon"), BETAS, "epsilon", 2, (2, 1, 1))
    levels = noise.sigma_of_alpha_bar(noise.alpha_bar(BETAS)).float()
    steps = torch.tensor([0, 1, 250, 998, 999])
    torch.testing.assert_close(denoiser.timestep(levels[steps]), steps.float(), rtol=0, atol=2e-2)
    between = denoiser.timestep((levels[250] * levels[251]).sqrt()[None])
    assert float(between) == pytest.approx(250.5, abs=0.05)


def test_an_unknown_prediction_is_refused():
    with pytest.raises(
        ValueError, match="expected a network that predicts one of epsilon, v_prediction, sample"
    ):
        pretrained.ScheduledDenoiser(Oracle("epsilon"), BETAS, "noise", 2, (2, 1, 1))


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """A tiny DDPM pipeline folder, written by diffusers itself."""
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = UNet2DModel(
            sample_size=8,
            in_channels=3,
            out_channels=3,
            block_out_channels=(8, 8),
            layers_per_block=1,
            down_block_types=("DownBlock2D",) * 2,
            up_block_types=("UpBlock2D",) * 2,
            norm_num_groups=4,
        )
    folder = tmp_path_factory.mktemp("ddpm")
    DDPMPipeline(
        unet=unet, scheduler=DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    ).save_pretrained(folder)
    return folder, unet.eval()


def test_a_pipeline_folder_is_read_with_its_schedule(pipeline):
    folder, unet = pipeline
    denoiser = pretrained.from_diffusers(folder)
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    t = 300
    abar = noise.alpha_bar(noise.cosine_betas())[t].float()
    sigma = noise.sigma_of_alpha_bar(abar)
    with torch.no_grad():
        eps = unet(x * abar.sqrt(), t).sample
        torch.testing.assert_close(
            denoiser.unconditional(x, float(sigma)), x - sigma * eps, rtol=1e-3, atol=1e-3
        )
    assert denoiser.num_classes == 0 and denoiser.has_null and denoiser.image_shape == (3, 8, 8)


def test_a_missing_scheduler_is_told(pipeline, tmp_path):
    with pytest.raises(
        FileNotFoundError, match="expected a pipeline folder with unet/config.json, found none"
    ):
        pretrained.from_diffusers(tmp_path)


def test_a_unet_of_this_course_survives_the_trip_through_a_folder(tmp_path):
    for null in (True, False):
        mine = network.build(
            "ConditionalDenoiser", "UNet", 3, (3, 16, 16), has_null=null, widths=(16, 32), layers=1
        )
        mine.network.unet.save_pretrained(tmp_path / str(null))
        back = edm.from_edm_unet(tmp_path / str(null), 3)
        assert back.has_null == null
        x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            torch.testing.assert_close(back(x, 0.5), mine.eval()(x, 0.5))


def test_other_blocks_and_other_classes_are_refused(tmp_path):
    mine = network.build("ConditionalDenoiser", "UNet", 3, (3, 16, 16), widths=(16, 32), layers=1)
    mine.network.unet.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="expected 10 or 11 class embeddings, got 4"):
        edm.from_edm_unet(tmp_path, 10)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "act_fn": "gelu"}))
    with pytest.raises(ValueError, match="got other values of act_fn"):
        edm.from_edm_unet(tmp_path, 3)
