"""What lies in model files and in memory: tensors, their formats and scales, reading, and patches to them."""
