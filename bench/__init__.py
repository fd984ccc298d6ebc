"""Benchmark data, protocols, results logs, reports and the command line."""
