"""Speed and memory as ratios against a peer or a limit, measured in one run: `python -m benchmarks NAME`."""
