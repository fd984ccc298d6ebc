"""Fingerprints: what they depend on, and that they are not computed twice."""

import gc
import hashlib

import torch

from errata.functional.fingerprint import derive, fingerprint, origin


def test_it_is_the_sha256_of_the_bytes():
    tensor = torch.arange(12, dtype=torch.float32).view(3, 4)
    want = hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
    assert fingerprint(tensor) == want
    assert fingerprint(tensor.T.contiguous().T) == want, "strides do not matter"
    assert fingerprint(tensor.clone()) == want
    assert fingerprint(tensor.bfloat16()) != want, "dtype does"
    assert fingerprint(torch.zeros(0)) == hashlib.sha256(b"").hexdigest()


def test_chunks_are_joined(monkeypatch):
    tensor = torch.arange(1000, dtype=torch.bfloat16)
    want = fingerprint(tensor.clone())
    monkeypatch.setitem(fingerprint.__globals__, "_CHUNK", 64)
    assert fingerprint(tensor) == want


def test_a_tensor_is_hashed_once_until_it_is_written_to(monkeypatch):
    tensor, seen = torch.ones(4), []
    digest = fingerprint.__globals__["_digest"]
    monkeypatch.setitem(
        fingerprint.__globals__, "_digest", lambda t: (seen.append(t.shape), digest(t))[1]
    )
    first = fingerprint(tensor)
    assert fingerprint(tensor) == first
    assert len(seen) == 1
    tensor.add_(1)
    assert fingerprint(tensor) != first
    assert len(seen) == 2


def test_memory_is_given_back():
    known = fingerprint.__globals__["_known"]
    gc.collect()
    before = len(known)
    tensor = torch.ones(4)
    fingerprint(tensor)
    assert len(known) == before + 1
    del tensor
    gc.collect()
    assert len(known) == before


def test_inference_tensors_have_fingerprints_too():
    with torch.inference_mode():
        tensor = torch.ones(4)
    assert fingerprint(tensor) == fingerprint(torch.ones(4))


def test_an_edited_parameter_remembers_its_origin():
    base = torch.zeros(2)
    once = derive(base + 1, base)
    twice = derive(once + 1, once)
    assert origin(twice) is base
    assert origin(once) is base
    assert origin(base) is base
