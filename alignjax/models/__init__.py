"""The nets. The only room that imports flax.linen."""
