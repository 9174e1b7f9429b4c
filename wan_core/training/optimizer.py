"""Muon with AdamW beside it: the optimiser of the nano models.

Muon (Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks") replaces each matrix-shaped
momentum update by the nearest orthogonal matrix, found with five Newton-Schulz iterations; convolution kernels count as
matrices [out, in * taps]. On small models it needs clearly fewer steps than AdamW alone. Vectors, and whatever the
caller names (embeddings, first and last layers), go to AdamW.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

# Quintic iteration that drives all singular values towards one (coefficients of the Muon write-up).
_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def orthogonalise(matrix: Tensor, iterations: int = 5) -> Tensor:
    """Nearest semi-orthogonal matrix of `matrix` [rows, columns], approximately, in float32."""
    a, b, c = _NEWTON_SCHULZ
    x = matrix.float()
    wide = x.shape[0] <= x.shape[1]
    x = x if wide else x.mT
    x = x / (x.norm() + 1e-7)
    for _ in range(iterations):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if wide else x.mT


class Muon(torch.optim.Optimizer):
    """Orthogonalised momentum for matrices and kernels. `lr` is the root-mean-square size of one update's entries."""

    def __init__(self, params: Iterable[nn.Parameter], lr: float = 0.01, momentum: float = 0.95,
                 weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter: nn.Parameter, group: dict) -> None:
        state = self.state[parameter]
        buffer = state.setdefault("momentum", torch.zeros_like(parameter))
        buffer.lerp_(parameter.grad, 1 - group["momentum"])
        direction = parameter.grad.lerp(buffer, group["momentum"])  # Nesterov
        update = orthogonalise(direction.flatten(1))
        # An orthogonal [r, c] matrix has entries of root mean square 1 / sqrt(max(r, c)).
        update = update * max(update.shape) ** 0.5
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(update.view_as(parameter), alpha=-group["lr"])


class Optimizers:
    """Muon for the hidden matrices and AdamW for the rest, under one learning-rate factor from 0 to 1."""

    def __init__(self, module: nn.Module, *, muon_lr: float, adam_lr: float,
                 adam_names: tuple[str, ...] = (), weight_decay: float = 0.0) -> None:
        matrices, others = [], []
        for name, parameter in module.named_parameters():
            hidden = parameter.ndim >= 2 and min(parameter.flatten(1).shape) > 1
            (matrices if hidden and not any(part in name for part in adam_names) else others).append(parameter)
        self._optimizers = [
            (Muon(matrices, muon_lr, weight_decay=weight_decay), muon_lr),
            (torch.optim.AdamW(others, adam_lr, betas=(0.9, 0.98), weight_decay=0.0), adam_lr),
        ]
        self._parameters = matrices + others

    def step(self, factor: float, max_norm: float = 1.0) -> None:
        """Clip the gradient norm, apply both updates with their rates times `factor`, and clear the gradients."""
        torch.nn.utils.clip_grad_norm_(self._parameters, max_norm)
        for optimizer, lr in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> list[dict]:
        return [optimizer.state_dict() for optimizer, _ in self._optimizers]

    def load_state_dict(self, state: list[dict]) -> None:
        for (optimizer, _), saved in zip(self._optimizers, state):
            optimizer.load_state_dict(saved)


def learning_rate_factor(progress: float, warmup: float = 0.02) -> float:
    """Linear warm-up, then linear decay to zero; `progress` runs from 0 to 1 over the training."""
    return min(1.0, progress / warmup if warmup else 1.0) * min(1.0, (1 - progress) / (1 - warmup))
