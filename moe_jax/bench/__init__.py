"""The benchmarks behind the figures: ratios to a floor measured in the same run."""
