"""The studio: draw, score, browse runs and fine-tune in the browser."""
