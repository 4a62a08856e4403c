"""What runs a step on one or many devices: accelerate, torch, DeepSpeed, and the ranks."""
