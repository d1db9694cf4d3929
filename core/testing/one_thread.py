"""A pytest plugin (`-p core.testing.one_thread`): one torch thread in each process of the tests, which run side by side.

Two threads in each of two processes on two cores wait for one another by spinning: tests took up to forty times as long.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
