"""The maths: arrays in, arrays out; no models, no reduction over rows."""
