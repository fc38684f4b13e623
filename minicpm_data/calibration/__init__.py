"""Quantize with calibration: texts run through the model layer by layer, and codes chosen by the layers' inputs."""
