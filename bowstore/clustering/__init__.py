"""k-means, principal components, and the nearest centroid: what words and clusters of images are made with."""
