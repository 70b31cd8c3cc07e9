"""Networks and their files: scales, tokenizer, transformer; model folders, official checkpoints, the hub."""
