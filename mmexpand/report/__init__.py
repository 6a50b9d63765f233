"""Pages that show a run, or a study: HTML that opens anywhere."""
