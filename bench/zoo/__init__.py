"""Training of the micro zoo: `python -m errata.bench.zoo train llava` makes a checkpoint anew."""
