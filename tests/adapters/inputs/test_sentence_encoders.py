"""Sentence encoders through transformers."""

from __future__ import annotations

import socket

import msgspec
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from errata import adapters
from errata.adapters.inputs import sentence_encoders
from errata.adapters.inputs.sentence_encoders import load_sentence_encoder, register_encoder_path
from errata.editors.ike import IkeConfig, ike_editor
from errata.functional import Query, bind
from errata.functional.errors import InvalidSettingsError
from errata.functional.forward.retrieval_keys import get_encoder
from errata.functional.kinds.prompt.apply import expand_prompts

WORDS = ["[PAD]", "[UNK]", "who", "is", "it", "where", "does", "live", "?", "bo"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random BERT with a tokenizer of ten words, as sentence-transformers lays one out."""
    home = tmp_path_factory.mktemp("models") / "little-bert"
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", model_max_length=32
    )
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
    )
    BertModel(config).save_pretrained(home)
    tokenizer.save_pretrained(home)
    return home


def test_keys_are_means_over_tokens_whatever_the_company(folder):
    encode = load_sentence_encoder(str(folder))
    together = encode(["who is it?", "it"])
    assert together.shape == (2, 16)
    torch.testing.assert_close(together.norm(dim=1), torch.ones(2))
    torch.testing.assert_close(together[1:], encode(["it"]))


def test_edits_are_found_by_a_sentence_encoder_that_files_name(folder):
    model = adapters.from_module(*adapters.tiny_model("llava"))
    editor = ike_editor(IkeConfig(encoder=f"sentence:{folder}", match_images=False))
    state = editor.init(model, torch.Generator())
    edits = [Query("who is it?", "bo"), Query("where does bo live?", "rome")]
    delta, _ = editor.edit(model, state, edits)
    assert delta.header.entries[0].encoder == "sentence:little-bert"
    assert str(folder) not in str(delta.header.settings)
    register_encoder_path("little-bert", folder)
    (read,) = expand_prompts(bind(model, delta), [Query("where does it live?")])
    assert read.prompt.startswith("New Fact: where does bo live? rome\n")


def test_a_name_in_a_delta_loads_nothing_that_the_caller_did_not_name(folder, monkeypatch):
    """Neither a folder of that name here, nor the hub: no socket is opened."""

    def refuse(*args, **more):
        raise AssertionError("a socket was opened")

    model = adapters.from_module(*adapters.tiny_model("llava"))
    editor = ike_editor(IkeConfig(encoder=f"sentence:{folder}", match_images=False))
    delta, _ = editor.edit(model, editor.init(model, torch.Generator()), [Query("who?", "bo")])
    register_encoder_path("little-bert", folder)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.chdir(folder.parent)  # holds a folder `little-bert`
    monkeypatch.setattr(sentence_encoders, "_ENCODER_PATHS", {})
    entry = delta.header.entries[0]
    for name in ("little-bert", "nobody/nothing", "all-MiniLM-L6-v2"):
        named = msgspec.structs.replace(entry, encoder=f"sentence:{name}")
        header = msgspec.structs.replace(delta.header, entries=(named,))
        with pytest.raises(InvalidSettingsError, match="must have a place, and none is named"):
            bind(model, delta._replace(header=header))
    known = adapters.from_module(
        *adapters.tiny_model("llava"), encoders={"little-bert": str(folder)}
    )
    assert bind(known, delta).preprocess([Query("who?")]).input_ids.numel()


def test_an_encoder_that_is_not_there_is_said_so(tmp_path):
    model = adapters.from_module(*adapters.tiny_model("llava"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        InvalidSettingsError, match=r"must be a sentence-transformers model .* 'hashed'"
    ):
        get_encoder(f"sentence:{tmp_path / 'empty'}", model)
