"""Studies: several variants of recipes, each with several seeds, run, measured and compared."""
