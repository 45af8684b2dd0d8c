"""What a run will need, found by making one step of it on fake tensors and fake ranks."""
