"""The nearest of some centroids to each of many vectors: exact in float32, on CPUs and GPUs."""
