"""The report of a run, and views of its batches."""
