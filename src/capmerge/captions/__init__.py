"""Pure functions of one record: how its caption and tags are merged, read back and drawn from."""
