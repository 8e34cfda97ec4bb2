"""Keys and values in few bits: the cache, its calibration and its kernels."""
