"""Quantized weights in files: what each tool packs, read to one neutral form and to float. numpy only."""
