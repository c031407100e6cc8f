"""EDM's released files: the same function as an independent implementation, and no code of theirs is run."""

import os
import pickle
import sys
import types

import pytest
import torch
from diffclass.cli import app
from diffclass.denoisers import edm, nets, network
from diffclass.storage import assets
from diffclass.zoo import networks
from safetensors.torch import save_file
from typer.testing import CliRunner

SMALL = dict(size=16, labels=4, augment=2, width=8, multiples=(1, 2), depth=1, attention=(8,))


def patterned(net: torch.nn.Module) -> torch.nn.Module:
    """The network with weights that any implementation can write down: sines, by the order of their names."""
    for i, (_, weight) in enumerate(sorted(net.named_parameters())):
        ramp = torch.arange(weight.numel(), dtype=torch.float64)
        weight.data = (0.25 * torch.sin(0.7 * ramp + i)).float().reshape(weight.shape)
    return net.eval()


def released(net: nets.SongUNet) -> dict[str, torch.Tensor]:
    """The state dict as EDM writes it: with a prefix, and a filter beside every layer that resamples."""
    state = {f"model.{name}": value.detach() for name, value in net.state_dict().items()}
    for name in [
        name for name in state if name.endswith(("_up.conv0.weight", "_down.conv0.weight"))
    ]:
        state[name.replace("weight", "resample_filter")] = torch.full((1, 1, 2, 2), 0.25)
    return state


# ---------------------------------------------------------------------------------------------------------------------
# The function


def outputs(net) -> torch.Tensor:
    ramp = torch.arange(2 * 3 * 16 * 16, dtype=torch.float64)
    with torch.no_grad():
        return net(
            torch.cos(0.3 * ramp).float().reshape(2, 3, 16, 16),
            torch.tensor([-1.5, 0.8]),
            torch.tensor([1, 3]),
        )


def test_the_network_is_the_published_one():
    """The values were computed once by another implementation of the same paper, the one in nvidia-modulus 0.5.0."""
    published = torch.tensor(
        [[0.1313697, 0.2827886, 0.3562617], [-0.0792318, 0.1005246, 0.2056282]]
    )
    assert torch.allclose(
        outputs(patterned(nets.SongUNet(**SMALL)))[:, :, 5, 7], published, atol=2e-6
    )


@pytest.mark.parametrize(
    "slip", ["norm eps", "no root of two", "label scale", "level scale", "resampling"]
)
def test_slips_in_the_network_are_caught(slip, monkeypatch):
    net = patterned(nets.SongUNet(**SMALL))
    honest = outputs(net)
    if slip == "norm eps":
        for part in net.modules():
            if isinstance(part, torch.nn.GroupNorm):
                part.eps = 1e-2
    elif slip == "no root of two":
        monkeypatch.setattr(nets, "ROOT_HALF", 1.0)
    elif slip == "label scale":
        net.map_label.weight.data /= 2
    elif slip == "level scale":
        net.frequencies *= 4
    else:
        monkeypatch.setattr(nets, "avg_pool2d", lambda x, size: x[:, :, ::size, ::size])
    assert not torch.allclose(outputs(net), honest, atol=1e-3)


@pytest.mark.parametrize("labels", [4, 0])
def test_a_state_dict_says_what_it_is(tmp_path, labels):
    net = patterned(nets.SongUNet(**{**SMALL, "labels": labels}))
    save_file(released(net), tmp_path / "edm.safetensors")
    denoiser = edm.from_edm(tmp_path / "edm.safetensors")
    assert denoiser.num_classes == labels and denoiser.has_null == (labels == 0)
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    c_skip, c_out, c_in = network.edm_scalings(torch.tensor(0.7))
    with torch.no_grad():
        wanted = c_skip * x + c_out * net(
            c_in * x, torch.tensor([0.7, 0.7]).log(), torch.tensor([2, 2])
        )
        got = denoiser(x, 0.7, [2] if labels else [0])[:, 0]
    assert torch.allclose(got, wanted, atol=1e-6)


def test_the_size_of_the_released_network():
    """55.7 M weights: Karras et al. 2022, and the file name's network."""
    with torch.device("meta"):
        net = nets.SongUNet(labels=10, augment=9)
    assert sum(weight.numel() for weight in net.parameters()) == pytest.approx(55.7e6, rel=0.002)


@pytest.mark.parametrize(
    "extra, words",
    [
        ({"map_noise.freqs": torch.zeros(4)}, "expected a DDPM"),
        ({"enc.8x8_aux_residual.weight": torch.zeros(4)}, "aux_residual"),
        ({"model.enc.8x8_down.conv0.resample_filter": torch.zeros(1, 1, 4, 4)}, "resample_filter"),
        ({"surplus.weight": torch.zeros(4)}, "surplus.weight"),
    ],
)
def test_other_architectures_are_refused(tmp_path, extra, words):
    save_file(released(nets.SongUNet(**SMALL)) | extra, tmp_path / "edm.safetensors")
    with pytest.raises(ValueError, match=words):
        edm.from_edm(tmp_path / "edm.safetensors")


# ---------------------------------------------------------------------------------------------------------------------
# The pickle


@pytest.fixture
def persistence(monkeypatch):
    """EDM's way to pickle: an object is its source code, to be executed by the reader, and its state."""
    for name in ("torch_utils", "torch_utils.persistence"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    module = sys.modules["torch_utils.persistence"]

    def _reconstruct_persistent_obj(meta):
        exec(meta["module_src"])

    _reconstruct_persistent_obj.__module__ = module.__name__
    _reconstruct_persistent_obj.__qualname__ = "_reconstruct_persistent_obj"
    module._reconstruct_persistent_obj = _reconstruct_persistent_obj

    class Persistent:
        def __init__(self, part, kind=None):
            self.part = part
            self.kind = kind or type(part).__name__

        def __reduce__(self):
            state = {**self.part.__dict__, "_modules": persistent(self.part._modules)}
            return _reconstruct_persistent_obj, (
                dict(
                    type="class",
                    version=6,
                    class_name=self.kind,
                    state=state,
                    module_src="raise SystemExit('the code in the file was run')",
                ),
            )

    def persistent(parts):
        """The parts as EDM has them: torch's containers are pickled as they are, all else with its source code."""
        kept = {}
        for name, part in parts.items():
            if isinstance(part, torch.nn.ModuleDict):
                kept[name] = torch.nn.ModuleDict()
                kept[name].__dict__["_modules"] = persistent(part._modules)
            elif part is not None:
                kept[name] = Persistent(part)
        return kept

    return Persistent


def pickled(persistent, path, kind="EDMPrecond", **said):
    """A released file: a wrapper that holds the network as its part `model`, and says its scaling as attributes."""
    net = patterned(nets.SongUNet(**SMALL))
    wrapper = torch.nn.ModuleDict({"model": net})
    for name, value in said.items():
        setattr(wrapper, name, value)
    path.write_bytes(pickle.dumps(dict(ema=persistent(wrapper, kind))))
    return net


def test_a_released_pickle_is_read_and_its_code_is_not_run(persistence, tmp_path):
    net = pickled(persistence, tmp_path / "edm.pkl")
    with pytest.raises(SystemExit):
        pickle.loads((tmp_path / "edm.pkl").read_bytes())
    denoiser = edm.from_edm(tmp_path / "edm.pkl")
    assert torch.equal(outputs(denoiser.network), outputs(net))


class Malicious:
    def __reduce__(self):
        return os.system, ("touch was-run",)


def test_files_that_ask_for_code_are_refused(persistence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.pkl").write_bytes(pickle.dumps(dict(ema=Malicious())))
    torch.save(Malicious(), tmp_path / "bad.pt")
    for name in ("bad.pkl", "bad.pt"):
        with pytest.raises(
            ValueError, match=f"expected {name} to hold the tensors of a network.*refused"
        ):
            edm.from_edm(tmp_path / name)
    assert not (tmp_path / "was-run").exists()
    pickled(persistence, tmp_path / "vp.pkl", kind="VPPrecond")
    with pytest.raises(ValueError, match="scaled by VPPrecond, not by EDMPrecond"):
        edm.from_edm(tmp_path / "vp.pkl")


@pytest.mark.parametrize(
    "said, sentence",
    [
        (dict(sigma_data=1.0), r"expected a network scaled for sigma_data 0.5, got 1 in edm.pkl"),
        (dict(sigma_min=90.0), r"got sigma_min 90 and sigma_max 80 in edm.pkl"),
    ],
)
def test_a_pickle_of_another_scaling_is_refused(persistence, tmp_path, said, sentence):
    pickled(persistence, tmp_path / "edm.pkl", **said)
    with pytest.raises(ValueError, match=sentence):
        edm.from_edm(tmp_path / "edm.pkl")


def test_a_pickle_says_its_range(persistence, tmp_path):
    """EDM's own say 0 to infinity, which is what they were trained at, and are asked where EDM samples."""
    pickled(persistence, tmp_path / "edm.pkl", sigma_data=0.5, sigma_min=0, sigma_max=float("inf"))
    assert edm.from_edm(tmp_path / "edm.pkl").sigma_range == edm.EDM_RANGE
    pickled(persistence, tmp_path / "edm.pkl", sigma_min=0.02, sigma_max=50.0)
    assert edm.from_edm(tmp_path / "edm.pkl").sigma_range == (0.02, 50.0)


def test_a_state_dict_says_it_in_its_header(tmp_path):
    net = patterned(nets.SongUNet(**SMALL))
    path = tmp_path / "edm.safetensors"
    save_file(released(net), path, {"sigma_data": "1.0"})
    with pytest.raises(ValueError, match="sigma_data 0.5, got 1 in edm.safetensors"):
        edm.from_edm(path)
    save_file(released(net), path, {"sigma_data": "0.5", "sigma_min": "0.02"})
    assert edm.from_edm(path).sigma_range == (0.02, 80.0)
    for refused in ("half", '"half"', "[0.5]", "null"):
        save_file(released(net), path, {"sigma_data": refused})
        with pytest.raises(ValueError, match="is refused"):
            edm.from_edm(path)
    save_file(released(net), path, {"sigma_min": "NaN"})
    with pytest.raises(
        ValueError, match="expected numbers in edm.safetensors, got NaN for its sig"
    ):
        edm.from_edm(path)


@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod.", "module._orig_mod."])
def test_names_of_wrappers_are_read(tmp_path, wrapper):
    net = patterned(nets.SongUNet(**SMALL))
    state = {f"{wrapper}{name}": value for name, value in released(net).items()}
    save_file(state, tmp_path / "edm.safetensors")
    assert torch.equal(outputs(edm.from_edm(tmp_path / "edm.safetensors").network), outputs(net))


@pytest.mark.parametrize(
    "change, sentence",
    [
        (lambda s: {n: v for n, v in s.items() if "map_layer1.bias" not in n}, "1 missing, 0 left"),
        (
            lambda s: {n: v * torch.nan for n, v in s.items()},
            "expected finite weights of a SongUNet",
        ),
    ],
)
def test_lost_and_spoilt_weights_are_refused(tmp_path, change, sentence):
    save_file(change(released(nets.SongUNet(**SMALL))), tmp_path / "edm.safetensors")
    with pytest.raises(ValueError, match=sentence):
        edm.from_edm(tmp_path / "edm.safetensors")


def test_two_weights_of_one_name_are_refused(tmp_path):
    state = released(patterned(nets.SongUNet(**SMALL)))
    name = next(iter(state))
    bare = name.removeprefix("model.")
    twice = {**state, bare: state[name] + 1, f"model.{bare}": state[name]}
    save_file(twice, tmp_path / "edm.safetensors")
    with pytest.raises(ValueError, match="expected weights of one network .* twice"):
        edm.from_edm(tmp_path / "edm.safetensors")


@pytest.mark.parametrize(
    "change",
    [
        lambda name, value: torch.zeros(7),
        lambda name, value: value.flatten(),
        lambda name, value: value[:0],
    ],
)
def test_weights_of_other_shapes_get_a_sentence(tmp_path, change):
    state = released(patterned(nets.SongUNet(**SMALL)))
    shaped = [name for name, value in state.items() if value.ndim > 1 and "filter" not in name]
    assert len(shaped) > 20
    for name in shaped:
        spoilt = {**state, name: change(name, state[name]).clone()}
        save_file(spoilt, tmp_path / "edm.safetensors")
        with pytest.raises(ValueError, match="^expected "):
            edm.from_edm(tmp_path / "edm.safetensors")


@pytest.mark.parametrize(
    "content",
    [{"enc.8x8_conv.weight": 3}, {1: torch.zeros(2)}, [torch.zeros(2)], {}, None, torch.zeros(2)],
)
def test_an_architecture_is_read_off_tensors_by_name(content):
    with pytest.raises(ValueError, match="^expected .* the weights of a SongUNet"):
        edm.architecture_of(content)


@pytest.mark.parametrize(
    "content, sentence",
    [
        ([torch.zeros(1)], "expected tensors by name in edm.pt, got a list"),
        (torch.zeros(1), "expected tensors by name in edm.pt, got a Tensor"),
        ({0: torch.zeros(1)}, "expected tensors by name in edm.pt, got a dict"),
        ({"ema": {"w": torch.zeros(1)}, "step": 3}, "in edm.pt, got 'ema', 'step' too; save the"),
        ({}, "got nothing too"),
    ],
)
def test_checkpoints_that_are_no_state_dict_get_a_sentence(tmp_path, content, sentence):
    torch.save(content, tmp_path / "edm.pt")
    with pytest.raises(ValueError, match=sentence):
        edm.from_edm(tmp_path / "edm.pt")


@pytest.mark.parametrize("name", ["cut.pkl", "cut.safetensors", "cut.pt"])
def test_damaged_and_missing_files_get_a_sentence(tmp_path, name):
    with pytest.raises(FileNotFoundError, match="found no such file"):
        edm.from_edm(tmp_path / name)
    (tmp_path / name).write_bytes(b"half a file")
    with pytest.raises(ValueError, match="is refused"):
        edm.from_edm(tmp_path / name)


def test_the_command_writes_weights_that_the_course_loads(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFCLASS_ASSETS", str(tmp_path / "assets"))
    (tmp_path / "assets").mkdir()
    net = patterned(nets.SongUNet(**SMALL))
    save_file(released(net), tmp_path / "edm.safetensors")
    done = CliRunner().invoke(app, ["convert", str(tmp_path / "edm.safetensors")])
    assert done.exit_code == 0 and "4 classes" in done.stdout
    loaded, card = network.load_denoiser(assets.verified(networks.MODELS["cifar10"]["edm"]))
    assert torch.equal(outputs(loaded.network), outputs(net)) and len(card["source_sha256"]) == 64
    done = CliRunner().invoke(
        app, ["convert", str(tmp_path / "edm.safetensors"), str(tmp_path / "out.pkl")]
    )
    assert done.exit_code == 2 and "ends in .safetensors" in done.stderr
