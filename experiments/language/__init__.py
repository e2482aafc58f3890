"""Text: a decoder-only T5 trained for one epoch, and its memory of the tokens."""
