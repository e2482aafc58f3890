"""The command `resmem`: one file a group of commands."""
