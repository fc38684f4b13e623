"""What a model that sees has before its decoder: a tower, and a resampler to the decoder's width."""
