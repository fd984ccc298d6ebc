"""Benchmark data, protocols, the ledger of a run, reports and the command line."""
