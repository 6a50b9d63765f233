"""One run of a study, in a separate process."""

from .run import main

main()
