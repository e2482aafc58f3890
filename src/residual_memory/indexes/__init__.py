"""Search engines: one a file, all behind `indexes.base.Index` and the one search `nearest`."""
