"""What a run shows: the page, its charts, the model card."""
