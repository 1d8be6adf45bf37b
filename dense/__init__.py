"""Detection and segmentation on the bodies that this project trains."""
