"""Storage: atomically written files, journals, images."""
