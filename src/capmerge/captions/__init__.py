"""One record: how its caption and tags are merged, read back and drawn from. All of it is pure."""
