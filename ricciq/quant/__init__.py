"""Numbers: codes, fake quantization, quantizers and their first ranges."""
