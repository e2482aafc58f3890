"""Recipes that produce the result files: `python -m experiments NAME`. They import the library; nobody imports them."""
