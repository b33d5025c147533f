"""Commands that measure; each prints what the README or benchmarks/RESULTS.md quotes."""
