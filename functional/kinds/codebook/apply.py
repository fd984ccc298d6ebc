"""A codebook at a linear map, as a rewrite: the nearest key of each row, and its value.

The nearest key is found by `errata.kernels.codebook.lookup_key`, whose kernel serves SERAC too.
Which key an edit gets or joins is decided while editing: `editors/grace/codebook.py`.

Legend: B rows · L tokens · E edits · N keys · I width of a key · O width of a value.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from errata.functional.card import module_path
from errata.functional.errors import UnknownSiteError
from errata.functional.header import Header
from errata.functional.kinds.codebook.entry import Codebook, Replacement
from errata.functional.kinds.common.patch import Patch
from errata.functional.types import Batch, Model
from errata.kernels import codebook as kernel

__all__ = ["apply_codebook", "codebook_hook", "last_prompt_input", "replace_at", "replaced_tokens"]


def codebook_hook(
    entry: Codebook, tensors: Mapping[str, Tensor], *, stacked: bool
) -> Callable[[Batch, Tensor, Tensor], Tensor]:
    """Make the hook by which a codebook changes the outputs of its linear map.

    With x the map's inputs and y its outputs:

        q_b = x[b, t_b],  t_b the last prompt token of row b
        n_b = argmin_n |keys_n - q_b|
        y'[b, l] = values[n_b]  if |keys_(n_b) - q_b| <= radii_(n_b) and l is one of `where`
                   y[b, l]      otherwise

    A batch without a row's last prompt token (tokens generated after it) leaves the row unchanged:
    the prompt's change is in its cached keys and values. After GRACE (Hartvigsen et al. 2023, arXiv
    2211.11031), `GRACEAdapter.forward`.

    Args:
        entry: Entry of the delta.
        tensors: `NAME.keys` [N I], `NAME.values` [N O] and `NAME.radii` [N]; with a leading E if
            `stacked`.
        stacked: Whether each row uses the codebook of its own edit, and rows of edit -1 none.

    Returns:
        `hook(batch, x, y)`, which returns the new output.
    """
    keys, values, radii = (tensors[f"{entry.name}.{part}"] for part in ("keys", "values", "radii"))
    keys = keys.float()
    norms = None if stacked else kernel.square_norms(keys)

    def hook(batch: Batch, x: Tensor, y: Tensor) -> Tensor:
        query = last_prompt_input(batch, x).float()  # [B I]
        has_prompt_end = batch.prompt_end.any(1)
        if stacked:
            edit_rows = batch.edit_index.clamp_min(0)
            lookup = torch.vmap(kernel.lookup_key)(
                query[:, None], keys[edit_rows], radii[edit_rows]
            )
            index, hit = (
                lookup.index[:, 0],
                lookup.hit[:, 0] & has_prompt_end & (batch.edit_index >= 0),
            )
            chosen = values[edit_rows, index.clamp_min(0)]
        else:
            lookup = kernel.lookup_key(query, keys, radii, norms=norms)
            index, hit = lookup.index, lookup.hit & has_prompt_end
            chosen = values[index.clamp_min(0)]  # [B O]
        return replace_at(y, chosen, hit[:, None] & replaced_tokens(batch, entry.replacement))

    return hook


def last_prompt_input(batch: Batch, x: Tensor) -> Tensor:
    """The input of a map at each row's last prompt token, or at its first token if it has none.

    Args:
        batch: The rows that are run.
        x: Inputs of the map, [B L I], or [B*L I] where a layer flattens rows and tokens (OPT does).

    Returns:
        [B I], detached.
    """
    prompt_end = batch.prompt_end.int().argmax(1)[:, None, None]  # [B 1 1]
    x = x.reshape(*batch.prompt_end.shape, -1)
    return x.gather(1, prompt_end.expand(-1, 1, x.shape[-1]))[:, 0].detach()


def replaced_tokens(batch: Batch, replacement: Replacement) -> Tensor:
    """The tokens whose output a value replaces.

    Args:
        batch: The rows that are run.
        replacement: `last` token of the prompt, the `prompt` tokens before it, or `all` of the
            prompt.

    Returns:
        Mask [B L].
    """
    if replacement == "last":
        return batch.prompt_end
    in_prompt = batch.prompt_end.int().flip(1).cumsum(1).flip(1) > 0
    return in_prompt if replacement == "all" else in_prompt & ~batch.prompt_end


def replace_at(y: Tensor, values: Tensor, token_mask: Tensor) -> Tensor:
    """Put values in the place of outputs at some tokens; differentiable in both.

    Args:
        y: Outputs, [B L O] or [B*L O].
        values: One value per row, [B O].
        token_mask: Which tokens to replace, [B L].

    Returns:
        Outputs of the shape of `y`.
    """
    rows = y.reshape(*token_mask.shape, -1)
    return torch.where(token_mask[..., None], values[:, None].to(y.dtype), rows).view(y.shape)


def apply_codebook(
    model: Model, header: Header, entry: Codebook, tensors: Mapping[str, Tensor]
) -> Patch:
    """Build a codebook's patch: a value replaces the output where the key of the prompt is matched.

    Args:
        model: Model to bind to.
        header: Header of the delta.
        entry: Entry of the delta.
        tensors: Tensors of the delta.

    Returns:
        A patch with one hook.

    Raises:
        UnknownSiteError: If the site is not a linear map of the decoder.
    """
    path = module_path(model.card.canonical_name(entry.name))
    if path not in model.card.linear_shapes or model.card.before_decoder(path):
        raise UnknownSiteError(
            f"a codebook's site must be a linear map in the decoder of {model.card.id}, and "
            f"{path!r} is none."
        )
    hook = codebook_hook(entry, tensors, stacked=bool(header.stack))
    return Patch(hooks=lambda batch: {path: partial(hook, batch)})
