"""Detection and segmentation: data sets, transforms, scores and drawings; bodies, heads and detectors."""
