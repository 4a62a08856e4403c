"""The memory that a run will need on each GPU, estimated before it starts."""
