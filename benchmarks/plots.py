"""Colours and markers that the benchmarks' pictures share."""

# Okabe and Ito's palette: told apart by colour-blind readers, too
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P")
