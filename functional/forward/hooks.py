"""Call a module with other parameters and with hooks at sites, without changing it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call as torch_functional_call

from errata.functional.errors import UnknownSiteError
from errata.functional.types import Hook, Hooks

__all__ = ["compose_hooks", "first_tensor", "forward_hooks", "functional_call"]


def functional_call(
    module: nn.Module,
    params: Mapping[str, Tensor],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    hooks: Hooks | None = None,
) -> Any:
    """Run `module` with `params` in place of its own and `hooks` at its submodules.

    Parameters that `params` does not name keep their values. The module's entries are swapped while
    it runs, so two threads must not call one module object at once.

    Args:
        module: The module.
        params: Dotted parameter name -> tensor.
        args: Positional arguments of the call.
        kwargs: Keyword arguments of the call.
        hooks: Dotted module path -> hook.

    Returns:
        The result of the call.

    Raises:
        UnknownSiteError: If a hook's path is not a submodule.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
        >>> params = {"0.weight": torch.eye(2), "0.bias": torch.zeros(2)}
        >>> functional_call(net, params, (torch.ones(1, 2),), hooks={"1": lambda given, out: -out})
        tensor([[-1., -1.]])
    """
    with forward_hooks(module, hooks or {}):
        # A fresh dict: functional_call writes into the one it is given.
        return torch_functional_call(module, dict(params), tuple(args), dict(kwargs or {}))


@contextmanager
def forward_hooks(module: nn.Module, hooks: Hooks) -> Iterator[None]:
    """Apply hooks to submodules within a `with` block.

    A hook receives the module's first positional argument (or its first tensor keyword argument)
    and the first tensor of its output. Its result replaces that tensor.

    Args:
        module: The module.
        hooks: Dotted module path -> hook.

    Yields:
        Nothing.

    Raises:
        UnknownSiteError: If a path is not a submodule.
    """
    handles = []
    try:
        for path, hook in hooks.items():
            try:
                submodule = module.get_submodule(path)
            except AttributeError as error:
                raise UnknownSiteError(
                    f"a rewrite's site must be a module of {type(module).__name__}, and it has no "
                    f"{path!r}; list the paths with `module.named_modules()`."
                ) from error
            handles.append(submodule.register_forward_hook(_module_hook(hook), with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def compose_hooks(*layers: Hooks) -> dict[str, Hook]:
    """Chain hooks: at a site with several, each receives the output of the one before.

    Args:
        *layers: Hooks in the order in which they run.

    Returns:
        One hook per site.
    """
    composed: dict[str, Hook] = {}
    for hooks in layers:
        for site, hook in hooks.items():
            composed[site] = _chain(composed[site], hook) if site in composed else hook
    return composed


def first_tensor(value: Any) -> Tensor:
    """Return the tensor of a module's output that hooks act on.

    Args:
        value: A tensor, or a tuple whose first item is one.

    Returns:
        The tensor.
    """
    return value if isinstance(value, Tensor) else value[0]


def _chain(first: Hook, second: Hook) -> Hook:
    return lambda given, out: second(given, first(given, out))


def _module_hook(hook: Hook):
    def forward_hook(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        module_input = (
            args[0] if args else next(v for v in kwargs.values() if isinstance(v, Tensor))
        )
        if isinstance(output, Tensor):
            return hook(module_input, output)
        new_output = hook(module_input, output[0])
        if hasattr(output, "keys"):  # a Hugging Face ModelOutput: a dict in order
            key = next(iter(output.keys()))
            return type(output)(**{**output, key: new_output})
        if hasattr(output, "_fields"):
            return type(output)(new_output, *output[1:])
        return type(output)((new_output, *output[1:]))

    return forward_hook
