"""The miniature world: pictures drawn by a program, and the models trained on them."""
