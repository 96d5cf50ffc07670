"""What the programs put on the disk: files that are whole or not there, journals, images."""
