"""Run a benchmark by name: `python -m benchmarks core`."""

import argparse
import importlib


def main() -> None:
    """Read the options and run the benchmark."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("name", choices=["core", "durability", "language", "ray", "tables", "torture"])
    parser.add_argument("--quick", action="store_true", help="of ray: a slice, which is written nowhere")
    given = parser.parse_args()
    options = {"quick": True} if given.quick else {}
    importlib.import_module(f"benchmarks.{given.name}").run(**options)


if __name__ == "__main__":
    main()
