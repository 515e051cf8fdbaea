"""Independent transcriptions of the papers' formulas in fp64: slow, plain, without the package's code."""
