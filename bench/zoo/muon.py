"""The optimiser of the micro zoo: Muon for hidden matrices, AdamW for the rest, fp32 masters.

Muon (K. Jordan et al., 2024, https://kellerjordan.github.io/posts/muon/): the momentum of a matrix
is orthogonalised by five Newton-Schulz steps; here batched over matrices of one shape and scaled by
0.2 sqrt(max(n, m)), so that its updates are as large as AdamW's (J. Liu et al., 2025,
arXiv:2502.16982).
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

ADAM_ONLY = ("embed", "lm_head", "position", "query_tokens", "patch", "heads.")
CLIP, WEIGHT_DECAY, MOMENTUM = 1.0, 0.01, 0.95
BETAS, EPS = (0.9, 0.98), 1e-8


def orthogonalize(matrices: Tensor) -> Tensor:
    """Nearest semi-orthogonal matrices, approximately (singular values 0.7 to 1.2).

    Args:
        matrices: [N, n, m], n <= m.

    Returns:
        [N, n, m].
    """
    x = matrices.bfloat16()
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        a = x @ x.mT
        b = torch.baddbmm(a, a, a, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, b, x, beta=3.4445)
    return x.float()


class MuonAdamW:
    """Keeps fp32 masters of bf16 parameters, and its state in dicts that can be saved."""

    def __init__(
        self,
        named: Iterable[tuple[str, nn.Parameter]],
        lr: float,
        muon_lr: float,
        lr_scale: Mapping[str, float] | None = None,
    ):
        """`slow` maps parameter names to what their learning rate is multiplied by."""
        self.lr_scale = lr_scale or {}
        unique: dict[int, tuple[str, nn.Parameter]] = {}
        for name, parameter in named:
            unique.setdefault(id(parameter), (name, parameter))
        self.parameters = dict(unique.values())
        self.lr, self.muon_lr, self.count = lr, muon_lr, 0
        self.master = {n: p.detach().float().clone() for n, p in self.parameters.items()}
        self.muon = [
            n
            for n, p in self.parameters.items()
            if p.ndim == 2 and not any(part in n for part in ADAM_ONLY)
        ]
        self.adam = [n for n in self.parameters if n not in set(self.muon)]
        self.first = {n: torch.zeros_like(m) for n, m in self.master.items()}
        self.second = {n: torch.zeros_like(self.master[n]) for n in self.adam}
        for parameter in self.parameters.values():
            parameter.data = parameter.data.bfloat16()

    @torch.no_grad()
    def step(self, scale: float) -> None:
        """Apply the gradients at `scale` times the learning rates, and drop them."""
        self.count += 1
        grads = {n: p.grad.float() for n, p in self.parameters.items() if p.grad is not None}
        for parameter in self.parameters.values():
            parameter.grad = None
        norm = torch.stack([grad.norm() for grad in grads.values()]).norm()
        for grad in grads.values():
            grad.mul_((CLIP / (norm + 1e-6)).clamp(max=1.0))
        for slow in {self.lr_scale.get(n, 1.0) for n in self.adam}:
            group = [n for n in self.adam if n in grads and self.lr_scale.get(n, 1.0) == slow]
            self._adam({n: grads[n] for n in group}, self.lr * scale * slow)
        self._muon({n: grads[n] for n in self.muon if n in grads}, self.muon_lr * scale)
        for name, parameter in self.parameters.items():
            parameter.copy_(self.master[name])

    def _adam(self, grads: dict[str, Tensor], lr: float) -> None:
        for name, grad in grads.items():
            first = self.first[name].lerp_(grad, 1 - BETAS[0])
            second = self.second[name].mul_(BETAS[1]).addcmul_(grad, grad, value=1 - BETAS[1])
            scale = (second / (1 - BETAS[1] ** self.count)).sqrt_().add_(EPS)
            master = self.master[name]
            if master.ndim >= 2:
                master.mul_(1 - lr * WEIGHT_DECAY)
            master.addcdiv_(first, scale, value=-lr / (1 - BETAS[0] ** self.count))

    def _muon(self, grads: dict[str, Tensor], lr: float) -> None:
        groups: dict[tuple[int, ...], list[tuple[str, Tensor, bool]]] = {}
        for name, grad in grads.items():
            buffer = self.first[name].lerp_(grad, 1 - MOMENTUM)
            update = grad.lerp(buffer, MOMENTUM)
            tall = update.shape[0] > update.shape[1]
            update = update.T if tall else update
            groups.setdefault(tuple(update.shape), []).append((name, update, tall))
        for shape, members in groups.items():
            updates = orthogonalize(torch.stack([update for _, update, _ in members]))
            for (name, _, tall), update in zip(members, updates):
                rate = lr * self.lr_scale.get(name, 1.0)
                master = self.master[name].mul_(1 - rate * WEIGHT_DECAY)
                master.add_(update.T if tall else update, alpha=-rate * 0.2 * shape[1] ** 0.5)

    def restore_precision(self) -> None:
        """Give every parameter its fp32 master."""
        for name, parameter in self.parameters.items():
            parameter.data = self.master[name].clone()

    def state_dict(self) -> dict[str, Tensor]:
        """The optimiser's state, as one flat dict of tensors."""
        tables = {"master": self.master, "first": self.first, "second": self.second}
        flat = {f"{t}/{n}": x.contiguous() for t, table in tables.items() for n, x in table.items()}
        return flat | {"count": torch.tensor(self.count)}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        """Go on from what `state` returned."""
        tables = {"master": self.master, "first": self.first, "second": self.second}
        for key, value in state_dict.items():
            table, _, name = key.partition("/")
            if table in tables:
                tables[table][name].copy_(value)
        self.count = int(state_dict["count"])
        for name, parameter in self.parameters.items():
            parameter.data.copy_(self.master[name])
