"""FP8 (E4M3) in tiles, as DeepSeek-V3 does."""
