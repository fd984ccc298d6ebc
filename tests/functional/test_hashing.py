"""Fingerprints: what they depend on, and that they are not computed twice."""

import gc
import hashlib

import torch

from errata.functional.hashing import base_parameter, hash_parameter, mark_edited


def test_it_is_the_sha256_of_the_bytes():
    tensor = torch.arange(12, dtype=torch.float32).view(3, 4)
    want = hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
    assert hash_parameter(tensor) == want
    assert hash_parameter(tensor.T.contiguous().T) == want, "strides do not matter"
    assert hash_parameter(tensor.clone()) == want
    assert hash_parameter(tensor.bfloat16()) != want, "dtype does"
    assert hash_parameter(torch.zeros(0)) == hashlib.sha256(b"").hexdigest()


def test_chunks_are_joined(monkeypatch):
    tensor = torch.arange(1000, dtype=torch.bfloat16)
    want = hash_parameter(tensor.clone())
    monkeypatch.setitem(hash_parameter.__globals__, "_CHUNK", 64)
    assert hash_parameter(tensor) == want


def test_a_tensor_is_hashed_once_until_it_is_written_to(monkeypatch):
    tensor, seen = torch.ones(4), []
    digest = hash_parameter.__globals__["_digest"]
    monkeypatch.setitem(
        hash_parameter.__globals__, "_digest", lambda t: (seen.append(t.shape), digest(t))[1]
    )
    first = hash_parameter(tensor)
    assert hash_parameter(tensor) == first
    assert len(seen) == 1
    tensor.add_(1)
    assert hash_parameter(tensor) != first
    assert len(seen) == 2


def test_memory_is_given_back():
    known = hash_parameter.__globals__["_cached_digests"]
    gc.collect()
    before = len(known)
    tensor = torch.ones(4)
    hash_parameter(tensor)
    assert len(known) == before + 1
    del tensor
    gc.collect()
    assert len(known) == before


def test_inference_tensors_have_fingerprints_too():
    with torch.inference_mode():
        tensor = torch.ones(4)
    assert hash_parameter(tensor) == hash_parameter(torch.ones(4))


def test_an_edited_parameter_remembers_its_origin():
    base = torch.zeros(2)
    once = mark_edited(base + 1, base)
    twice = mark_edited(once + 1, once)
    assert base_parameter(twice) is base
    assert base_parameter(once) is base
    assert base_parameter(base) is base
