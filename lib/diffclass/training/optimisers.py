"""What changes the weights: AdamW, or Muon for the hidden matrices and AdamW for what it leaves."""

import warnings

import torch
from torch import Tensor, nn

# Modules whose matrices do no inner work: they read pixels, levels and classes, or write pixels and logits.
OUTER = ("conv_in", "conv_out", "enter", "leave", "embed", "embedding", "classes", "place")
MUON_RATE = 3.0  # times AdamW's
MUON_DECAY = 0.02


class Optimiser:
    """AdamW for all weights of a network.

    Why         fused, and with the rate as a tensor, it reads nothing back, so that a step can be captured
    """

    captured = True

    def __init__(self, network: nn.Module, rate: float):
        self.parts: list[torch.optim.Optimizer] = [_adamw(list(network.parameters()), rate)]

    def set_rate(self, rate: float) -> None:
        """The learning rate of the next step."""
        for group in self.parts[0].param_groups:
            group["lr"].fill_(rate)

    def step(self) -> None:
        """One update, from the gradients of the weights."""
        with warnings.catch_warnings():
            # of plain steps before the capture, or of several processes
            warnings.filterwarnings("ignore", message="This instance was constructed with capt")
            for part in self.parts:
                part.step()

    def state(self) -> dict[str, Tensor]:
        """What the next step needs to know, as tensors by name."""
        return {
            f"{place}.{index}.{name}": torch.as_tensor(value)
            for place, part in enumerate(self.parts)
            for index, kept in part.state_dict()["state"].items()
            for name, value in kept.items()
        }

    def load(self, state: dict[str, Tensor]) -> None:
        """Go on from what `state` gave."""
        kept: list[dict[int, dict]] = [{} for _ in self.parts]
        for key, value in state.items():
            place, index, name = key.split(".")
            kept[int(place)].setdefault(int(index), {})[name] = value
        for part, own in zip(self.parts, kept, strict=True):
            rates = [group["lr"] for group in part.param_groups]
            part.load_state_dict({**part.state_dict(), "state": own})
            for weight, fields in part.state.items():
                for name, value in fields.items():
                    if value.shape == weight.shape:
                        # fused kernels go through memory in order, so it has to lie as its weight does
                        fields[name] = torch.empty_like(weight).copy_(value)
            for group, rate in zip(part.param_groups, rates, strict=True):
                group["lr"] = rate


class Muon(Optimiser):
    """Orthogonalised momentum for the hidden matrices, AdamW for what it leaves: biases, norms, outer layers.

    Formula     W <- W - 3 rate (0.2 sqrt(max(r, c)) orthogonal(momentum) + 0.02 W),  W of r rows and c columns
    Source      Jordan et al. 2024; scaled to AdamW's steps by Liu et al. 2025; `torch.optim.Muon`, which takes matrices
                only: the kernels of a convolution are one, a row for each output
    Errors      ImportError for a torch without it
    """

    # torch's takes its rate as a number, which a captured step could not be told anew
    captured = False

    def __init__(self, network: nn.Module, rate: float):
        if "Muon" not in vars(torch.optim):
            raise ImportError(
                f"expected a torch with torch.optim.Muon, 2.9 or later, got {torch.__version__}; train with AdamW."
            )
        self.inner = hidden_matrices(network)
        named = dict(network.named_parameters())
        rest = [weight for name, weight in named.items() if name not in self.inner]
        self.matrices = [nn.Parameter(as_matrix(weight)) for weight in self.inner.values()]
        hidden = torch.optim.Muon(
            self.matrices,
            lr=MUON_RATE * rate,
            weight_decay=MUON_DECAY,
            adjust_lr_fn="match_rms_adamw",
        )
        self.parts = [_adamw(rest, rate), hidden]

    def set_rate(self, rate: float) -> None:
        """See `Optimiser.set_rate`."""
        super().set_rate(rate)
        for group in self.parts[1].param_groups:
            group["lr"] = MUON_RATE * rate

    def step(self) -> None:
        """See `Optimiser.step`."""
        for matrix, weight in zip(self.matrices, self.inner.values(), strict=True):
            matrix.grad = None if weight.grad is None else as_matrix(weight.grad)
        super().step()


def _adamw(weights: list[nn.Parameter], rate: float) -> torch.optim.AdamW:
    # the rate is a tensor of its own, where the weights are
    lr = torch.tensor(rate, device=weights[0].device)
    return torch.optim.AdamW(
        weights, lr=lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True, capturable=True
    )


def hidden_matrices(network: nn.Module) -> dict[str, nn.Parameter]:
    """The weights between a network's first and last layers that are matrices, or the kernels of a convolution.

    Why         Muon's step has the same length in every direction, which suits what maps features to features: not a
                bias or a norm, which is no map, nor pixels, levels, classes and logits at the ends
    """
    return {
        name: weight
        for name, weight in network.named_parameters()
        if weight.ndim >= 2 and not _is_outer(name)
    }


def _is_outer(name: str) -> bool:
    parts = name.split(".")
    return any(part in OUTER or part.endswith("_embedding") for part in parts)


def as_matrix(weight: Tensor) -> Tensor:
    """The same numbers as a matrix, a row for each output: a view, whichever way the kernels lie in memory.

    Shapes      [O,I,...] -> [O,I ...]; the order of the columns is that of the memory, which orthogonalising ignores
    """
    plain = weight.detach()
    if not plain.is_contiguous():  # channels last
        plain = plain.movedim(1, -1)
    return plain.view(len(plain), -1)
