"""One run of a study, in a process of its own."""

from .run import main

main()
