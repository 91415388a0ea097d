"""Report wing: the report of a run, and views of its batches."""
