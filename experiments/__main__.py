"""Run a recipe by name: `python -m experiments cifar100`."""

import argparse
import importlib

RECIPES = {
    "cifar100": "experiments.cifar100.table",
    "language": "experiments.language.table",
    "language-words": "experiments.language.words",
    "linear-regression": "experiments.linear_regression",
    "privacy": "experiments.privacy",
    "roses": "experiments.cifar100.roses",
    "sample-size": "experiments.cifar100.sample_size",
    "shrinking": "experiments.shrinking",
    "tabular": "experiments.tabular",
}


def main() -> None:
    """Read the options and run the recipe."""
    parser = argparse.ArgumentParser(prog="python -m experiments", description=__doc__)
    parser.add_argument("name", choices=RECIPES)
    parser.add_argument("--quick", action="store_true", help="a slice, written beside the results, for CI")
    parser.add_argument("--fresh", action="store_true", help="measure every row again")
    options = parser.parse_args()
    importlib.import_module(RECIPES[options.name]).run(quick=options.quick, fresh=options.fresh)


if __name__ == "__main__":
    main()
