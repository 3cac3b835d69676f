"""Next-token distributions and the only decoding loop."""
