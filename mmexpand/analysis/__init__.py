"""What an expansion costs, counted. Imports torch, core and surgery."""
