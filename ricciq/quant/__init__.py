"""Numbers: codes, fake quantization, quantizers and their calibration."""
