"""nanochat: from raw text to a chat model, in one readable package."""

import os

__version__ = "0.1.0"

# GNU OpenMP's threads spin for a while where they wait for each other. Beside another busy process
# that takes the processor from the thread that is waited for: training at depth 4 on two cores fell
# from 7,000 to 2,000 tokens a second. A thousand turns are enough where nothing competes. This runs
# before torch loads the library, which reads the variable once.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
