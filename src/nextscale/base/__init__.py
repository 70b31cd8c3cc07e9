"""What every room stands on: errors, records, seeds, means; imports nothing of ours."""
