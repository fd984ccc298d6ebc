"""Call a module with other parameters and with rewrites at sites, leaving nothing behind."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

from .errors import UnknownSite
from .types import Rewrite, Rewrites

__all__ = ["call", "compose", "first_tensor", "rewriting"]


def call(
    module: nn.Module,
    params: Mapping[str, Tensor],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    rewrites: Rewrites | None = None,
) -> Any:
    """Run `module` with `params` in place of its own and `rewrites` at its submodules.

    Parameters that `params` does not name keep their values. While it runs, the module's entries
    are swapped, so one module object must not be called from two threads at once. Raises
    UnknownSite for a rewrite at a path the module does not have.

    >>> import torch
    >>> net = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    >>> params = {"0.weight": torch.eye(2), "0.bias": torch.zeros(2)}
    >>> call(net, params, (torch.ones(1, 2),), rewrites={"1": lambda given, out: -out})
    tensor([[-1., -1.]])
    """
    with rewriting(module, rewrites or {}):
        # A fresh dict: functional_call writes into the one it is given.
        return functional_call(module, dict(params), tuple(args), dict(kwargs or {}))


@contextmanager
def rewriting(module: nn.Module, rewrites: Rewrites) -> Iterator[None]:
    """Within the block, submodules of `module` named in `rewrites` give rewritten outputs.

    A rewrite sees (first positional or keyword input, first tensor of the output) and its result
    replaces that tensor. Raises UnknownSite before anything runs.
    """
    handles = []
    try:
        for path, rewrite in rewrites.items():
            try:
                site = module.get_submodule(path)
            except AttributeError as error:
                raise UnknownSite(
                    f"a rewrite's site must be a module of {type(module).__name__}, and it has no "
                    f"{path!r}; list the paths with `module.named_modules()`."
                ) from error
            handles.append(site.register_forward_hook(_hook(rewrite), with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def compose(*layers: Rewrites) -> dict[str, Rewrite]:
    """Rewrites one after another: where several name a site, each sees its predecessor's output."""
    joined: dict[str, Rewrite] = {}
    for rewrites in layers:
        for site, rewrite in rewrites.items():
            joined[site] = _then(joined[site], rewrite) if site in joined else rewrite
    return joined


def first_tensor(value: Any) -> Tensor:
    """The tensor a rewrite means in a module's output: itself, or the first of a tuple."""
    return value if isinstance(value, Tensor) else value[0]


def _then(first: Rewrite, second: Rewrite) -> Rewrite:
    return lambda given, out: second(given, first(given, out))


def _hook(rewrite: Rewrite):
    def hook(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        given = args[0] if args else next(v for v in kwargs.values() if isinstance(v, Tensor))
        if isinstance(output, Tensor):
            return rewrite(given, output)
        head = rewrite(given, output[0])
        if hasattr(output, "keys"):  # a Hugging Face ModelOutput: a dict in order
            key = next(iter(output.keys()))
            return type(output)(**{**output, key: head})
        if hasattr(output, "_fields"):
            return type(output)(head, *output[1:])
        return type(output)((head, *output[1:]))

    return hook
