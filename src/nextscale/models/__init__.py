"""The networks: the schedule of scales, the multi-scale VQVAE, the VAR transformer and official files."""
