"""Data wing: corpora and conversations become token stores, and stores become batches."""
