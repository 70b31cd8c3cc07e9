"""Networks that others trained, and what is done to images before them."""
