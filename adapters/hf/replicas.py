"""Skeletons: per-thread copies of a module's structure that share its weights.

`functional_call` swaps parameters inside the module object, so one module must not run in two
threads at once, and rewrites hang on it as hooks. Each thread therefore gets its own tree of
modules; parameters and buffers are the base's own tensors, so a skeleton costs no weights.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface

from errata.adapters.hf.attention import (
    EXPLICIT_ATTENTION,
    _explicit_attention,
    _explicit_mask,
    set_attention,
)

__all__ = ["ThreadReplicas", "replaced_forwards"]

AttentionInterface.register(EXPLICIT_ATTENTION, _explicit_attention)
AttentionMaskInterface.register(EXPLICIT_ATTENTION, _explicit_mask)


class ThreadReplicas:
    """One skeleton of `module` per thread, made when a thread first asks.

    `attention` is set on the configs below `decoder` only, so that vision towers run as they
    came; None leaves them all. The master copy is never run, the base module never touched.
    """

    def __init__(self, module: nn.Module, decoder: str, attention: str | None) -> None:
        self._shared = {id(t): t for t in (*module.parameters(), *module.buffers())}
        self._prototype = self._copy(module)
        self._prototype.eval()
        if attention is not None:
            set_attention(self._prototype.get_submodule(decoder), attention)
        self._local = threading.local()

    def get(self) -> nn.Module:
        if not hasattr(self._local, "module"):
            self._local.module = self._copy(self._prototype)
        return self._local.module

    def _copy(self, module: nn.Module) -> nn.Module:
        return copy.deepcopy(module, dict(self._shared))


@contextmanager
def replaced_forwards(modules: Sequence[nn.Module], forwards: Sequence[Callable]) -> Iterator[None]:
    """Replace the forwards of modules within a `with` block.

    Args:
        modules: Modules.
        forwards: The forward of each.

    Yields:
        Nothing.
    """
    originals = [
        vars(module).get("forward") for module in modules
    ]  # accelerate keeps its own there
    try:
        for module, forward in zip(modules, forwards, strict=True):
            module.forward = forward
        yield
    finally:
        for module, original in zip(modules, originals):
            if original is None:
                vars(module).pop("forward", None)
            else:
                module.forward = original
