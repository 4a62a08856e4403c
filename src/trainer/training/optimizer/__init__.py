"""The optimizer: its class, whether it can train, how it rounds, and a guarded step."""
