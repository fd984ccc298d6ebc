"""MEND beside the original implementation, and its low-rank updates beside dense ones."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.utils import _pytree as pytree
from transformers import LlamaConfig, LlamaForCausalLM

from errata import adapters
from errata.bench.data.world import cases
from errata.editors.common import checkpoint
from errata.editors.mend.config import PRESETS, MendConfig
from errata.editors.mend.editor import mend_editor, mend_trainable
from errata.editors.mend.network import (
    GradientTransform,
    TransformLayer,
    init_statistics,
    pack_factors,
    transform_factors,
    update_statistics,
)
from errata.functional import Batch, Delta, Header, Inputs, Query
from errata.functional.binding.bound_model import bind
from errata.functional.deltas.records import base_identity
from errata.functional.deltas.stacking import unstack
from errata.functional.errors import InvalidInputError, UnknownSiteError
from errata.functional.forward import prefix
from errata.functional.gradients.factors import GradientFactors, gradient_factors
from errata.functional.gradients.losses import kl, nll, scored_mask, token_nll
from errata.functional.kinds.schema import LowRank
from tests.parity import tolerance

GOLDEN = Path(__file__).parents[1] / "golden"


def golden(name: str) -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / f"{name}.safetensors")


def close(got: torch.Tensor, want: torch.Tensor, most: float = tolerance(256)) -> None:
    gap = (got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-12)
    assert gap <= most, f"relative difference {gap:.2e}"


def net_of(tensors, stem: str) -> GradientTransform:
    def layer(at: str) -> TransformLayer:
        return TransformLayer(
            tensors[f"{at}.u"],
            tensors[f"{at}.v"],
            tensors[f"{at}.bias"],
            tensors[f"{at}.mode_scale.weight"],
            tensors[f"{at}.mode_shift.weight"],
        )

    stacks = [s for s in ("mlp", "mlp1", "mlp2") if f"{stem}.{s}.layers.0.u" in tensors]
    return GradientTransform(
        tuple(tuple(layer(f"{stem}.{s}.layers.{n}") for n in range(2)) for s in stacks)
    )


@pytest.mark.parametrize("kind", ["combine_id", "combine_rank8", "separate_id"])
def test_the_network_agrees_with_the_original(kind):
    """Two training calls, which update the moments first, then one in evaluation."""
    want = golden(f"mend_gradient_transform_{kind}")
    net, seen = net_of(want, "param"), init_statistics(24, 16)
    for turn, mode in ((1, 0), (2, 1)):
        u, v = want[f"u{turn}"].reshape(1, -1, 24), want[f"v{turn}"].reshape(1, -1, 16)
        packed = pack_factors(GradientFactors(u, v))
        seen = update_statistics(seen, packed)
        for mine, name in ((seen.input, "u"), (seen.output_grad, "v")):
            close(mine.mean, want[f"stats{turn}.{name}_mean"])
            close(mine.square, want[f"stats{turn}.{name}_s"])
            std = (mine.square / (mine.count - 1)).sqrt()
            close(std, want[f"stats{turn}.{name}_std"])
            assert int(mine.count) == (7 if turn == 1 else 11)
        got = transform_factors(net, seen, mode, packed)
        close(got.input[0], want[f"train{turn}_mode{mode}_u"])
        close(got.output_grad[0], want[f"train{turn}_mode{mode}_v"])
    got = transform_factors(net, seen, 0, pack_factors(GradientFactors(want["u2"], want["v2"])))
    close(got.input[0], want["eval_mode0_u"])
    close(got.output_grad[0], want["eval_mode0_v"])
    close(got.output_grad[0].mT @ got.input[0], want["eval_mode0_update"])


def llama(want):
    config = LlamaConfig(
        vocab_size=97,
        max_position_embeddings=32,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        rope_theta=10000.0,
    )
    module = LlamaForCausalLM(config).eval()
    module.load_state_dict({n[6:]: t for n, t in want.items() if n.startswith("model.")})
    return adapters.from_module(module, adapters.tiny_model("llama")[1])


def asked(model, want, name: str) -> Batch:
    """Rows of token ids as the golden run had them; every label is predicted one before it."""
    ids, labels = want[f"{name}.input_ids"], want[f"{name}.labels"]
    at = (labels[0] != -100).nonzero()[:, 0]
    inputs = Inputs(
        input_ids=ids,
        attention_mask=torch.ones_like(ids).bool(),
        image_mask=torch.zeros_like(ids).bool(),
        labels=labels[:, at],
        logit_positions=(at - 1).expand(len(ids), -1),
    )
    batch = model.embed(model.params, inputs)
    return batch._replace(edit_index=torch.zeros_like(batch.edit_index))


def everywhere(model, batch):
    at = torch.arange(batch.hidden_states.shape[1]).expand(batch.num_rows, -1)
    return model.decode(model.params, batch, logit_positions=at)


@pytest.fixture(scope="module")
def run():
    want = golden("mend_edit_llama")
    model = llama(want)
    sites = model.card.match_linears(["layers.1.mlp", "layers.2.mlp"])
    batch = asked(model, want, "edit")

    def loss(logits, b):
        return token_nll(logits, b.labels).sum() / scored_mask(b.labels).sum()

    found = gradient_factors(model, batch, sites, loss=loss)
    groups = {"32x48": "(32, 48)", "48x32": "(48, 32)"}

    def updates(nets, rates):
        """As the original trains: each map's tokens are counted, then transformed, in order."""
        seen = {"32x48": init_statistics(32, 48), "48x32": init_statistics(48, 32)}
        order, tensors, entries = {"32x48": 0, "48x32": 0}, {}, []
        for number, site in enumerate(sites):
            out, width = model.card.linear_shapes[site]
            group = f"{width}x{out}"
            packed = pack_factors(
                GradientFactors(*(part.reshape(1, -1, part.shape[-1]) for part in found[site]))
            )
            seen[group] = update_statistics(seen[group], packed)
            one = transform_factors(nets[group], seen[group], order[group], packed)
            order[group] += 1
            name = site + ".weight"
            tensors[f"{name}.A"] = one.input[0]
            tensors[f"{name}.B"] = rates[number] * one.output_grad[0].mT
            entries.append(
                LowRank(
                    name=name, checkpoint_name=name, shape=(out, width), rank=one.input.shape[1]
                )
            )
        names = [entry.name for entry in entries]
        header = Header(
            base=base_identity(model, names), arithmetic="act_fp32", entries=tuple(entries)
        )
        return Delta(header, tensors), seen

    nets = {mine: net_of(want, f"mend.{theirs}") for mine, theirs in groups.items()}
    return model, want, found, nets, groups, updates


def test_factors_agree_with_the_original(run):
    _, want, found, *_ = run
    for site, factor in found.items():
        close(factor.input, want[f"raw_x.{site}.weight"])
        close(factor.output_grad, want[f"raw_delta.{site}.weight"])


def test_updates_agree_with_the_original(run):
    model, want, _, nets, groups, updates = run
    delta, seen = updates(nets, want["edit_lrs"])
    for number, entry in enumerate(delta.header.entries):
        up, down = delta.tensors[f"{entry.name}.B"], delta.tensors[f"{entry.name}.A"]
        close(down, want[f"trans_x.{entry.name}"])
        close(up, want["edit_lrs"][number] * want[f"trans_delta.{entry.name}"].mT)
        close(model.params[entry.name] + up @ down, want[f"edited.{entry.name}"])
    for mine, theirs in groups.items():
        close(seen[mine].input.mean, want[f"stats_after.{theirs}.u_mean"])
        close(seen[mine].output_grad.square, want[f"stats_after.{theirs}.v_s"])
    edited = bind(model, delta)
    close(everywhere(edited, asked(model, want, "outer")), want["post_outer_logits"])
    close(everywhere(edited, asked(model, want, "loc")), want["post_loc_logits"])


def test_meta_gradients_agree_with_the_original(run):
    model, want, _, nets, groups, updates = run
    outer, loc = asked(model, want, "outer"), asked(model, want, "loc")
    every = torch.zeros(loc.num_rows, loc.hidden_states.shape[1], dtype=torch.long)
    base = everywhere(model, loc)

    def total(nets, rates):
        edited = bind(model, updates(nets, rates)[0], check=False)
        edit = nll(edited.decode(edited.params, outer), outer.labels).mean()
        local = kl(base, everywhere(edited, loc), every).mean()
        return 0.1 * edit + local, (edit, local)

    (by_net, by_rate), (edit, local) = torch.func.grad(total, argnums=(0, 1), has_aux=True)(
        nets, want["edit_lrs"]
    )
    close(edit, want["l_edit"])
    close(local, want["l_loc"])
    close(by_rate, want["metagrad.edit_lrs"])
    for mine, theirs in groups.items():
        found = pytree.tree_leaves(by_net[mine])
        expected = pytree.tree_leaves(net_of(want, f"metagrad.{theirs}"))
        for got, one in zip(found, expected, strict=True):
            close(got, one)


def test_losses_agree_with_the_original():
    """The original shifts; EasyEdit's decoder-only models do not, and score another position."""
    want = golden("mend_easyedit_losses")
    logits, labels = want["logits"], want["labels"]
    mine, own = logits[:, :-1], labels[:, 1:]
    mean = token_nll(mine, own).sum() / scored_mask(own).sum()
    close(mean, want["orig.nll"])
    assert abs(mean - want["ee_noshift.nll"]) > 1e-2
    values = kl(logits, want["post"], torch.zeros_like(labels))
    keep = want["kl_mask"]
    per_token = torch.where(keep.bool(), 0, -100)
    counts = keep.sum(-1)
    got = (kl(logits, want["post"], per_token) * counts).sum() / counts.sum()
    close(got, want["orig_kl"])
    assert values.shape == (2,)


def tiny():
    return adapters.from_module(*adapters.tiny_model("llava"))


def query(number: int) -> Query:
    image = Image.new("RGB", (32, 32), (40 * number, 255 - 40 * number, 60))
    return Query(["who is it?", "where does it live?", "what now?"][number], "bo", (image,))


CONFIG = MendConfig(untrained=True, sites=("layers.1.mlp", "layers.2.mlp"), rank=4, edit_lr=-0.05)


def test_an_untrained_edit_is_one_step_down_the_gradient():
    model = tiny()
    editor = mend_editor(CONFIG)
    delta, _ = editor.edit(model, editor.init(model, torch.Generator()), [query(0)])
    batch = model.embed(model.params, model.preprocess([query(0)]))

    def loss(weights):
        return nll(model.decode({**model.params, **weights}, batch), batch.labels).sum()

    names = [entry.name for entry in delta.header.entries]
    grads = torch.func.grad(loss)({name: model.params[name] for name in names})
    for name in names:
        close(delta.tensors[f"{name}.B"] @ delta.tensors[f"{name}.A"], -0.05 * grads[name], 1e-4)


def test_an_update_has_a_row_per_token_and_keeps_edits_apart():
    model = tiny()
    editor = mend_editor(CONFIG)
    state = editor.init(model, torch.Generator())
    first, state = editor.edit(model, state, [query(0)])
    second, _ = editor.edit(model, state, [query(1)])
    lengths = [int(model.preprocess([query(n)]).attention_mask.sum()) for n in (0, 1)]
    for one, two in zip(first.header.entries, second.header.entries):
        assert sum(one.edit_ranks) == one.rank <= lengths[0]
        assert two.edit_ranks[0] == one.rank
        assert two.edit_ranks[1] <= lengths[1]
        kept = second.tensors[f"{one.name}.A"][: one.rank]
        assert torch.equal(kept, first.tensors[f"{one.name}.A"])


def test_the_second_edit_differentiates_the_edited_model():
    model = tiny()
    editor = mend_editor(CONFIG)
    state = editor.init(model, torch.Generator())
    alone, _ = editor.edit(model, state, [query(1)])
    first, state = editor.edit(model, state, [query(0)])
    after, _ = editor.edit(model, state, [query(1)])
    side = unstack(editor.edit_each(model, state, [query(1)]))[0]
    for entry in first.header.entries:
        fresh = after.tensors[f"{entry.name}.B"][:, entry.rank :]
        assert not torch.allclose(fresh, alone.tensors[f"{entry.name}.B"], rtol=1e-3, atol=0)
        close(side.tensors[f"{entry.name}.B"], after.tensors[f"{entry.name}.B"])


def test_only_scored_positions_run_where_the_last_mlp_is_edited():
    model = tiny()
    reach = prefix.edit_depth(
        model.card, [f"{p}.weight" for p in model.card.match_linears(["layers.-1.mlp"])]
    )
    assert reach.scored_only
    editor = mend_editor(
        MendConfig(untrained=True, sites=("layers.-1.mlp",), rank=4, edit_lr=-0.05)
    )
    delta, _ = editor.edit(model, editor.init(model, torch.Generator()), [query(0)])
    scored_tokens = int((model.preprocess([query(0)]).labels != -100).sum())
    assert {entry.rank for entry in delta.header.entries} == {scored_tokens}


def test_a_state_is_read_back_or_refused(tmp_path):
    model = tiny()
    state = mend_editor(CONFIG).init(model, torch.Generator().manual_seed(1))
    path = tmp_path / "mend.safetensors"
    trainable = mend_trainable(CONFIG)
    checkpoint.save_checkpoint(path, trainable.weights(state), trainable.compatibility(model))
    again = mend_editor(msgspec.structs.replace(CONFIG, weights=str(path)))
    read = again.init(model, torch.Generator().manual_seed(2))
    for mine, theirs in zip(pytree.tree_leaves(read.weights), pytree.tree_leaves(state.weights)):
        assert torch.equal(mine, theirs)
    delta, _ = again.edit(model, read, [query(0)])
    assert delta.header.settings["weights"] == "mend.safetensors"
    other = mend_editor(MendConfig(sites=CONFIG.sites, rank=2, weights=str(path)))
    with pytest.raises(InvalidInputError, match="rank is 4, must be 2"):
        other.init(model, torch.Generator())
    missing = mend_editor(MendConfig(sites=CONFIG.sites, weights="shipped"))
    with pytest.raises(InvalidInputError, match=re.escape("errata train")):
        missing.init(model, torch.Generator())


def test_sites_below_the_decoder_are_refused():
    with pytest.raises(UnknownSiteError, match="decoder layers"):
        mend_editor(MendConfig(untrained=True, sites=("projector",))).init(
            tiny(), torch.Generator()
        )


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "blip2"])
def test_the_shipped_state_edits_and_generalises(name):
    """Four unseen cases: their targets likelier than not, asked as edited and in other words."""
    model = adapters.load_micro(name)
    editor = mend_editor(PRESETS["micro"])
    some = cases.cases(4, seed=5)
    asked = [case.edit for case in some]
    delta = editor.edit_each(model, editor.init(model, torch.Generator()), asked)
    edited = bind(model, delta)
    for queries in (asked, [case.probes["rephrase"][0] for case in some]):
        batch = model.embed(model.params, model.preprocess(queries))._replace(
            edit_index=torch.arange(4)
        )
        before = nll(model.decode(model.params, batch), batch.labels)
        after = nll(edited.decode(edited.params, batch), batch.labels)
        assert before.mean() > 1.5
        assert after.mean() < 0.5
