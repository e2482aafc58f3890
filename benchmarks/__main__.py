"""Run a benchmark by name: `python -m benchmarks core`."""

import argparse
import importlib


def main() -> None:
    """Read the options and run the benchmark."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("name", choices=["core", "durability", "language", "planning", "tables", "torture"])
    importlib.import_module(f"benchmarks.{parser.parse_args().name}").run()


if __name__ == "__main__":
    main()
