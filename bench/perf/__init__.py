"""pytest-benchmark suites: each proves what it times, and reports ratios within one run."""
