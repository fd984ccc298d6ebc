"""Ledger rows of our own making for tests of what is done with them."""

from errata.bench.storage.results_log import ProbeAnswer, ResultRow


def row(case, probe="reliability", score=1.0, **more):
    """One row; `score` is given, everything else has a plain value."""
    loc = "locality" in probe
    plain = {
        "run": "r1",
        "model": "blip2-opt-2.7b",
        "editor": "finetune",
        "protocol": "single",
        "evaluated_at": "after_edit",
        "case_number": 0,
        "index": 0,
        "scorer": "errata",
        "seed": 0,
        "prompt": "What city?",
        "target": "Rome",
        "base": 0.0,
        "versions": "errata 0.1.0",
        "before": ProbeAnswer(text="Paris", accuracy=float(loc), exact_match=loc, nll=3.0),
        "after": ProbeAnswer(
            text="Rome" if score == 1 else "Milan", accuracy=score, exact_match=score == 1, nll=0.1
        ),
    }
    return ResultRow(**{**plain, "case": case, "probe": probe, "score": score, **more})
