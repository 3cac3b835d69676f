"""Job graphs and where they run. Imports core."""
