"""Fast inner loops behind a plain jnp meaning."""
