"""Cost of an expansion and its effect on training. Imports torch, core and surgery."""
