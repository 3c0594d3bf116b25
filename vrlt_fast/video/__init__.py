"""Video files to uint8 patches: decoding, frame sampling, resizing, caching."""
