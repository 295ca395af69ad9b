"""One script per claim; each prints the numbers that the README shows."""
