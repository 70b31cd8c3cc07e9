"""What a run will need, computed without weights or a GPU."""
