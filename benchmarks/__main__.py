"""Run a benchmark by name: `python -m benchmarks core`."""

import argparse
import importlib

NAMES = (
    "core",
    "durability",
    "explorer",
    "fuzz",
    "language",
    "planning",
    "ray",
    "scale",
    "serve",
    "tables",
    "torture",
)


def main() -> None:
    """Read the options and run the benchmark."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("name", choices=NAMES)
    parser.add_argument(
        "--quick", action="store_true", help="of fuzz, ray, scale and serve: a slice, which is written nowhere"
    )
    parser.add_argument("--rows", type=int, help="of scale: this many rows of 64 numbers, and nothing else")
    given = vars(parser.parse_args())
    module = importlib.import_module(f"benchmarks.{given.pop('name')}")
    module.run(**{name: value for name, value in given.items() if value})


if __name__ == "__main__":
    main()
