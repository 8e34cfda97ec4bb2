"""Files: checkpoints, artifacts, recipes, texts, and the processes that share them."""
