"""Tools wing: a calculator and Python in a sandbox, which a model may call while it answers."""
