"""What an expansion costs, and what it does to training. Imports torch, core and surgery."""
