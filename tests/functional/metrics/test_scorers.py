"""Scorers against the peers' own outputs (tests/golden) and against sums done by hand."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from errata.functional.errors import InvalidSettingsError
from errata.functional.metrics import readout, scorers
from errata.functional.metrics.conventions import SCORERS, Agreement, get_probe, get_scorer
from errata.functional.metrics.readout import Readout, make_readout
from errata.functional.metrics.scorers import score_probe
from errata.functional.types import IGNORE_INDEX

GOLDEN = Path(__file__).parents[2] / "golden"


def golden(name):
    return load_file(GOLDEN / f"{name}.safetensors")


def shifted(logits, labels):
    """What our `decode` hands a scorer: logits that predict the label of the same position."""
    return logits[:, :-1], labels[:, 1:]


# ------------------------------------------------------------------ the peers' golden vectors
@pytest.mark.parametrize("case", range(4))
@pytest.mark.parametrize("path", ["hf", "blip"])
def test_token_accuracy_and_exact_match_equal_easyedit(case, path):
    tensors = golden("easyedit_token_acc")
    logits, labels = shifted(tensors[f"{case}.logits"], tensors[f"{case}.labels"])
    out = make_readout(logits, labels, k=1)
    ids = out.top_ids[..., 0]
    # EasyEdit pools the tokens of a batch; it always runs one row, where both are the same
    per_row = (labels != IGNORE_INDEX).sum(-1)
    pooled = (scorers.token_accuracy(ids, labels) * per_row).sum() / per_row.sum()
    assert pooled == pytest.approx(tensors[f"{case}.{path}_acc.exact0"].item(), abs=1e-7)
    assert scorers.exact_match(ids, labels).mean() == tensors[f"{case}.{path}_acc.exact1"]
    wanted = tensors.get(f"{case}.blip_pred_ids")
    assert torch.equal(torch.where(labels != IGNORE_INDEX, ids, 0), wanted)


def whole(logits, k):
    return logits.topk(min(k, logits.shape[-1]), dim=-1).indices


@pytest.mark.parametrize("k", [1, 10, 100])
@pytest.mark.parametrize("other", ["post", "post_long", "short"])
def test_ordered_agreement_over_all_positions_equals_easyedit(k, other):
    tensors = golden("easyedit_locality_topk")
    pre = tensors["pre"]
    post = pre[:, -5:] if other == "short" else tensors[other]
    blank = torch.zeros(1, 1, dtype=torch.int64)
    one = Readout(blank, blank[..., None], blank.float(), whole(pre, k))
    two = Readout(blank, blank[..., None], blank.float(), whole(post, k))
    got = scorers.locality(Agreement(k=k, positions="all"), one, two)
    name = {"post": "match", "post_long": "match_long", "short": "match_short"}[other]
    assert torch.equal(got, tensors[f"{name}.k{k}"][None])
    if other == "post":
        assert torch.equal(one.all_top_ids, tensors[f"pre_ids.k{k}"])


def test_losses_and_accuracy_equal_liveedit():
    tensors = golden("liveedit_losses_acc")
    length = tensors["label_ids"].shape[1]
    logits, logits2 = tensors["logits"][:, -length:], tensors["logits2"][:, -length:]
    keep = tensors["mask"].bool()
    labels = torch.where(keep, tensors["label_ids"], IGNORE_INDEX)
    out = make_readout(logits, labels, k=1)
    share = keep.sum(-1) / keep.sum()  # LiveEdit pools tokens of the batch in its losses
    nll = scorers.mean_nll(out.nll, labels)
    torch.testing.assert_close((nll * share).sum(), tensors["label_loss"])
    kl = readout.mean_kl(logits, logits2, keep)
    torch.testing.assert_close((kl * share).sum(), tensors["kl_12"])
    back = readout.mean_kl(logits2, logits, keep)
    torch.testing.assert_close((back * share).sum(), tensors["kl_21"])
    assert torch.equal(scorers.token_accuracy(out.top_ids[..., 0], labels), tensors["acc"])


# ------------------------------------------------------------------ by hand
def rows(*labels):
    width = max(map(len, labels))
    return torch.tensor([[*row, *[IGNORE_INDEX] * (width - len(row))] for row in labels])


def test_rows_are_scored_one_by_one_never_pooled():
    labels = rows([1, 2, 3, 4], [5])
    ids = torch.tensor([[1, 2, 3, 4], [9, 9, 9, 9]])
    assert scorers.token_accuracy(ids, labels).tolist() == [1.0, 0.0]
    assert scorers.token_accuracy(ids, labels).mean() == 0.5  # pooling would say 0.8


def test_a_row_without_labels_is_nan_not_perfect():
    labels = rows([], [1])
    ids = torch.ones(2, 1, dtype=torch.int64)
    for measure in (scorers.token_accuracy, scorers.exact_match):
        assert measure(ids, labels).isnan().tolist() == [True, False]


def test_ignored_positions_never_matter():
    labels = rows([3, 4], [5])
    logits = torch.randn(2, 2, 8)
    spoiled = logits.clone()
    spoiled[1, 1] = torch.randn(8) * 100
    clean, dirty = make_readout(logits, labels, k=3), make_readout(spoiled, labels, k=3)
    for rule in SCORERS.values():
        if not rule.needs_all_positions:
            one = score_probe(rule, "image_locality", clean, clean)
            two = score_probe(rule, "image_locality", clean, dirty)
            assert all(map(torch.equal, one, two))
    assert torch.equal(clean.nll, dirty.nll)


def test_rank_order_is_harsher_than_sets():
    base = torch.tensor([[[1, 2, 3, 4]]])
    keep = torch.tensor([[True]])
    pushed = torch.tensor([[[9, 1, 2, 3]]])  # one newcomer shifts the rest
    assert scorers.agreement(base, pushed, keep).tolist() == [0.0]
    assert scorers.agreement(base, pushed, keep, ordered=False).tolist() == [0.75]
    swapped = torch.tensor([[[1, 3, 2, 4]]])
    assert scorers.agreement(base, swapped, keep).tolist() == [0.5]


def test_alignment_is_per_row_on_real_positions_only():
    base = torch.tensor([[[1], [2], [3], [-1]], [[4], [5], [-1], [-1]]])
    longer = torch.tensor(
        [[[7], [8], [1], [2], [3], [-1]], [[8], [4], [9], [-1], [-1], [-1]]]
    )  # a prompt-based editor puts tokens in front
    blank = torch.zeros(2, 1, dtype=torch.int64)
    one = Readout(blank, blank[..., None], blank.float(), base)
    two = Readout(blank, blank[..., None], blank.float(), longer)
    rule = Agreement(k=1, positions="all")
    assert scorers.locality(rule, one, two).tolist() == [1.0, 0.5]
    assert scorers.locality(rule, two, one).tolist() == [1.0, 0.5]


def test_a_scorer_over_all_positions_refuses_an_answer_only_reading():
    out = make_readout(torch.randn(1, 1, 4), rows([1]))
    with pytest.raises(InvalidSettingsError, match="all positions"):
        score_probe(get_scorer("easyedit"), "text_locality", out, out)


def test_text_and_image_locality_use_their_own_rule():
    labels = rows([0])
    base = Readout(labels, torch.tensor([[[1, 2, 3]]]), torch.zeros(1, 1))
    edited = Readout(labels, torch.tensor([[[1, 3, 2]]]), torch.zeros(1, 1))
    rule = get_scorer("comprehendedit")
    assert score_probe(rule, "text_locality", base, edited).agreement.tolist() == [1.0]
    image = score_probe(rule, "image_locality", base, edited).agreement
    torch.testing.assert_close(image, torch.tensor([1 / 3]))
    assert score_probe(rule, "rephrase", base, edited).agreement is None


def test_an_unedited_model_agrees_with_itself_under_every_scorer():
    labels = rows([1, 2], [3])
    logits = torch.randn(2, 2, 12)
    out = make_readout(logits, labels, all_top_ids=whole(torch.randn(2, 5, 12), 10))
    for rule in SCORERS.values():
        for name in ("text_locality", "image_locality"):
            assert score_probe(rule, name, out, out).agreement.tolist() == [1.0, 1.0]


def test_scorers_are_known_by_name():
    assert set(SCORERS) == {
        "errata",
        "easyedit",
        "vlkeb",
        "mmke",
        "comprehendedit",
        "liveedit",
        "ice",
    }
    assert all(rule.source for rule in SCORERS.values())
    assert get_scorer("easyedit").num_ranks == 10
    assert get_scorer("easyedit").needs_all_positions
    with pytest.raises(InvalidSettingsError, match="must be one of errata, easyedit.*got 'bleu'"):
        get_scorer("bleu")


@pytest.mark.parametrize(
    ("name", "column", "kind"),
    [
        ("reliability", "Rel", "success"),
        ("portability_3hop", "Port 3hop", "success"),
        ("text_locality_forgetfulness", "T-Loc forgetfulness", "locality"),
        ("my_locality", "My locality", "locality"),
        ("image_reliability", "I-Rel", "success"),
    ],
)
def test_probe_names(name, column, kind):
    assert (get_probe(name).column, get_probe(name).kind) == (column, kind)


def test_perplexity_is_the_papers_formula():
    nll = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    given = torch.tensor([[True, True, False, False]])
    ratio = scorers.perplexity_ratio(
        scorers.perplexity(nll, ~given), scorers.perplexity(nll, given)
    )
    torch.testing.assert_close(ratio, torch.tensor([2.0]).exp())  # exp(3.5) / exp(1.5)


def test_neighbour_match_counts_missing_neighbours_as_misses():
    said = [["red", "two", "cat"], ["dog"]]
    gold = [["red ", "2", "cat"], ["dog"]]
    assert scorers.neighbor_match(said, gold, k=2) == 50.0  # (1 + 1) / (2 * 2)
    assert scorers.neighbor_match(said, gold, k=1, from_end=True) == 100.0
    with pytest.raises(InvalidSettingsError, match="got k=0"):
        scorers.neighbor_match(said, gold, k=0)


def test_divergence_is_zero_only_for_equal_distributions():
    logits, keep = torch.randn(3, 4, 7), torch.ones(3, 4, dtype=torch.bool)
    torch.testing.assert_close(readout.mean_kl(logits, logits + 5, keep), torch.zeros(3))
    assert (readout.mean_kl(logits, torch.randn(3, 4, 7), keep) > 0).all()


def test_scores_pass_through_vmap():
    labels, ids = rows([1, 2], [3]), torch.tensor([[1, 0], [3, 0]])
    stacked = torch.vmap(scorers.token_accuracy)(ids[:, None], labels[:, None])
    assert torch.equal(stacked[:, 0], scorers.token_accuracy(ids, labels))
