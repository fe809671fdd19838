"""The benchmark suite: this package beside what one would use instead. `python -m bench --help`, bench/README.md."""
