"""Where the words of vector quantization come from, and the search for the best: learned, universal, lattice, trellis.

Every kind is a `Quantizer` of `feedback`: it takes the next columns of a weight and answers with codes and values.
"""
