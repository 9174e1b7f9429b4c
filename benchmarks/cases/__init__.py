"""What benchmarks/speed.py measures, one file for each part of a run."""
