"""Text and conversations on their way into batches: stores, packing, order, loading."""
