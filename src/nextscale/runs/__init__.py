"""One run is one folder: who writes it, who reads it, its checkpoints."""
