"""Networks of others: whatever they predict, the denoiser is the same; what cannot be meant is refused."""

import json

import pytest
import torch
from diffclass import noise
from diffclass.denoisers import edm, network, pretrained
from diffclass.denoisers.exact import MixtureDenoiser
from safetensors.torch import load_file, save_file

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


def tiny(**options):
    """A tiny `UNet2DModel` with random weights, the same every time."""
    from diffusers import UNet2DModel

    own = dict(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        block_out_channels=(8, 8),
        layers_per_block=1,
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
        norm_num_groups=4,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return UNet2DModel(**{**own, **options}).eval()


WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def saved(tmp_path):
    """A function that writes a folder of a tiny network: other options, settings of its scheduler, weights, layout."""

    def write(scheduler=None, change=None, place="unet", **options):
        unet = tiny(**options)
        unet.save_pretrained(tmp_path / place)
        settings = {"_class_name": "DDPMScheduler", "beta_schedule": "linear", **(scheduler or {})}
        home = tmp_path / "scheduler" if place else tmp_path
        home.mkdir(exist_ok=True)
        (home / "scheduler_config.json").write_text(json.dumps(settings))
        if change is not None:
            path = tmp_path / place / WEIGHTS
            save_file(change(load_file(path)), path, {"format": "pt"})
        return tmp_path

    return write


def answers(denoiser):
    """What a denoiser says of two pictures."""
    x = torch.randn(2, *denoiser.image_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return denoiser(x, 0.7) if denoiser.num_classes else denoiser.unconditional(x, 0.7)


@pytest.mark.parametrize(
    "wrapper", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."]
)
def test_weights_saved_in_a_wrapper_are_those_of_the_network(saved, wrapper):
    plain = answers(pretrained.from_diffusers(saved(num_class_embeds=4)))
    folder = saved(change=lambda s: {f"{wrapper}{n}": v for n, v in s.items()}, num_class_embeds=4)
    assert torch.equal(answers(pretrained.from_diffusers(folder)), plain)


@pytest.mark.parametrize(
    "change, sentence",
    [
        (
            lambda s: {n: v for n, v in s.items() if n != "conv_out.weight"},
            "1 missing, 0 left over",
        ),
        (
            lambda s: {n: v for n, v in s.items() if "class_embedding" not in n},
            "'class_embedding.weight' should have shape",
        ),
        (lambda s: {**s, "extra.weight": torch.zeros(1)}, "0 missing, 1 left over"),
        (lambda s: {f"unet.{n}": v for n, v in s.items()}, r"\d+ missing, \d+ left over"),
        (lambda s: {**s, "conv_in.weight": s["conv_in.weight"][:4]}, "conv_in.weight.* has"),
        (lambda s: {n: v * torch.nan for n, v in s.items()}, "expected finite weights of a UNet2D"),
        (lambda s: {n: v.to(torch.int8) for n, v in s.items()}, "got int8; quantised weights"),
    ],
)
def test_weights_that_do_not_fit_are_refused_when_loaded(saved, change, sentence):
    """Not at the first answer, and never filled with random numbers."""
    with pytest.raises(ValueError, match=sentence):
        pretrained.from_diffusers(saved(change=change, num_class_embeds=4))


def test_attention_of_old_files_has_other_names(saved):
    options = dict(
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
    )
    plain = answers(pretrained.from_diffusers(saved(**options)))
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def renamed(state):
        for new, name in old.items():
            state = {n.replace(f".{new}.", f".{name}."): v for n, v in state.items()}
        return state

    assert torch.equal(answers(pretrained.from_diffusers(saved(change=renamed, **options))), plain)


@pytest.mark.parametrize("place", ["unet", ""])
def test_both_layouts_are_read(saved, place):
    """Parts in folders, as a pipeline writes them, or everything at the root, as google/ddpm-cifar10-32 has it."""
    denoiser = pretrained.from_diffusers(saved(place=place))
    assert denoiser.image_shape == (3, 8, 8) and denoiser.has_null and not denoiser.training
    assert not any(weight.requires_grad for weight in denoiser.parameters())


def test_variants_are_found_and_chosen(saved):
    folder = saved()
    plain = answers(pretrained.from_diffusers(folder))
    home = folder / "unet"
    state = load_file(home / WEIGHTS)
    half = {name: value.half() for name, value in state.items()}
    save_file(half, home / WEIGHTS.replace(".safe", ".fp16.safe"))
    assert torch.equal(answers(pretrained.from_diffusers(folder)), plain), "the plain one first"
    rounded = answers(pretrained.from_diffusers(folder, variant="fp16"))
    assert rounded.dtype == torch.float32 and not torch.equal(rounded, plain)
    assert torch.allclose(rounded, plain, atol=0.05)
    with pytest.raises(ValueError, match="variants 'fp16', 'no variant' to choose from"):
        pretrained.from_diffusers(folder, variant="bf16")
    (home / WEIGHTS).unlink()
    assert torch.equal(answers(pretrained.from_diffusers(folder)), rounded), "the only one"
    save_file(half, home / WEIGHTS.replace(".safe", ".non_ema.safe"))
    with pytest.raises(ValueError, match="variants 'fp16', 'non_ema' to choose from; say which"):
        pretrained.from_diffusers(folder)


def test_weights_in_parts_and_without_safetensors_are_read(saved):
    folder = saved()
    plain = answers(pretrained.from_diffusers(folder))
    home = folder / "unet"
    state = load_file(home / WEIGHTS)
    (home / WEIGHTS).unlink()
    with pytest.raises(FileNotFoundError, match="expected weights such as diffusion_pytorch_model"):
        pretrained.from_diffusers(folder)
    half = len(state) // 2
    index = {}
    for number, names in ((1, list(state)[:half]), (2, list(state)[half:])):
        name = WEIGHTS.replace(".safe", f"-0000{number}-of-00002.safe")
        save_file({key: state[key] for key in names}, home / name)
        index |= dict.fromkeys(names, name)
    (home / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": index}))
    assert torch.equal(answers(pretrained.from_diffusers(folder)), plain)
    (home / name).unlink()
    with pytest.raises(
        FileNotFoundError, match="expected 2 files of weights .* no .*00002-of-00002"
    ):
        pretrained.from_diffusers(folder)
    for path in home.glob("diffusion*"):
        path.unlink()
    torch.save(state, home / "diffusion_pytorch_model.bin")
    assert torch.equal(answers(pretrained.from_diffusers(folder)), plain)
    (home / "diffusion_pytorch_model.bin").write_bytes(b"half a file")
    with pytest.raises(ValueError, match="is refused"):
        pretrained.from_diffusers(folder)


# ---------------------------------------------------------------------------------------------------------------------
# What the scheduler says


@pytest.mark.parametrize("name", pretrained.CHAIN_SCHEDULERS)
@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_every_scheduler_of_the_chain_is_read_as_diffusers_reads_it(tmp_path, name, schedule):
    """Its own defaults, such as Heun's betas, and not those of DDPM."""
    import diffusers

    path = tmp_path / "scheduler_config.json"
    for own in ({}, dict(beta_start=0.001, beta_end=0.03, num_train_timesteps=400)):
        path.write_text(json.dumps({"_class_name": name, "beta_schedule": schedule, **own}))
        betas, predicts, _ = pretrained.read_schedule(path)
        theirs = getattr(diffusers, name)(beta_schedule=schedule, **own)
        assert torch.equal(betas, theirs.betas.double()) and predicts == "epsilon"


@pytest.mark.parametrize("name", ["DDPMScheduler", "DDIMScheduler"])
@pytest.mark.parametrize("predicts", pretrained.PREDICTIONS)
@pytest.mark.parametrize("zero_snr", [False, True])
def test_the_estimate_is_that_of_diffusers_step_by_step(saved, name, predicts, zero_snr):
    """`step(...).pred_original_sample` at the timesteps of the chain, from the same U-Net."""
    import diffusers

    own = dict(prediction_type=predicts, rescale_betas_zero_snr=zero_snr, clip_sample=False)
    denoiser = pretrained.from_diffusers(saved({"_class_name": name, **own}))
    theirs = getattr(diffusers, name)(**own)
    theirs.set_timesteps(1000)
    levels = denoiser.log_levels.double().exp()
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    for t in (0, 10, 400, 900, 998):
        sigma = levels[t]
        z = (x * (1 + float(sigma)) / (1 + float(sigma) ** 2) ** 0.5).float()
        with torch.no_grad():
            out = denoiser.network(z, torch.full((2,), float(t))).sample
            wanted = theirs.step(out, t, z).pred_original_sample
            got = denoiser.unconditional(x * (1 + float(sigma)), float(sigma))
        scale = float(wanted.abs().max())
        torch.testing.assert_close(got / scale, wanted / scale, rtol=0, atol=2e-3)


def test_a_last_step_of_pure_noise_leaves_the_levels_before_it(saved):
    """Zero terminal SNR, as networks that predict v are trained: sigma there is infinite, and is no level."""
    folder = saved(dict(rescale_betas_zero_snr=True, prediction_type="v_prediction"))
    denoiser = pretrained.from_diffusers(folder)
    (note,) = [note for note in denoiser.notes if "zero terminal SNR" in note]
    assert "the last of 1000 timesteps is pure noise, so levels end at sigma" in note
    assert len(denoiser.log_levels) == 999
    low, high = denoiser.sigma_range
    assert low < 0.02 and 157 < high < float("inf")
    x = torch.ones(1, 3, 8, 8)
    assert bool(torch.isfinite(denoiser.unconditional(high * x, high)).all())
    plain = pretrained.from_diffusers(saved(dict(prediction_type="v_prediction")))
    assert not any("terminal" in note for note in plain.notes) and len(plain.log_levels) == 1000


def test_what_a_sampler_would_clip_is_noted(saved):
    assert pretrained.from_diffusers(saved(dict(clip_sample=False))).notes == ()
    (note,) = pretrained.from_diffusers(saved(dict(clip_sample=True))).notes
    assert note.startswith("clip_sample: the sampler of this folder keeps each estimate in range")
    clip, threshold = pretrained.from_diffusers(saved(dict(thresholding=True))).notes
    assert "clip_sample" in clip and "thresholding" in threshold


def test_betas_that_are_given_are_read(saved):
    betas = noise.cosine_betas(50).tolist()
    folder = saved(dict(trained_betas=betas, num_train_timesteps=50))
    denoiser = pretrained.from_diffusers(folder)
    wanted = noise.sigma_of_alpha_bar(noise.alpha_bar(torch.tensor(betas).double()))
    assert torch.allclose(denoiser.log_levels.double(), wanted.log(), atol=1e-5)
    with pytest.raises(ValueError, match="a beta for each of 1000 timesteps, got 50 trained_betas"):
        pretrained.from_diffusers(saved(dict(trained_betas=betas)))


@pytest.mark.parametrize(
    "settings, sentence",
    [
        (
            dict(_class_name="EDMEulerScheduler"),
            "got EDMEulerScheduler; an EDM network is scaled by",
        ),
        (
            dict(_class_name="EDMDPMSolverMultistepScheduler"),
            "an EDM network is scaled by its sigma",
        ),
        (dict(_class_name="FlowMatchEulerDiscreteScheduler"), "a flow-matching network mixes"),
        (dict(_class_name="ScoreSdeVeScheduler"), "got ScoreSdeVeScheduler; which noise its"),
        (dict(_class_name="KarrasVeScheduler"), "is not known here, and is not guessed"),
        (dict(_class_name="TheirOwnScheduler"), "got TheirOwnScheduler; which noise"),
        (dict(_class_name=None), "got no _class_name; which noise"),
        (dict(prediction_type="flow_prediction"), "predicts one of .*, got 'flow_prediction'"),
        (dict(beta_schedule="theirs"), "settings that DDPMScheduler can be made with, got some"),
        (dict(sigma_data=1.0), "got sigma_data = 1.0, which says that the network was trained for"),
        (
            dict(_class_name="DPMSolverMultistepScheduler", use_flow_sigmas=True),
            "got use_flow_sigmas = True",
        ),
        (
            dict(_class_name="EulerDiscreteScheduler", timestep_type="continuous"),
            "got timestep_type = 'continuous'",
        ),
        (dict(predict_epsilon=False), "got predict_epsilon = False"),
        (
            dict(_class_name="PNDMScheduler", rescale_betas_zero_snr=True),
            "settings that PNDMScheduler knows, got rescale_betas_zero_snr, which it would drop",
        ),
    ],
)
def test_schedulers_that_are_not_read_are_refused_by_name(saved, settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        pretrained.from_diffusers(saved(settings))


@pytest.mark.parametrize("content", ["", "[]", "{"])
def test_settings_that_are_no_settings_get_a_sentence(saved, content):
    folder = saved()
    (folder / "scheduler/scheduler_config.json").write_text(content)
    with pytest.raises(ValueError, match="expected settings .* scheduler_config.json, got a"):
        pretrained.from_diffusers(folder)


@pytest.mark.parametrize(
    "betas, sentence",
    [
        (
            torch.tensor([0.1, float("nan"), 0.3]),
            "expected finite betas, .* with 1 NaN or infinite",
        ),
        (torch.full((2, 3), 0.1), r"one for each timestep, got shape \[2, 3\]"),
        (torch.tensor([0.1, 1.0, 0.3]), "expected betas strictly between 0 and 1, got 0.1 to 1"),
    ],
)
def test_betas_that_cannot_be_meant_get_a_sentence(betas, sentence):
    with pytest.raises(ValueError, match=sentence):
        pretrained.ScheduledDenoiser(Oracle("epsilon"), betas, "epsilon", 2, (2, 1, 1))


@pytest.mark.parametrize("sigma", [0.001, 1000.0])
def test_levels_outside_the_chain_are_refused(sigma):
    """The network would be told one level and shown another."""
    denoiser = pretrained.ScheduledDenoiser(Oracle("epsilon"), BETAS, "epsilon", 2, (2, 1, 1))
    with pytest.raises(ValueError, match="expected noise levels between 0.01 and 157.*, got"):
        denoiser(torch.ones(1, 2, 1, 1, dtype=torch.float64), sigma)
    denoiser(torch.ones(1, 2, 1, 1, dtype=torch.float64), 0.01)


# ---------------------------------------------------------------------------------------------------------------------
# What the network says


def test_classes_are_those_of_the_config_and_the_last_may_be_none(saved):
    folder = saved(num_class_embeds=4)
    every = pretrained.from_diffusers(folder)
    assert every.num_classes == 4 and not every.has_null
    null = pretrained.from_diffusers(folder, num_classes=3)
    assert null.num_classes == 3 and null.has_null
    assert torch.equal(answers(null), answers(every)[:, :3])
    x = torch.ones(1, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(null.unconditional(x, 0.7), every(x, 0.7, [3])[:, 0])
    for wrong in (2, 5, 10):
        with pytest.raises(
            ValueError, match=f"expected {wrong} or {wrong + 1} class embeddings, got 4"
        ):
            pretrained.from_diffusers(folder, num_classes=wrong)
    with pytest.raises(ValueError, match="expected 10 or 11 class embeddings, got 0"):
        pretrained.from_diffusers(saved(), num_classes=10)


@pytest.mark.parametrize(
    "options, sentence",
    [
        (dict(out_channels=6), "returns its 3 input channels, got 6; a learned variance"),
        (dict(sample_size=None), "got no sample_size"),
        (dict(center_input_sample=True), "with center_input_sample = False, got True"),
        (dict(time_embedding_type="fourier"), "time_embedding_type = 'positional', got 'fourier'"),
        (dict(class_embed_type="timestep"), "class_embed_type = None, got 'timestep'"),
    ],
)
def test_networks_that_are_not_read_are_refused_by_name(saved, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        pretrained.from_diffusers(saved(**options))


@pytest.mark.parametrize(
    "change, sentence",
    [
        (
            dict(_class_name="UNet2DConditionModel"),
            "expected a UNet2DModel, got UNet2DConditionModel",
        ),
        (dict(_class_name=None), "expected a UNet2DModel, got no _class_name"),
        (dict(cross_attention_dim=64), "knows, got cross_attention_dim, which it would drop"),
    ],
)
@pytest.mark.parametrize(
    "read", [pretrained.from_diffusers, lambda f: edm.from_edm_unet(f / "unet", 4)]
)
def test_other_models_and_settings_are_refused_by_name(saved, change, sentence, read):
    folder = saved(num_class_embeds=4)
    if read is not pretrained.from_diffusers:
        (folder / "scheduler/scheduler_config.json").unlink()
    path = folder / "unet/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match=sentence):
        read(folder)


def test_a_pictures_height_and_width_are_read(saved):
    assert pretrained.from_diffusers(saved(sample_size=(8, 16))).image_shape == (3, 8, 16)


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


def test_a_unet_of_this_course_with_lost_weights_or_a_scheduler_is_refused(tmp_path):
    mine = network.build("ConditionalDenoiser", "UNet", 3, (3, 16, 16), widths=(16, 32), layers=1)
    home = tmp_path / "unet"
    mine.network.unet.save_pretrained(home)
    state = load_file(home / WEIGHTS)
    save_file({n: v for n, v in state.items() if n != "conv_in.bias"}, home / WEIGHTS)
    with pytest.raises(ValueError, match="1 missing, 0 left over"):
        edm.from_edm_unet(home, 3)
    save_file({f"module.{n}": v for n, v in state.items()}, home / WEIGHTS)
    assert edm.from_edm_unet(home, 3).num_classes == 3
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler/scheduler_config.json").write_text('{"_class_name": "DDPMScheduler"}')
    with pytest.raises(ValueError, match="is told 250 ln sigma, got one beside scheduler_config"):
        edm.from_edm_unet(home, 3)


def test_other_blocks_and_other_classes_are_refused(tmp_path):
    mine = network.build("ConditionalDenoiser", "UNet", 3, (3, 16, 16), widths=(16, 32), layers=1)
    mine.network.unet.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="expected 10 or 11 class embeddings, got 4"):
        edm.from_edm_unet(tmp_path, 10)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "act_fn": "gelu"}))
    with pytest.raises(ValueError, match="got other values of act_fn"):
        edm.from_edm_unet(tmp_path, 3)
