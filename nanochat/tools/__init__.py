"""Tools that a model may call while it answers: a calculator, and Python in a sandbox."""
