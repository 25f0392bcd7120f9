"""Files that are written here and read back, perhaps much later: whole or not at all, locked while they are written,
and checked when they are read."""
