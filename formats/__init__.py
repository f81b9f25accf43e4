"""Files that more than one room reads, as they lie on the disk: nothing in them is run, and nothing of ours is imported."""
