"""Quantized weights in files: reads the formats of several tools to one common form and to float. numpy only."""
