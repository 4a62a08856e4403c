"""What makes a step faster: compiled blocks, attention kernels, and batches fetched ahead."""
