"""A pytest plugin (`-p core.testing.one_thread`): one torch thread in each of the tests' processes, which run abreast.

Two threads in each of two processes on two cores wait for one another by spinning: tests took up to 40 times as long.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
