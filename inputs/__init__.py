"""What data sets are made of: decoding, transforms, device-side finishing, the file index."""
